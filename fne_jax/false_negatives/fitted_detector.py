"""A detector of false negatives that is fitted to people's verdicts.

Gradient-boosted trees foretell a verdict from `pair_features`. Each tree may only rise with what
speaks for a match and only fall with what speaks against it, which takes the place of the verdicts
that there are too few of. What the trees say is then calibrated on verdicts that they did not see,
each with the weight of the pairs that it stands for: the trees themselves are fitted without these
weights, of which a few large ones would leave most verdicts out of account (on the made-up scenes
of `shapes` they lowered the precision at any number of verdicts).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fne_jax.errors import UserError, needs_extra
from fne_jax.files import as_user_error, write_atomically

# What `pair_features` tells of a pair, and whether a higher one speaks for a match (1), against it
# (-1) or either way (0).
FEATURES = {
    "similarity": 1,  # cosine of the two
    "lead": 1,  # how far that exceeds the caption's similarity to its own image
    "lead_of_image": 1,  # how far it exceeds the image's highest similarity to an own caption
    # How many standard deviations it lies above the mean over random images, and over random
    # captions: the rank of the pair among the caption's images and among the image's captions, by
    # two numbers for each of them rather than by all similarities.
    "rank_of_image": 1,
    "rank_of_caption": 1,
    "nearest_caption": 1,  # cosine of the caption and the nearest of the image's own
    "image_similarity": 1,  # cosine of the image and the caption's own
    "words_found": 1,  # share of the caption's terms, by weight, in the image's own captions
    "words_in_one": 1,  # the same in the best single one of them
    "words_missing": -1,  # weight of the terms that are in none
    "words": 0,  # how many terms the caption has
}
# Verdicts of either kind without which nothing is fitted.
LEAST_VERDICTS = 20
_FOLDS = 5
_LEAVES = 8
_TREES: Mapping[str, Any] = {
    "max_iter": 150,
    "learning_rate": 0.05,
    "max_leaf_nodes": _LEAVES,
    "min_samples_leaf": 20,
    "l2_regularization": 1.0,
    "early_stopping": False,
}
# A precision of fewer verdicts than this is none.
_LEAST_ABOVE = 10
# Pairs whose leaves are found at once.
_BLOCK_PAIRS = 16_384
_FORMAT = "fne_jax fitted detector 1"
# For a byte whose bits are the leaves that a pair is not in, the first one that is not among them.
_FIRST_LEFT = np.array([next((n for n in range(8) if not b >> n & 1), 7) for b in range(256)])


@dataclasses.dataclass(frozen=True)
class Trees:
    """Decision trees of at most eight leaves, which stand in order from left to right.

    A pair goes right at a split if its feature is above the threshold. Then it is in none of the
    leaves to the left of the split, and it ends in the first leaf that no split rules out (the idea
    of QuickScorer, Lucchese et al., SIGIR 2015).

    Attributes:
      feature: [trees, 7] int64 column of each split; splits that there are not have the column 0.
      threshold: [trees, 7] float64, and infinity.
      left: [trees, 7] uint8, a bit for each leaf to the left of the split.
      value: [trees, 8] float64 log odds that each leaf adds.
      baseline: The log odds to which they are added.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    value: np.ndarray
    baseline: float

    @classmethod
    def of(cls, model: Any) -> Trees:
        """Returns the trees of a fitted scikit-learn `HistGradientBoostingClassifier`.

        It tells two classes apart, without categories, and its trees have eight leaves at most.
        """
        # It has no public way to its trees; a test holds ours to its predictions.
        rows = [_splits_and_leaves(one.nodes) for (one,) in model._predictors]
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        return cls(*columns, baseline=float(np.ravel(model._baseline_prediction)[0]))

    def log_odds(self, table: np.ndarray) -> np.ndarray:
        """Returns the [n] float64 log odds that the trees give to features [n, columns]."""
        found = np.full(len(table), self.baseline)
        for start in range(0, len(table), _BLOCK_PAIRS):
            column = np.ascontiguousarray(table[start : start + _BLOCK_PAIRS].T)
            for tree in range(len(self.value)):
                ruled_out = np.zeros(column.shape[1], np.uint8)
                for split in np.flatnonzero(self.left[tree]):
                    right = column[self.feature[tree, split]] > self.threshold[tree, split]
                    ruled_out |= right * self.left[tree, split]
                found[start : start + _BLOCK_PAIRS] += self.value[tree, _FIRST_LEFT[ruled_out]]
        return found


def _splits_and_leaves(nodes):
    """Returns a tree's `feature`, `threshold`, `left` and `value`, of scikit-learn's nodes."""
    feature, threshold = np.zeros(_LEAVES - 1, np.int64), np.full(_LEAVES - 1, np.inf)
    left, value = np.zeros(_LEAVES - 1, np.uint8), np.zeros(_LEAVES)
    leaves = splits = 0

    def visit(number: int) -> None:
        nonlocal leaves, splits
        node = nodes[number]
        if node["is_leaf"]:
            value[leaves] = node["value"]
            leaves += 1
            return
        split, first = splits, leaves
        splits += 1
        feature[split], threshold[split] = node["feature_idx"], node["num_threshold"]
        visit(node["left"])
        left[split] = sum(1 << leaf for leaf in range(first, leaves))
        visit(node["right"])

    visit(0)
    return feature, threshold, left, value


