"""The protocols by which a split is scored; every value says what it is of how many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fne_jax.errors import UserError
from fne_jax.evaluation import coco_protocols, intervals, metrics
from fne_jax.evaluation.metric_names import DIRECTIONS, RETRIEVAL
from fne_jax.evaluation.metrics import QueryScores
from fne_jax.model.embedded_split import EmbeddedSplit

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One metric of a protocol.

    Attributes:
      value: The metric: recalls and precisions in percent, ranks from 1.
      low: The lower end of the 95 % interval.
      high: The upper end of the interval.
      definition: What the metric is, in words.
      queries: The number of queries; both directions' for rSum.
      candidates: The number of items that each query ranks; both directions' for rSum.
    """

    value: float
    low: float
    high: float
    definition: str
    queries: int | list[int]
    candidates: int | list[int]


def measure(split: EmbeddedSplit, protocol: str) -> tuple[dict[str, Measurement], dict[str, str]]:
    """Returns the metrics of a protocol, or of all that the split allows.

    The protocol is a key of `PROTOCOLS`, or `all`.

    Returns:
      The metrics by name, those of the whole split without a prefix; and for `all` the protocols
      that were left out, with the reason.

    Raises UserError if the split does not suit the protocol.
    """
    if protocol != ALL:
        return PROTOCOLS[protocol](split), {}
    measured, left_out = {}, {}
    for name, function in PROTOCOLS.items():
        try:
            measured |= function(split)
        except UserError as error:
            left_out[name] = str(error)
    return measured, left_out


def check_suits(protocol: str, image_id: np.ndarray, caption_id: np.ndarray) -> None:
    """Checks before anything is embedded whether a split suits a protocol.

    The protocol is a key of `PROTOCOLS`, or `all`, which suits every split; the ids are [images]
    and [captions]. Raises UserError if it does not.
    """
    if protocol in ("coco_5k", "coco_1k"):
        coco_protocols.check_five_thousand(len(image_id), protocol)
    elif protocol in ("eccv", "cxc"):
        coco_protocols.test_rows(image_id, caption_id, protocol)


def flickr30k(split: EmbeddedSplit) -> dict[str, Measurement]:
    """Returns the standard recalls over the whole split, and `complete_...` where truth is known.

    That is Flickr30K's protocol: every image against every caption, whatever their numbers.
    """
    labels = metrics.label_scores(split.image_emb, split.text_emb, split.caption_image)
    measured = measurements("", [labels], "all of the split", "its own {}")
    if split.truth is not None:
        complete = metrics.truth_scores(
            split.image_emb, split.text_emb, split.truth, split.caption_image
        )
        measured |= measurements("complete_", [complete], "all of the split", "any true {}")
    return measured


def coco_5k(split: EmbeddedSplit) -> dict[str, Measurement]:
    """Returns the standard recalls over COCO's 5,000 test images.

    Raises UserError if the split has another number of images.
    """
    check_suits("coco_5k", split.image_id, split.caption_id)
    return flickr30k(split)


def coco_1k(split: EmbeddedSplit) -> dict[str, Measurement]:
    """Returns as `coco_1k_...` the means over five folds of 1,000 images in the split's order.

    Raises UserError if the split has not 5,000 images.
    """
    folds = [
        metrics.label_scores(fold.image_emb, fold.text_emb, fold.caption_image)
        for fold in coco_protocols.folds(split)
    ]
    within = "its fold of 1,000 images, mean over five folds"
    return measurements("coco_1k_", folds, within, "its own {}")


PROTOCOLS: Mapping[str, Callable[[EmbeddedSplit], dict[str, Measurement]]] = {
    "flickr30k": flickr30k,
    "coco_5k": coco_5k,
    "coco_1k": coco_1k,
    "eccv": lambda split: extended(
        split, "eccv", ("r1", "r_precision", "map_at_r"), "any {} of ECCV Caption"
    ),
    "cxc": lambda split: extended(split, "cxc", ("r1", "r5", "r10"), "any {} of CxC"),
}


def extended(
    split: EmbeddedSplit, source: str, keys: Sequence[str], match: str
) -> dict[str, Measurement]:
    """Returns as `eccv_...` or `cxc_...` some metrics against the matches of `eccv_caption`.

    Raises UserError if that is not installed, or the split is not COCO's test split.
    """
    scores = {
        direction: dataclasses.replace(one, means={key: one.means[key] for key in keys})
        for direction, one in coco_protocols.extended_scores(split, source).items()
    }
    return measurements(f"{source}_", [scores], "COCO's test split", match)


def measurements(
    prefix: str, folds: Sequence[Mapping[str, QueryScores]], within: str, match: str
) -> dict[str, Measurement]:
    """Returns the means over folds with their intervals, and rSum where all six recalls are.

    Args:
      prefix: The beginning of the metrics' names, a key of `TRUTHS`.
      folds: Of each fold, the scores of both directions.
      within: What the items that are ranked are all of, in words.
      match: What counts as a match, in words, `{}` standing for the item.
    """
    measured, samples, images = {}, {}, 0
    for direction, words in DIRECTIONS.items():
        scores = [fold[direction] for fold in folds]
        values = [one.metrics() for one in scores]
        resamples = [intervals.resampled(one, stream) for stream, one in enumerate(scores)]
        images = sum(len(np.unique(one.image)) for one in scores)
        subject = (
            f"{words.query} queries, the {words.item}s of {within} ranked by cosine similarity, "
            "ties last: "
        )
        for key in values[0]:
            name = f"{direction}_{key}"
            samples[name] = np.mean([of_fold[key] for of_fold in resamples], axis=0)
            definition = RETRIEVAL[key].definition.format(match=match.format(words.item))
            value = float(np.mean([of_fold[key] for of_fold in values]))
            measured[prefix + name] = Measurement(
                value,
                *(
                    intervals.percentiles(samples[name])
                    if key in ("medr", "meanr")
                    else intervals.interval(value, samples[name], 100.0, images)
                ),
                subject + definition,
                sum(len(one.image) for one in scores),
                scores[0].candidates,
            )
    # Against several true matches a sum of recalls is not customary.
    if "i2t_medr" in samples:
        parts = [measured[prefix + name] for name in metrics.RSUM_OF]
        value = sum(part.value for part in parts)
        sums = np.sum([samples[name] for name in metrics.RSUM_OF], axis=0)
        measured[f"{prefix}rsum"] = Measurement(
            value,
            *intervals.interval(value, sums, 100.0 * len(parts), images),
            f"sum of {', '.join(prefix + name for name in metrics.RSUM_OF)}; queries and "
            "candidates: of images, then of captions",
            [parts[0].queries, parts[-1].queries],
            [parts[0].candidates, parts[-1].candidates],
        )
    return measured
