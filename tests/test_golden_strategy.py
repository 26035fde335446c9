"""The strategy against the authors' figures, step by step."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax import (
    Features,
    MemoryQueue,
    SimilarityStatistics,
    false_negative_posterior,
    hardest_negative_triplet_loss,
    sampling_weights,
    update_similarity_statistics,
)
from fne_jax.objectives.fne_loss import _loss_from_uniforms
from fne_jax.objectives.similarity_statistics import cosine
from tests.support import TOP

TOLERANCE = 1e-5
# Share of a row's total weight by which a float32 sum may miss a border between two keys.
BORDER = 1e-6
# The authors' threshold of suspicion, which the files do not hold.
POSTERIOR_THRESHOLD = 1e-3


def pytest_generate_tests(metafunc):
    if "strategy_file" in metafunc.fixturenames:
        folder = pathlib.Path(metafunc.config.getoption("--golden"))
        files = sorted(folder.glob("strategy_*.npz"))
        assert files, f"no strategy_*.npz in {folder}"
        metafunc.parametrize("strategy_file", files, ids=lambda path: path.stem)


def steps_of(arrays):
    return [
        {k.removeprefix(f"t{step}_"): v for k, v in arrays.items() if k.startswith(f"t{step}_")}
        for step in range(int(arrays["steps"]))
    ]


def as_stored(stats):
    halves = (stats.positive, stats.negative)
    return np.array([v for g in halves for v in (g.mean, g.count, g.variance, g.count)])


def away_from_borders(uniform, weights, negative):
    """Returns draws that pick the recorded keys, those on a border moved into the middle of theirs.

    Where a number falls within rounding of the border between two keys, float32 may pick the other.
    """
    running = np.cumsum(weights.astype(np.float64), axis=1)
    row = np.arange(len(uniform))
    high = running[row, negative] / running[:, -1]
    low = high - weights[row, negative] / running[:, -1]
    assert ((low - BORDER <= uniform) & (uniform <= high + BORDER)).all()
    on_border = (uniform - low < BORDER) | (high - uniform < BORDER)
    return np.where(on_border, (low + high) / 2, uniform).astype(np.float32)


def queue_of(figures):
    batch = len(figures["image_id"])
    key_id = figures["key_image_id"][batch:].astype(np.int32)
    if not len(key_id):
        return None
    return MemoryQueue(
        image=figures["image_keys"][batch:],
        text=figures["text_keys"][batch:],
        image_id=key_id,
        pair_id=np.full(len(key_id), -1, np.int32),
        pointer=np.int32(0),
    )


def test_replays_the_authors_steps(strategy_file):
    arrays = dict(np.load(strategy_file))
    margin, min_count = float(arrays["margin"]), int(arrays["ready_count"])
    settings = {"margin": margin, "min_count": min_count}
    update = jax.jit(update_similarity_statistics)

    @jax.jit
    def differentiate(image_emb, text_emb, draws, momentum, image_id, queue, stats):
        def loss_fn(*online):
            features = Features(*online, *momentum, image_id)
            return _loss_from_uniforms(jnp.stack(draws), features, queue, stats, **settings)

        return jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(image_emb, text_emb)

    @jax.jit
    def weigh(anchor, keys, same_image, stats):
        similarity = cosine(anchor, keys)
        weights = sampling_weights(
            similarity, jnp.diagonal(similarity)[:, None], same_image, stats, **settings
        )
        return weights, similarity, false_negative_posterior(similarity, stats)

    stats = SimilarityStatistics.create()
    for step, figures in enumerate(steps_of(arrays)):
        batch = len(figures["image_id"])
        image_emb, text_emb = figures["image_emb"], figures["text_emb"]
        image_keys, text_keys = figures["image_keys"], figures["text_keys"]
        stats = update(stats, image_emb, text_emb)
        np.testing.assert_allclose(
            as_stored(stats), figures["stats"], rtol=TOLERANCE, atol=TOLERANCE, err_msg=str(step)
        )

        draws = [
            away_from_borders(*(figures[f"{name}_{way}"] for name in ("u", "weights", "negative")))
            for way in ("i2t", "t2i")
        ]
        (loss, aux), grads = differentiate(
            image_emb,
            text_emb,
            draws,
            (image_keys[:batch], text_keys[:batch]),
            figures["image_id"].astype(np.int32),
            queue_of(figures),
            stats,
        )
        np.testing.assert_array_equal(aux.negative_i2t, figures["negative_i2t"])
        np.testing.assert_array_equal(aux.negative_t2i, figures["negative_t2i"])
        np.testing.assert_allclose(loss, figures["loss"], rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(grads[0], figures["grad_image_emb"], atol=TOLERANCE)
        np.testing.assert_allclose(grads[1], figures["grad_text_emb"], atol=TOLERANCE)

        same_image = figures["image_id"][:, None] == figures["key_image_id"][None, :]
        for anchor, keys, way in ((image_emb, text_keys, "i2t"), (text_emb, image_keys, "t2i")):
            weights, similarity, posterior = map(np.asarray, weigh(anchor, keys, same_image, stats))
            expected = figures[f"weights_{way}"]
            sampled = weights.any(axis=1)
            # Where rounding decides between 0 and a weight, or between two formulas, all is right.
            clear = np.abs(similarity - (stats.positive.mean - margin)) > BORDER
            clear &= np.abs(posterior / POSTERIOR_THRESHOLD - 1) > 1e-3
            clear &= sampled[:, None]
            assert clear.mean() > 0.9 * sampled.mean()
            np.testing.assert_allclose(weights[clear], expected[clear], atol=TOLERANCE)
            # A row with nothing to sample is stored as weight 1 at its fallback.
            np.testing.assert_array_equal(
                expected[~sampled].argmax(axis=1), figures[f"negative_{way}"][~sampled]
            )


def test_warmup_triplet(golden):
    figures = np.load(golden / "warmup_triplet.npz")
    margin = float(figures["margin"])
    differentiate = jax.jit(
        jax.value_and_grad(
            lambda *emb: hardest_negative_triplet_loss(Features(*emb), margin=margin)[0], (0, 1)
        )
    )
    loss, grads = differentiate(figures["image_emb"], figures["text_emb"])
    np.testing.assert_allclose(loss, figures["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(grads[0], figures["grad_image_emb"], atol=TOLERANCE)
    np.testing.assert_allclose(grads[1], figures["grad_text_emb"], atol=TOLERANCE)


def test_our_own_files_hold_every_kind_of_step_and_row():
    """Of the files in this repository only: others need not."""
    files = [dict(np.load(path)) for path in (TOP / "tests" / "golden").glob("strategy_*.npz")]
    steps = [(step, int(file["ready_count"])) for file in files for step in steps_of(file)]
    trusted = [step["stats"][1] > ready for step, ready in steps]
    assert 0 < sum(trusted) < len(trusted), "statistics before and after they are trusted"
    weights = [step[f"weights_{way}"] for step, _ in steps for way in ("i2t", "t2i")]
    fallback = np.concatenate(
        [((w == 1).any(axis=1)) & ((w > 0).sum(axis=1) == 1) for w in weights]
    )
    assert 0 < fallback.sum() < len(fallback), "rows that are sampled and rows that fall back"
    assert any((step["key_image_id"] < 0).any() for step, _ in steps), "empty slots"
