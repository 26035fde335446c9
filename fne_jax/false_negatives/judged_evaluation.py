"""Scores by people's verdicts on what systems find first, over queries drawn at random.

Labels know one image of a caption. Where other images match as well, a system that finds one of
them first is scored as wrong, and the better a system is, the more often. Here people judge the
first results of each compared system for the same random queries, a result that several share once.
The mean over these queries then estimates the mean over all, with an interval; labelled pairs
count as matches without being asked, unless a review of labels refuted them.

A system whose results were not judged cannot be scored by what was judged of others: what these
did not find would count against it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.verdicts import MATCH, NO_MATCH, UNSURE, Verdict, opinions, pairs_of
from fne_jax.errors import UserError
from fne_jax.evaluation.metric_names import DIRECTIONS, JUDGED
from fne_jax.evaluation.metrics import QueryScores
from fne_jax.evaluation.protocols import Measurement, measurements
from fne_jax.evaluation.top_k import top_k
from fne_jax.model.embedded_split import EmbeddedSplit

# How many first results of a query are judged: for R@1 alone, or for P@10 as well.
FIRST = (1, 10)
_WORTH = {MATCH: 1.0, NO_MATCH: 0.0, UNSURE: 0.5}
_NAME = re.compile(r"evaluation first=(1|10) queries=([1-9][0-9]{0,8}) seed=([0-9]{1,9})")


@dataclasses.dataclass(frozen=True)
class EvaluationSample:
    """Random queries of a split, and how many of their first results count.

    Attributes:
      first: One of `FIRST`.
      queries: How many queries of each direction, or all where there are fewer.
      seed: The seed of the queries.
    """

    first: int
    queries: int
    seed: int

    @property
    def name(self) -> str:
        """What verdicts call it."""
        return f"evaluation first={self.first} queries={self.queries} seed={self.seed}"

    @classmethod
    def of_name(cls, name: str) -> EvaluationSample | None:
        """Returns the sample of a name; None if it names another kind of sample."""
        parts = _NAME.fullmatch(name)
        return cls(*map(int, parts.groups())) if parts else None

    def draw(self, image_id: np.ndarray, caption_id: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows of the queries of each direction, the same whatever the split's order.

        Args:
          image_id: [images] ids, unique.
          caption_id: [captions] ids, unique.
        """
        drawn = {}
        for number, (direction, ids) in enumerate((("i2t", image_id), ("t2i", caption_id))):
            chosen = np.random.default_rng([self.seed, number]).permutation(len(ids))
            drawn[direction] = np.argsort(ids, kind="stable")[chosen[: self.queries]]
        return drawn


def first_results(sample: EvaluationSample, split: EmbeddedSplit) -> dict[str, Pairs]:
    """Returns what a system finds first for the queries of a sample.

    Returns:
      For each direction the pairs, in columns [queries, first].
    """
    drawn = sample.draw(split.image_id, split.caption_id)
    captions, _ = top_k(split.image_emb[drawn["i2t"]], split.text_emb, sample.first)
    images, _ = top_k(split.text_emb[drawn["t2i"]], split.image_emb, sample.first)
    return {
        "i2t": Pairs(captions, np.broadcast_to(drawn["i2t"][:, None], captions.shape)),
        "t2i": Pairs(np.broadcast_to(drawn["t2i"][:, None], images.shape), images),
    }


def pool(systems: Sequence[Mapping[str, Pairs]], caption_image: np.ndarray, seed: int) -> Pairs:
    """Returns the pairs to judge: the unlabelled results of any system, each once.

    `caption_image` is [captions], the image of each. Their order, by the seed, tells nothing of the
    systems.
    """
    found = [pairs for system in systems for pairs in system.values()]
    caption = np.concatenate([pairs.caption.ravel() for pairs in found])
    image = np.concatenate([pairs.image.ravel() for pairs in found])
    other = caption_image[caption] != image
    pairs = np.unique(np.stack([caption[other], image[other]]).astype(np.int64), axis=1)
    return Pairs(*pairs[:, np.random.default_rng(seed).permutation(pairs.shape[1])])


def find_sample(verdicts: Sequence[Verdict], name: str | None = None) -> EvaluationSample:
    """Returns the evaluation sample that verdicts are of.

    The name tells which, where they are of several. Raises UserError if they are of none, of
    several, or not of the one that is named.
    """
    samples = {one.sample: EvaluationSample.of_name(one.sample) for one in verdicts}
    samples = {name: sample for name, sample in samples.items() if sample}
    there = sorted(samples)
    if not there:
        raise UserError("no verdict is of a sample for evaluation; `review --for-evaluation` "
                        "asks for such")  # fmt: skip
    if name is None and len(there) > 1:
        raise UserError(f"verdicts are of several samples; name one by --sample: {there}")
    if name is not None and name not in there:
        raise UserError(f"--sample={name!r} is not among those that were judged: {there}")
    return samples[there[0] if name is None else name]


def measure_judged(
    sample: EvaluationSample, split: EmbeddedSplit, verdicts: Sequence[Verdict]
) -> dict[str, Measurement]:
    """Returns R@1, and for a sample of ten results P@10, by verdicts and with their intervals.

    A judged pair is worth the mean over its reviewers, of whom each gives 1 for a match, 0 for none
    and 0.5 for unsure. A labelled pair that nobody judged is worth 1.

    Verdicts may be of whatever sample; the last counts.

    Returns:
      The metrics by name, as `judged_i2t_r1`, in percent.

    Raises UserError if a verdict is of another dataset, or a result of the system was not judged.
    """
    found = first_results(sample, split)
    worth = _worth_of(verdicts, split.dataset)
    scores, missing = {}, {}
    for direction in DIRECTIONS:
        caption, image = found[direction].caption, found[direction].image
        keys = caption.astype(np.int64) * len(split.image_emb) + image
        judged, labelled = _look_up(worth, keys), split.caption_image[caption] == image
        known = np.where(np.isnan(judged) & labelled, 1.0, judged)
        missing[direction] = int(np.isnan(known).sum())
        means = {"r1": 100 * known[:, 0]}
        if sample.first > 1:
            means[f"p{sample.first}"] = 100 * known.mean(axis=1)
        query_image = image[:, 0] if direction == "i2t" else split.caption_image[caption[:, 0]]
        candidates = len(split.text_emb if direction == "i2t" else split.image_emb)
        scores[direction] = QueryScores(means, None, query_image, candidates)
    if any(missing.values()):
        raise UserError(
            f"{sum(missing.values())} of this system's first results are not judged "
            f"({missing['i2t']} of image to text, {missing['t2i']} of text to image), so it is not "
            "scored: with what others found alone it would seem worse than it is. Judge them: "
            "`review --for-evaluation` with this system among the others asks for the rest"
        )
    return measurements(JUDGED, [scores], "all of the split", "{} judged or labelled a match")


def _worth_of(verdicts, dataset):
    """Returns [pairs] sorted keys of pairs, and [pairs] what each is worth."""
    verdicts = opinions(verdicts)
    pairs = pairs_of(verdicts, dataset)
    keys, pair = np.unique(pairs.caption * len(dataset.image_id) + pairs.image, return_inverse=True)
    worth = np.array([_WORTH[one.verdict] for one in verdicts])
    return keys, np.bincount(pair, worth) / np.bincount(pair)


def _look_up(worth, keys):
    """Returns what pairs are worth by their keys, NaN where they were not judged."""
    known, values = worth
    if not len(known):
        return np.full(keys.shape, np.nan)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], np.nan)
