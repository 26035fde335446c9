"""Many strings at the cost of their bytes, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Names(Sequence[str]):
    """Strings that lie one after the other in an array.

    >>> names = Names.of(["a dog", "", "a cat"])
    >>> names[2], len(names), names == ["a dog", "", "a cat"]
    ('a cat', 3, True)

    Args:
      text: [bytes] uint8, the strings in UTF-8; half characters, as file names may have, are kept.
      ends: [strings] int64, where each ends in it.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Returns the strings in memory."""
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]
        start = self.ends[row - 1] if row else 0
        return self.text[start : self.ends[row]].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        return list(self) == other

    __hash__ = None