@dataclasses.dataclass(frozen=True)
class FittedDetector:
    """What foretells verdicts, and how well it foretold those that it was not fitted to.

    Attributes:
      trees: The trees.
      slope: By which their log odds are multiplied, above 0.
      offset: And what is added then, so that the probability is that of unlabelled pairs.
      least: [steps] float64, falling, out-of-fold probabilities.
      precision: [steps] share of matches among unlabelled pairs of at least that probability.
      recall: [steps] share of the unlabelled pairs' matches that these have.
      log_loss: Of the out-of-fold probabilities, over unlabelled pairs, in nats.
      about: Anything else that is worth telling: the run, the step, the number of verdicts.
    """

    trees: Trees
    slope: float
    offset: float
    least: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    log_loss: float
    about: Mapping[str, Any]

    def log_odds(self, table: np.ndarray) -> np.ndarray:
        """Returns the [n] float64 log odds of a match.

        Args:
          table: [n, features] float32, what `features` returned.

        Raises ValueError if it has another number of columns.
        """
        if table.ndim != 2 or table.shape[1] != len(FEATURES):
            raise ValueError(f"table: expected [n, {len(FEATURES)}], got {list(table.shape)}")
        return self.slope * self.trees.log_odds(table) + self.offset

    def probability(self, table: np.ndarray) -> np.ndarray:
        """Returns the [n] float32 probability of a match; takes what `log_odds` takes."""
        return sigmoid(self.log_odds(table)).astype(np.float32)

    def threshold(self, precision: float) -> float:
        """Returns the least probability from which on unlabelled pairs are matches that often.

        That is by verdicts that the trees were not fitted to. Raises UserError if it is not reached
        by the pairs of any ten verdicts.
        """
        enough = np.arange(1, len(self.least) + 1) >= _LEAST_ABOVE
        # Of equal probabilities all count or none.
        last = np.append(self.least[1:] < self.least[:-1], True)
        reached = np.flatnonzero(last & enough & (self.precision >= precision))
        if not len(reached):
            best = self.precision[last & enough].max(initial=0)
            raise UserError(
                f"the fitted detector reaches a precision of {best:.3f} at most, not "
                f"{precision:g}; ask for less, or gather more verdicts"
            )
        return float(self.least[reached[-1]])


def fit(
    table: np.ndarray,
    is_match: np.ndarray,
    weight: np.ndarray,
    seed: int,
    about: Mapping[str, Any] | None = None,
) -> FittedDetector:
    """Returns a detector fitted to verdicts.

    Args:
      table: [n, features] float32, what `features` returned of the pairs.
      is_match: [n] bool, the verdicts; those who were unsure are left out before.
      weight: [n] floats, the inverse of the probability with which each pair was drawn; NaN for a
        pair that no random sample drew, which the trees are fitted to, but nothing is measured by.
      seed: The seed of the folds.
      about: What to keep in the detector's `about`.

    Raises:
      UserError: if there are too few verdicts of either kind, or scikit-learn is not installed.
      ValueError: if shapes do not fit.
    """
    is_match, weight = np.asarray(is_match, bool), np.asarray(weight, float)
    if table.shape != (len(is_match), len(FEATURES)) or weight.shape != is_match.shape:
        raise ValueError(
            f"expected a table [n, {len(FEATURES)}], n verdicts and n weights, got "
            f"{list(table.shape)}, {list(is_match.shape)} and {list(weight.shape)}"
        )
    drawn = np.isfinite(weight)
    for kind, found in (("matches", is_match), ("refuted pairs", ~is_match)):
        if (found & drawn).sum() < LEAST_VERDICTS:
            raise UserError(
                f"{(found & drawn).sum()} {kind} among {drawn.sum()} verdicts on random samples, "
                f"{len(is_match)} in all; a detector is fitted to at least {LEAST_VERDICTS} of "
                "either: judge more of `review --sample`"
            )
    fold = _folds(is_match, np.random.default_rng(seed))
    log_odds = np.empty(len(table))
    for number in range(_FOLDS):
        held_out = fold == number
        trees = _fit_trees(table[~held_out], is_match[~held_out])
        log_odds[held_out] = trees.log_odds(table[held_out])
    log_odds, is_drawn_match, weight = log_odds[drawn], is_match[drawn], weight[drawn]
    slope, offset = _calibration(log_odds, is_drawn_match, weight)
    unseen = slope * log_odds + offset
    counts = {"verdicts": len(is_match), "matches": int(is_match.sum()), "drawn": int(drawn.sum())}
    return FittedDetector(
        _fit_trees(table, is_match),
        slope,
        offset,
        *_precision_and_recall(sigmoid(unseen), is_drawn_match, weight),
        log_loss=float(
            np.average(np.logaddexp(0, unseen) - is_drawn_match * unseen, weights=weight)
        ),
        about={**(about or {}), **counts, "seed": seed},
    )


