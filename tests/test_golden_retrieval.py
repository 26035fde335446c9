"""Recalls and ranks against the authors' figures."""

import numpy as np

from fne_jax import retrieval_metrics
from fne_jax.evaluation.ranks import match_ranks


def test_agrees_exactly(golden):
    figures = np.load(golden / "retrieval.npz")
    owner = np.arange(len(figures["text_emb"])) // 5
    scores = retrieval_metrics(figures["image_emb"], figures["text_emb"], owner)
    for direction in ("i2t", "t2i"):
        ours = [scores[f"{direction}_{name}"] for name in ("r1", "r5", "r10", "medr", "meanr")]
        np.testing.assert_allclose(ours, figures[f"{direction}_r1_r5_r10_medr_meanr"], rtol=1e-12)
    np.testing.assert_allclose(scores["rsum"], figures["rsum"], rtol=1e-12)


def test_ranks_of_every_query(golden):
    figures = np.load(golden / "retrieval.npz")
    owner = np.arange(len(figures["text_emb"])) // 5
    found = match_ranks(figures["image_emb"], figures["text_emb"], owner)
    np.testing.assert_array_equal(found.i2t, figures["i2t_ranks"])
    np.testing.assert_array_equal(found.t2i, figures["t2i_ranks"])
