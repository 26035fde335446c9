"""A posterior from samples of a score, without a label: Bayes' rule over two distributions.

The density of the score among matches, and that among all unlabelled pairs, matches or not, give
P(match | score) = prior * density among matches / density among all. Nothing is assumed of the two
distributions' shapes but that a higher score is no evidence against a match: their ratio is the
isotonic regression of which sample a score comes from.

In 1,000 random pairs, of which a tenth match, scores of 0.9 come as often as a tenth of matches
with that score explains, and a few more; lower ones far more often:

>>> import numpy as np
>>> matches = np.repeat([0.1, 0.5, 0.9], [5, 15, 80])
>>> random_pairs = np.repeat([0.1, 0.5, 0.9], [700, 200, 100])
>>> posterior = MonotonePosterior.fit(matches, random_pairs, prior=0.1)
>>> print(np.round(posterior(np.array([0.1, 0.5, 0.9])), 3))
[0.008 0.074 0.785]
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import optimize


@dataclasses.dataclass(frozen=True)
class MonotonePosterior:
    """The probability of a match as a step function of a score that never falls.

    Attributes:
      score: [steps] float64, where each step begins, rising; the first holds below its own, too.
      probability: [steps] float64 of a match, never falling.
    """

    score: np.ndarray
    probability: np.ndarray

    @classmethod
    def fit(cls, matches: np.ndarray, all_pairs: np.ndarray, prior: float) -> MonotonePosterior:
        """Returns the posterior that two samples of a score give.

        One more of either sample stands at the end that speaks against it, so that a score beyond
        all of a small sample is no certainty.

        Args:
          matches: [n] scores of pairs that match, at least one.
          all_pairs: [m] scores of unlabelled pairs, matches among them in their share, at least
            one.
          prior: That share, in (0, 1).

        Raises ValueError if a sample is empty or not finite, or the prior is outside (0, 1).
        """
        for name, sample in (("matches", matches), ("all_pairs", all_pairs)):
            if np.ndim(sample) != 1 or not len(sample) or not np.isfinite(sample).all():
                raise ValueError(f"{name}: expected finite scores [n], at least one")
        if not 0 < prior < 1:
            raise ValueError(f"prior: expected a number in (0, 1), got {prior}")
        low = min(np.min(matches), np.min(all_pairs))
        high = max(np.max(matches), np.max(all_pairs))
        matches, all_pairs = np.append(matches, low), np.append(all_pairs, high)
        score, step = np.unique(np.concatenate([matches, all_pairs]), return_inverse=True)
        # Each sample weighs 1 in all, whatever its size.
        of_matches = np.bincount(step[: len(matches)], minlength=len(score)) / len(matches)
        of_all = np.bincount(step[len(matches) :], minlength=len(score)) / len(all_pairs)
        weight = of_matches + of_all
        share = optimize.isotonic_regression(of_matches / weight, weights=weight).x
        begins = np.append(True, share[1:] > share[:-1])
        share = share[begins]
        # The odds of the two samples are the ratio of their densities.
        ratio = share / np.maximum(1 - share, 1e-12)
        return cls(score[begins], np.minimum(prior * ratio, 1.0))

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Returns the float32 probability of a match for scores of any shape."""
        step = np.searchsorted(self.score, score, side="right") - 1
        return self.probability[np.maximum(step, 0)].astype(np.float32)
