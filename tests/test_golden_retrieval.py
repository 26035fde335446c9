"""Recalls and ranks against the authors' figures."""

import numpy as np

from fne_jax import retrieval_metrics
from fne_jax.retrieval import metrics


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
    images, owner = np.arange(60), np.arange(300) // 5
    image_emb, text_emb = figures["image_emb"], figures["text_emb"]
    i2t = metrics._ranks(image_emb, text_emb, images, owner)
    t2i = metrics._ranks(text_emb, image_emb, owner, images)
    np.testing.assert_array_equal(i2t, figures["i2t_ranks"])
    np.testing.assert_array_equal(t2i, figures["t2i_ranks"])
