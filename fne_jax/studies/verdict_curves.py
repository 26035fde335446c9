"""Made for a table of the docs: what so many verdicts would have told of a study's systems.

The truth is the reviewer. `study --verdicts` writes the table that docs/verdicts.md shows; nothing
that trains or evaluates uses this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fne_jax.evaluation.metric_names import DIRECTIONS
from fne_jax.evaluation.top_k import top_k
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_workdir
from fne_jax.studies.cells import Run
from fne_jax.studies.summary import Estimate, over_seeds

# Random orders of the queries that a share is the mean over.
_ORDERS = 200


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What several systems find first for all queries of one direction.

    Attributes:
      pair: [systems, queries] int64, `caption * images + image` of the first result.
      is_true: [systems, queries] bool, whether it matches in truth.
      labelled: [systems, queries] bool, whether it is a labelled match, which nobody is asked of.
    """

    pair: np.ndarray
    is_true: np.ndarray
    labelled: np.ndarray


def outcomes(splits: Sequence[EmbeddedSplit]) -> dict[str, Outcomes]:
    """Returns the first results of systems by direction.

    Args:
      splits: One split as each system embeds it; its matches are all known.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in DIRECTIONS}
    for split in splits:
        images, captions = np.arange(len(split.image_emb)), np.arange(len(split.text_emb))
        found["i2t"].append((top_k(split.image_emb, split.text_emb, 1)[0][:, 0], images))
        found["t2i"].append((captions, top_k(split.text_emb, split.image_emb, 1)[0][:, 0]))
    results = {}
    for direction, pairs in found.items():
        caption, image = (np.stack(rows) for rows in zip(*pairs, strict=True))
        results[direction] = Outcomes(
            caption.astype(np.int64) * len(splits[0].image_emb) + image,
            splits[0].truth[image, caption],
            splits[0].caption_image[caption] == image,
        )
    return results


def ordered_rightly(results: Outcomes, verdicts: int, seed: int) -> tuple[float, float]:
    """Returns the share of pairs of systems that so many verdicts order as all of them would.

    Queries are drawn at random until the next one's unlabelled first results, those that systems
    share counted once, would be more than the verdicts. Two systems that so few do not tell apart
    count half; those that all verdicts do not are left out.

    Args:
      results: The first results of the systems.
      verdicts: How many there are.
      seed: The seed of the queries.

    Returns:
      The mean share over random orders of the queries, and the mean number of queries; NaN where no
      two systems are told apart by all verdicts, or the verdicts are too few for any query.
    """
    rng = np.random.default_rng(seed)
    systems, queries = results.pair.shape
    first, second = np.triu_indices(systems, 1)
    whole = results.is_true.mean(axis=1)
    right_sign = np.sign(whole[first] - whole[second])
    told = right_sign != 0
    # A result counts once for each query: for the first of the systems that found it.
    shared = np.zeros((systems, queries), bool)
    for system in range(1, systems):
        shared[system] = (results.pair[:system] == results.pair[system]).any(axis=0)
    asked = (~shared & ~results.labelled).sum(axis=0)
    shares, counts = [], []
    for _ in range(_ORDERS):
        order = rng.permutation(queries)
        count = int(np.searchsorted(np.cumsum(asked[order]), verdicts, side="right"))
        if not count:
            continue
        means = results.is_true[:, order[:count]].sum(axis=1)
        sign = np.sign(means[first] - means[second])
        shares.append(np.where(sign == 0, 0.5, sign == right_sign)[told].sum() / max(1, told.sum()))
        counts.append(count)
    if not told.any() or not counts:
        return math.nan, math.nan
    return float(np.mean(shares)), float(np.mean(counts))


def systems_of(runs: Sequence[Run]) -> dict[int, list[EmbeddedSplit]]:
    """Returns for each seed the test split as each of the runs' last weights embed it.

    Args:
      runs: Finished runs, of a dataset whose matches are all known; a cell that lacks a seed of
        the others is left out.
    """
    seeds = {run.seed for run in runs}
    of_cell = {run.cell: {one.seed for one in runs if one.cell == run.cell} for run in runs}
    found: dict[int, list[EmbeddedSplit]] = {}
    for run in runs:
        if of_cell[run.cell] == seeds:
            model = load_workdir(run.workdir, "latest")
            split = model.embed_split(model.load_evaluation_split("test"))
            found.setdefault(run.seed, []).append(split)
    return found


def markdown(of_seeds: Mapping[int, Sequence[EmbeddedSplit]], budgets: Sequence[int]) -> str:
    """Returns a table: by direction and number of verdicts, the share of systems ordered rightly.

    Args:
      of_seeds: What `systems_of` returned, of at least two systems.
      budgets: Numbers of verdicts.
    """
    results = {seed: outcomes(splits) for seed, splits in of_seeds.items()}
    systems = len(next(iter(of_seeds.values())))
    lines = [
        f"Pairs of {systems} systems that verdicts order by true R@1 as the whole truth does, each",
        f"the mean over {_ORDERS} draws of the queries: {over_seeds(len(results))}.",
        "",
        "| verdicts | image to text | queries | text to image | queries |",
        "|--:|--:|--:|--:|--:|",
    ]
    for budget in budgets:
        cells = []
        for direction in DIRECTIONS:
            found = [ordered_rightly(of[direction], budget, seed) for seed, of in results.items()]
            known = [one for one in found if not math.isnan(one[0])]
            if not known:
                cells += ["-", "-"]
                continue
            share = Estimate.of([100 * one[0] for one in known])
            spread = "" if share.count == 1 else f" ± {share.deviation:.0f}"
            cells += [f"{share.mean:.0f}{spread} %", f"{np.mean([one[1] for one in known]):,.0f}"]
        lines.append(f"| {budget:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
