"""The names of metrics: what each means, and how tables, pages and figures show it.

A metric of retrieval is named by what its matches are taken from, its direction and its key, as
`complete_i2t_r1`; all others by their key alone, as `rsum`. `complete_i2t_r1_controlled` is the
former controlled for how much captions say, and `complete_i2t_r1_weight` what that took. Whatever
shows a metric reads this.
"""

from __future__ import annotations

import dataclasses

COMPLETE, JUDGED = "complete_", "judged_"
# Endings of a metric that is controlled for how much captions say, and of the weight that it took.
CONTROLLED, WEIGHT = "_controlled", "_weight"
# Logged while training: 1 for the steps of the warm-up, 0 for those after it.
WARMUP = "warmup"


@dataclasses.dataclass(frozen=True)
class RetrievalDirection:
    """A direction of retrieval.

    Attributes:
      title: Its name in words.
      query: What is searched with.
      item: What is searched for.
    """

    title: str
    query: str
    item: str


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
      heading: The head of a table's column.
      meaning: A line for the reader of a page.
      definition: The exact meaning; `{match}` stands for what counts as a match.
      legend: Its name in a figure's legend; the heading if empty.
      decimals: Digits after the point.
      scale: What a value is multiplied by before it is shown: 100 for shares in percent.
    """

    heading: str
    meaning: str = ""
    definition: str = ""
    legend: str = ""
    decimals: int = 1
    scale: float = 1.0

    def text(self, value: float, sign: str = "") -> str:
        """Returns a value as it is shown; with the sign `+`, differences have one."""
        return f"{value * self.scale:{sign}.{self.decimals}f}"


DIRECTIONS = {
    "i2t": RetrievalDirection("image to text", "image", "caption"),
    "t2i": RetrievalDirection("text to image", "caption", "image"),
}
# What matches are taken from, by the beginning of a metric's name.
TRUTHS = {
    "": "",
    COMPLETE: "against the complete truth",
    "coco_1k_": "COCO 1K, mean of 5 folds",
    "eccv_": "ECCV Caption",
    "cxc_": "CxC",
    JUDGED: "by verdicts",
}
# Of one direction each.
RETRIEVAL = {
    "r1": Metric(
        "R@1",
        "% of queries whose first result matches",
        "percentage of queries with {match} among the first 1",
    ),
    "r5": Metric(
        "R@5",
        "% with a match among the first 5",
        "percentage of queries with {match} among the first 5",
    ),
    "r10": Metric(
        "R@10",
        "% with a match among the first 10",
        "percentage of queries with {match} among the first 10",
    ),
    "p10": Metric(
        "P@10",
        "% of the first 10 results that match",
        "percentage of the first 10 that are {match}",
    ),
    "r_precision": Metric(
        "R-Precision",
        "% of matches among the first R results, R being their number",
        "percentage of the first R that are {match}, R their number",
    ),
    "map_at_r": Metric(
        "mAP@R",
        "% mean average precision within the first R results",
        "mean over queries of sum_(k<=R) precision(k) [the k-th is {match}] / R, %",
    ),
    "medr": Metric(
        "median rank",
        "median place of the first match, 1 is best",
        "median rank of {match}, from 1, halves rounded down",
    ),
    "meanr": Metric(
        "mean rank",
        "mean place of the first match, 1 is best",
        "mean rank of {match}, from 1",
    ),
}
# Known against every true match alone, so that their headings need not say so.
_OF_COMPLETE_TRUTH = ("r_precision", "map_at_r")
_CONTROLLED_BY = "captions ranked by similarity minus {weight} times their number of words"
_WEIGHT_MEANING = "what each word takes off a caption's similarities, chosen on the val split"
OTHERS = {
    "rsum": Metric("rSum", "sum of the six recalls, of 600"),
    # Logged while training.
    "loss": Metric("loss", "mean loss of the steps"),
    "positive_mean": Metric(
        "mean positive similarity",
        "mean similarity of the pairs that the statistics take",
        legend="matching pairs",
        decimals=3,
    ),
    "negative_mean": Metric(
        "mean negative similarity",
        "mean similarity of those pairs' hardest negatives",
        legend="their hardest negatives",
        decimals=3,
    ),
    "sampled_false_negative_rate": Metric(
        "false negatives, %",
        "share of the negatives that the loss chose that are in truth matches",
        legend="chosen negative",
        scale=100,
    ),
    "hardest_false_negative_rate": Metric(
        "false negatives of the hardest, %",
        "share of the hardest candidates that are in truth matches",
        legend="hardest candidate",
        scale=100,
    ),
    # Of the posterior as a detector of false negatives.
    "roc_auc": Metric("AUC", "area under the ROC curve", legend="ROC AUC", decimals=3),
    "average_precision": Metric("AP", "average precision", legend="average precision", decimals=3),
    "density": Metric("density, %", "share of matches among the candidates", decimals=2, scale=100),
    "mean_posterior": Metric(
        "mean posterior, %", "mean posterior of the candidates", decimals=2, scale=100
    ),
}


def split_name(name: str) -> tuple[str, str, str]:
    """Returns what matches are taken from, the direction and the key of a metric's name.

    Those of `complete_i2t_r1` are `complete_`, `i2t` and `r1`; a name without a direction is all
    key.
    """
    for direction in DIRECTIONS:
        truth, found, key = name.partition(f"{direction}_")
        if found:
            return truth, direction, key
    return "", "", name


def describe(name: str) -> Metric:
    """Returns the entry of a name, with a heading and a legend that stand alone.

    The heading of `complete_i2t_r1` is `true R@1 i2t`, the legend `image to text R@1`.

    Raises KeyError if there is no such metric.
    """
    truth, direction, key = split_name(name)
    if not direction:
        return dataclasses.replace(OTHERS[key], legend=OTHERS[key].legend or OTHERS[key].heading)
    plain = key.removesuffix(CONTROLLED).removesuffix(WEIGHT)
    found = RETRIEVAL[plain]
    heading = f"{found.heading} {direction}"
    legend = f"{DIRECTIONS[direction].title} {found.heading}"
    if key.endswith(WEIGHT):
        return Metric(f"weight for {heading}", _WEIGHT_MEANING, decimals=3)
    if key.endswith(CONTROLLED):
        weight = name.removesuffix(CONTROLLED) + WEIGHT
        definition = f"{found.definition}, {_CONTROLLED_BY.format(weight=weight)}"
        heading, legend = f"controlled {heading}", f"{legend}, controlled"
        return dataclasses.replace(found, heading=heading, legend=legend, definition=definition)
    if truth == COMPLETE and key not in _OF_COMPLETE_TRUTH:
        heading = f"true {heading}"
    return dataclasses.replace(found, heading=heading, legend=legend)
