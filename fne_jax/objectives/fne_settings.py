"""The constants of False Negative Elimination, as one value."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fne_jax.errors import UserError
from fne_jax.objectives import checks
from fne_jax.objectives.key_blocks import BLOCK

if TYPE_CHECKING:  # the losses alone need no config
    import ml_collections

# Keyword arguments of the public functions whose names have changed; the old ones still work.
RENAMED = {"decay": "tau", "elimination_decay": "elimination_tau"}

# What `config.fne.elimination` may be.
ELIMINATIONS = ("soft", "hard", "none")

# exp(-1e30 P) is 0 in float32 for every posterior P that is worth the name.
_NEVER_SAMPLED_TAU = 1e30


@dataclasses.dataclass(frozen=True)
class FNESettings:
    """How candidates are weighed and the triplet loss is formed; the defaults are the paper's.

    Attributes:
      margin: Similarity by which the positive should win, at least 0.
      tau: Strength of the cut-down weight `exp(-tau (s - d)^2)`, at least 0; 0 makes all ordinary
        candidates equal.
      elimination_tau: Strength of the elimination weight `exp(-elimination_tau P)`, at least 0;
        None takes `tau`, as the paper does. A very large number removes the suspected altogether.
      prior: Share of candidates that are unlabelled matches, in (0, 1).
      posterior_threshold: Posterior above which a candidate is suspected, in [0, 1]; 1 suspects
        none.
      min_count: Positive similarities that must have been seen before anything is suspected.
      monotone: Whether the posterior is held where the authors' formula would fall as similarity
        rises.
      key_chunk: Keys of the queue that are scored at a time, a multiple of 16, so that scratch
        memory is O(batch * key_chunk) rather than O(batch * keys); None scores all at once.

    Raises:
      ValueError: if a number is out of its range.
    """

    margin: float = 0.2
    tau: float = 0.5
    elimination_tau: float | None = None
    prior: float = 1e-4
    posterior_threshold: float = 1e-3
    min_count: int = 200
    monotone: bool = False
    key_chunk: int | None = None

    def __post_init__(self):
        checks.in_range("margin", self.margin, 0)
        checks.in_range("tau", self.tau, 0)
        if self.elimination_tau is not None:
            checks.in_range("elimination_tau", self.elimination_tau, 0)
        checks.in_range("prior", self.prior, 0, 1, low_open=True, high_open=True)
        checks.in_range("posterior_threshold", self.posterior_threshold, 0, 1)
        checks.in_range("min_count", self.min_count, 0)
        if self.key_chunk is not None and (self.key_chunk < BLOCK or self.key_chunk % BLOCK):
            raise ValueError(
                f"key_chunk: expected a multiple of {BLOCK} or None, got {self.key_chunk}"
            )

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> FNESettings:
        """Returns the settings that a public function was called with.

        Args:
          keywords: fields by name; `decay` and `elimination_decay`, the old names of `tau` and
            `elimination_tau`, are taken with a DeprecationWarning.

        Raises:
          TypeError: if a name is unknown, or given under its old and its new name.
          ValueError: if a number is out of its range.
        """
        keywords = dict(keywords)
        for old, new in RENAMED.items():
            if old not in keywords:
                continue
            if new in keywords:
                raise TypeError(f"{old} is the old name of {new}; give {new} alone")
            # The caller's caller: the line that calls the public function.
            warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=3)
            keywords[new] = keywords.pop(old)
        return cls(**keywords)

    @classmethod
    def from_config(cls, fne: ml_collections.ConfigDict) -> FNESettings:
        """Returns the settings of `config.fne`, its parts switched on or off as it says.

        Raises:
          UserError: if `config.fne.elimination` is unknown.
          ValueError: if a number is out of its range.
        """
        check_elimination(fne)
        return cls(
            margin=fne.margin,
            tau=fne.tau if fne.cut_down else 0.0,
            elimination_tau=(
                _NEVER_SAMPLED_TAU if fne.elimination == "hard" else fne.elimination_tau or fne.tau
            ),
            prior=fne.prior,
            posterior_threshold=1.0 if fne.elimination == "none" else fne.posterior_threshold,
            min_count=fne.min_count,
            monotone=fne.monotone,
            key_chunk=fne.key_chunk or None,
        )


def check_elimination(fne: ml_collections.ConfigDict) -> None:
    """Raises UserError unless `config.fne.elimination` is one of `ELIMINATIONS`."""
    if fne.elimination not in ELIMINATIONS:
        raise UserError(
            f"config.fne.elimination is {fne.elimination!r}; expected one of "
            f"{', '.join(ELIMINATIONS)}"
        )
