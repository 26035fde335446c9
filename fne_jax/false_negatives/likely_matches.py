"""All pairs of a split that a detector takes for matches, for training: `config.data.matches`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.data.match_files import write_match_list
from fne_jax.data.pair_columns import Pairs
from fne_jax.evaluation.top_k import by_blocks
from fne_jax.false_negatives.detectors import Judge
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.objectives.similarity_statistics import cosine

# Of pairs that training is to take for matches. In trials with the truth in hand, finds of which 4
# in 5 were right were worth most of what the truth is worth, those of which half were, nothing.
LEAST_PROBABILITY = 0.8
# Captions whose candidates are judged at once.
_CAPTIONS = 1024


def likely_matches(split: JudgedSplit, judge: Judge, *, per_caption: int, least: float) -> Pairs:
    """Returns the pairs of a probability of `least` or more among each caption's candidates.

    The candidates are the images most similar to the caption, and those with an own caption most
    similar to it. All other pairs are left out, whatever the detector would say of them.

    Of each caption `per_caption` images of either kind are judged.
    """
    images, bank, own = len(split.image_emb), split.caption_bank, split.own
    # [most, images] the captions of each image, its last one again where others have more.
    number = np.minimum(np.arange(own.count.max())[:, None], np.maximum(own.count - 1, 0))
    of_images = own.order[np.minimum(own.first + number, len(own.order) - 1)]
    everything = jax.device_put((split.image_emb, bank[of_images], own.count > 0))
    count = min(per_caption, images)

    def nearest(part: slice):
        scores = jax.device_get(_scores(split.text_emb[part], bank[part], *everything))
        # On CPUs several times faster than XLA's top_k, which sorts.
        best = [np.argpartition(-score, count - 1, axis=1)[:, :count] for score in scores]
        image = np.concatenate(best, axis=1).astype(np.int32)
        return image, np.take_along_axis(scores[0], image, axis=1)

    found = []
    captions = len(split.text_emb)
    for start in range(0, captions, _CAPTIONS):
        rows = min(_CAPTIONS, captions - start)
        image, similarity = by_blocks(
            rows, lambda part, start=start: nearest(slice(start + part.start, start + part.stop))
        )
        pair = (start + np.arange(rows))[:, None] * images + image
        pair, first = np.unique(pair, return_index=True)
        caption, other = np.divmod(pair, images)
        pairs = Pairs(caption, other, similarity=similarity.ravel()[first])
        pairs = judge(pairs[split.caption_image[caption] != other])
        pairs = pairs[pairs.probability >= least]
        found.append((pairs.caption, pairs.image, pairs.probability))
    caption, image, probability = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Pairs(caption, image, probability=probability)


def write_likely_matches(
    path: pathlib.Path,
    split: JudgedSplit,
    judge: Judge,
    *,
    per_caption: int,
    least: float,
    about: Mapping[str, Any],
    said: Pairs | None = None,
) -> dict[str, Any]:
    """Writes `likely_matches` as a file for `config.data.matches`, and returns what describes it.

    Pairs that people refuted are left out, and all that they confirmed are in, of probability 1.

    The file ends in `.npz`, and holds `about` besides, such as the detector. `said` is what people
    say of unlabelled pairs, with `is_match`; None where nobody was asked.

    Returns:
      `about` with the least probability, the number of `matches`, with `said` how many were
      `refuted` and are `confirmed`, and, where the truth is known, their `precision` (None of no
      matches).

    Raises UserError if the file cannot be written.
    """
    found = likely_matches(split, judge, per_caption=per_caption, least=least)
    about = {**about, "least_probability": least}
    if said is not None:
        found, about["refuted"] = found.heeding(
            said, lambda pairs: pairs.replace(probability=np.ones(len(pairs), np.float32))
        )
        found = found.replace(probability=np.where(found.is_match, 1, found.probability))
        about["confirmed"] = int(found.is_match.sum())
    about["matches"] = len(found)
    if split.dataset.truth is not None:
        right = split.dataset.truth.is_true(found.caption, found.image)
        about["precision"] = float(right.mean()) if len(found) else None
    write_match_list(path, split.dataset, found, about)
    return about


@jax.jit
def _scores(text_emb, bank_rows, image_emb, banks, has_captions):
    """Returns [rows, images] how near captions are to images, and to the nearest of their own."""
    lowest = jnp.full((len(bank_rows), len(image_emb)), -jnp.inf, jnp.float32)
    by_captions, _ = jax.lax.scan(
        lambda so_far, bank: (jnp.maximum(so_far, cosine(bank_rows, bank)), None), lowest, banks
    )
    return cosine(text_emb, image_emb), jnp.where(has_captions, by_captions, -jnp.inf)
