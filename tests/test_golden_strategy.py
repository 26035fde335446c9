"""The strategy against the authors' figures, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fne_jax import (
    MemoryQueue,
    SimilarityStatistics,
    fne_triplet_loss_from_uniform,
    hardest_negative_triplet_loss,
    sampling_weights,
    update_similarity_statistics,
)
from fne_jax.objectives.similarity_statistics import cosine

TOLERANCE = 1e-5


def strategy_files(config):
    import pathlib

    return sorted(pathlib.Path(config.getoption("--golden")).glob("strategy_*.npz"))


def pytest_generate_tests(metafunc):
    if "strategy_file" in metafunc.fixturenames:
        files = strategy_files(metafunc.config)
        assert files, "no strategy_*.npz in the golden folder"
        metafunc.parametrize("strategy_file", files, ids=lambda path: path.stem)


def steps_of(arrays):
    step = 0
    while f"t{step}_loss" in arrays:
        yield step, {k.removeprefix(f"t{step}_"): v for k, v in arrays.items()}
        step += 1


def as_stored(stats):
    halves = (stats.positive, stats.negative)
    return np.array([v for g in halves for v in (g.mean, g.count, g.variance, g.count)])


def test_replays_the_authors_steps(strategy_file):
    arrays = dict(np.load(strategy_file))
    margin, min_count = float(arrays["margin"]), int(arrays["ready_count"])
    stats = SimilarityStatistics.create()

    def loss_fn(image_emb, text_emb, draws, momentum, image_id, queue, stats):
        return fne_triplet_loss_from_uniform(
            *draws,
            image_emb,
            text_emb,
            *momentum,
            image_id,
            queue,
            stats,
            margin=margin,
            min_count=min_count,
        )

    differentiate = jax.jit(jax.value_and_grad(loss_fn, (0, 1), has_aux=True))
    trusted_steps = seen_steps = 0
    for step, figures in steps_of(arrays):
        batch = len(figures["image_id"])
        image_keys, text_keys = figures["image_keys"], figures["text_keys"]
        key_id = figures["key_image_id"].astype(np.int32)
        queue = MemoryQueue(
            image=image_keys[batch:],
            text=text_keys[batch:],
            image_id=jnp.asarray(key_id[batch:]),
            pair_id=jnp.full(len(key_id) - batch, -1),
            pointer=jnp.array(0),
        )
        image_emb, text_emb = figures["image_emb"], figures["text_emb"]
        stats = update_similarity_statistics(stats, image_emb, text_emb)
        np.testing.assert_allclose(
            as_stored(stats), figures["stats"], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(step)
        )

        (loss, aux), grads = differentiate(
            image_emb,
            text_emb,
            draws=[figures[name].astype(np.float32) for name in ("u_i2t", "u_t2i")],
            momentum=(image_keys[:batch], text_keys[:batch]),
            image_id=figures["image_id"].astype(np.int32),
            queue=queue,
            stats=stats,
        )
        np.testing.assert_array_equal(aux.negative_i2t, figures["negative_i2t"])
        np.testing.assert_array_equal(aux.negative_t2i, figures["negative_t2i"])
        np.testing.assert_allclose(loss, figures["loss"], rtol=TOLERANCE)
        np.testing.assert_allclose(grads[0], figures["grad_image_emb"], atol=TOLERANCE)
        np.testing.assert_allclose(grads[1], figures["grad_text_emb"], atol=TOLERANCE)

        for anchor, keys, name in ((image_emb, text_keys, "i2t"), (text_emb, image_keys, "t2i")):
            weights = sampling_weights(
                cosine(anchor, keys),
                (anchor * keys[:batch]).sum(axis=1),
                figures["image_id"][:, None] == figures["key_image_id"][None, :],
                stats,
                margin=margin,
                min_count=min_count,
            )
            expected = figures[f"weights_{name}"]
            sampled = np.asarray(weights).any(axis=1)
            np.testing.assert_allclose(weights[sampled], expected[sampled], atol=TOLERANCE)
            # A row with nothing to sample is stored as weight 1 at its fallback.
            np.testing.assert_array_equal(
                expected[~sampled].argmax(axis=1), figures[f"negative_{name}"][~sampled]
            )
        trusted_steps += bool(stats.positive.count > min_count)
        seen_steps += 1
    assert 0 < trusted_steps < seen_steps, "the file should cross the step of trust"


def test_warmup_triplet(golden):
    figures = np.load(golden / "warmup_triplet.npz")
    loss, grads = jax.value_and_grad(
        lambda image, text: hardest_negative_triplet_loss(
            image, text, margin=float(figures["margin"])
        ),
        (0, 1),
    )(figures["image_emb"], figures["text_emb"])
    np.testing.assert_allclose(loss, figures["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(grads[0], figures["grad_image_emb"], atol=TOLERANCE)
    np.testing.assert_allclose(grads[1], figures["grad_text_emb"], atol=TOLERANCE)


def test_golden_folder_has_both_kinds_of_rows(golden):
    fallback = [
        ((arrays[key] == 1) & (arrays[key].sum(axis=1, keepdims=True) == 1)).any()
        for arrays in map(np.load, sorted(golden.glob("strategy_*.npz")))
        for key in arrays
        if "weights" in key
    ]
    if not fallback:
        pytest.fail("no strategy files")
    assert any(fallback)
