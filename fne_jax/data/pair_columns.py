"""Pairs of a caption and an image, and what is known of each, column by column."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from fne_jax.data.identity import DatasetIdentity


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a caption and an image of a split; a column that nobody asked for is None.

    Attributes:
      caption: [pairs] int row of each pair's caption.
      image: [pairs] int row of each pair's image.
      similarity: [pairs] float32 cosine of the two by a model.
      probability: [pairs] float32 that the two match, by a detector.
      score: [pairs] float32 by which a detector ranks them; the detector says what it is.
      nearest: [pairs] int64, the image's own caption that the detector goes by, or -1.
      is_match: [pairs] bool, whether most reviewers say that they match.
      weight: [pairs] float64, how many unlabelled pairs each stands for in a random sample: the
        inverse of the probability with which that drew it; NaN where none did.
      sample: [pairs] the name of that sample, or "".
    """

    caption: np.ndarray
    image: np.ndarray
    similarity: np.ndarray | None = None
    probability: np.ndarray | None = None
    score: np.ndarray | None = None
    nearest: np.ndarray | None = None
    is_match: np.ndarray | None = None
    weight: np.ndarray | None = None
    sample: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.caption)

    def __getitem__(self, index: slice | np.ndarray) -> Pairs:
        """Returns the pairs of a slice, a mask or an order."""
        return Pairs(
            **{name: None if one is None else one[index] for name, one in vars(self).items()}
        )

    def replace(self, **columns: np.ndarray | None) -> Pairs:
        """Returns the pairs with other columns."""
        return dataclasses.replace(self, **columns)

    def heeding(self, said: Pairs, judge: Callable[[Pairs], Pairs]) -> tuple[Pairs, int]:
        """Returns the pairs as people's verdicts have them, and how many of them were refuted.

        Pairs that `said.is_match` refutes leave; those that it confirms and are missing here come
        last, their other columns filled by `judge`. `is_match` then tells which are confirmed.
        """
        width = 1 + max(one.image.max(initial=0) for one in (self, said))
        here, asked = (one.caption.astype(np.int64) * width + one.image for one in (self, said))
        kept = self[~np.isin(here, asked[~said.is_match])]
        _, first = np.unique(asked, return_index=True)
        more = said[first[said.is_match[first] & ~np.isin(asked[first], here)]]
        more = judge(Pairs(more.caption, more.image))
        joined = {
            name: np.concatenate([column, getattr(more, name)])
            for name, column in vars(kept).items()
            if column is not None
        }
        here = joined["caption"].astype(np.int64) * width + joined["image"]
        return Pairs(**joined, is_match=np.isin(here, asked[said.is_match])), len(self) - len(kept)

    def rows(self) -> list[tuple[int, int]]:
        """Returns the rows of caption and image of each pair."""
        return list(zip(self.caption.tolist(), self.image.tolist(), strict=True))

    @property
    def identity(self) -> DatasetIdentity:
        """What tells the pairs, and how likely each is, from others, in whatever order."""
        columns = [self.caption, self.image]
        if self.probability is not None:
            columns.append(self.probability)
        pairs = np.unique(np.stack([np.asarray(one, np.float64) for one in columns], 1), axis=0)
        checksum = hashlib.sha256(pairs.tobytes()).hexdigest()[:16]
        return DatasetIdentity(len(self), len(np.unique(self.image)), checksum)
