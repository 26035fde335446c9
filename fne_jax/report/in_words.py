"""What a run learnt, in three plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fne_jax.evaluation.metric_names import COMPLETE, WARMUP

_SAMPLED, _HARDEST = "sampled_false_negative_rate", "hardest_false_negative_rate"


def what_was_learnt(
    values: Mapping[str, float], log: Sequence[Mapping[str, float]], images: int
) -> list[str]:
    """Returns sentences on how well captions find images, on the truth, and on the negatives.

    Args:
      values: The metrics of an evaluation by name.
      log: The lines of metrics.jsonl.
      images: How many images the captions were to choose from.
    """
    labels = values["t2i_r1"]
    lines = [
        f"A caption finds its own image first among {images:,} in {labels:.1f} % of cases; "
        f"by chance it would in {100 / images:.2g} %."
    ]
    complete = values.get(f"{COMPLETE}t2i_r1")
    if complete is None:
        lines.append(
            "How many of the others are right too nobody labelled; `audit` shows the likeliest."
        )
    else:
        lines.append(
            f"The first image fits the caption in {complete:.1f} %, if all that is true counts: in "
            f"{max(complete - labels, 0):.1f} % it is right though nobody labelled it."
        )
    return [*lines, _of_negatives(log)]


def _of_negatives(log):
    rates = [line for line in log if _SAMPLED in line and not line.get(WARMUP)]
    if rates:
        sampled, hardest = (
            100 * sum(line[name] for line in rates) / len(rates) for name in (_SAMPLED, _HARDEST)
        )
        return (
            f"Of the negatives that it was trained with, {sampled:.1f} % were in truth matches; of "
            f"the hardest ones, {hardest:.1f} %."
        )
    # Two losses, of which neither is high or low beside the other.
    warmup, after = (
        [line["loss"] for line in log if "loss" in line and line.get(WARMUP, 0) == share]
        for share in (1, 0)
    )
    told = []
    if len(warmup) > 1:
        told.append(f"from {warmup[0]:.3f} to {warmup[-1]:.3f} in the warm-up")
    if len(after) > 1:
        told.append(f"from {after[0]:.3f} to {after[-1]:.3f}{' after it' if warmup else ''}")
    if not told:
        return "It was trained for too few steps to say more."
    return f"The loss went {', and '.join(told)}."