def _folds(is_match, rng):
    """Returns [n] the fold of each verdict; each has its share of the matches."""
    order = rng.permutation(len(is_match))
    order = order[np.argsort(is_match[order], kind="stable")]
    fold = np.empty(len(is_match), int)
    fold[order] = np.arange(len(is_match)) % _FOLDS
    return fold


def _fit_trees(table, is_match):
    with needs_extra("fitted", "fitting a detector"):
        from sklearn.ensemble import HistGradientBoostingClassifier
    model = HistGradientBoostingClassifier(**_TREES, monotonic_cst=list(FEATURES.values()))
    return Trees.of(model.fit(table, is_match))


def _calibration(log_odds, is_match, weight):
    """Returns the slope and offset of log odds by which weighted verdicts are most likely.

    Platt's scaling, with a weak pull towards leaving the log odds as they are, by Newton's method.
    """
    weight = weight / weight.sum() * len(weight)
    design = np.stack([log_odds, np.ones_like(log_odds)], axis=1)
    start = value = np.array([1.0, 0.0])
    pull = np.array([1.0, 0.01])
    for _ in range(50):
        expected = sigmoid(design @ value)
        gradient = design.T @ (weight * (expected - is_match)) + pull * (value - start)
        curvature = (design.T * (weight * expected * (1 - expected))) @ design + np.diag(pull)
        step = np.linalg.solve(curvature, gradient)
        value = value - step / max(1.0, np.abs(step).max())
    return max(float(value[0]), 1e-3), float(value[1])


def _precision_and_recall(probability, is_match, weight):
    order = np.argsort(-probability, kind="stable")
    found = np.cumsum((weight * is_match)[order])
    return probability[order], found / np.cumsum(weight[order]), found / found[-1]


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Returns the probabilities of log odds."""
    return 0.5 * (1 + np.tanh(0.5 * log_odds))


def write(path: pathlib.Path, detector: FittedDetector) -> None:
    """Writes a detector as JSON, whole or not at all.

    Raises UserError if the file cannot be written.
    """
    values = {
        "format": _FORMAT,
        "about": dict(detector.about),
        "features": list(FEATURES),
        "slope": detector.slope,
        "offset": detector.offset,
        "log_loss": detector.log_loss,
        "baseline": detector.trees.baseline,
    }
    for owner, names in ((detector, _TABLE), (detector.trees, _ARRAYS)):
        values |= {name: getattr(owner, name).tolist() for name in names}
    with as_user_error(f"{path}: cannot be written"):
        write_atomically(path, json.dumps(values) + "\n")


# What a file that is no detector may raise.
_MALFORMED = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
_NUMBERS = ("slope", "offset", "log_loss", "baseline")
_TABLE = ("least", "precision", "recall")
_ARRAYS = {"feature": np.int64, "threshold": np.float64, "left": np.uint8, "value": np.float64}


def read(path: pathlib.Path) -> FittedDetector:
    """Returns the detector that a file holds.

    Raises UserError, naming the file, if it cannot be read, or is not what `write` writes.
    """
    with as_user_error(f"{path}: cannot be read"):
        content = path.read_bytes()
    with as_user_error(f"{path}: not a fitted detector", errors=_MALFORMED):
        values = json.loads(content)
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"it has no format {_FORMAT!r}")
        if values["features"] != list(FEATURES):
            raise ValueError(f"its features are {values['features']}; fit it again")
        arrays = {name: np.array(values[name], kind) for name, kind in _ARRAYS.items()}
        for name, array in arrays.items():
            if array.shape != (len(arrays["feature"]), _LEAVES - (name != "value")):
                raise ValueError(f"{name} is of the shape {list(array.shape)}")
        if not np.isin(arrays["feature"], np.arange(len(FEATURES))).all():
            raise ValueError(f"feature {arrays['feature'].max()} is none of its features")
        table = {name: np.array(values[name], float) for name in _TABLE}
        for name, array in table.items():
            if array.shape != (len(table["least"]),):
                raise ValueError(f"{name} is of the shape {list(array.shape)}")
        numbers = {name: float(values[name]) for name in _NUMBERS}
        for name, array in {**numbers, **table, "value": arrays["value"]}.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a non-finite number")
        if numbers["slope"] <= 0 or np.isnan(arrays["threshold"]).any():
            raise ValueError("slope or threshold is out of its range")
        return FittedDetector(
            Trees(**arrays, baseline=numbers["baseline"]),
            numbers["slope"],
            numbers["offset"],
            *table.values(),
            log_loss=numbers["log_loss"],
            about=dict(values["about"]),
        )
