"""Batches that were not applied because their loss or gradient was no finite number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass
class BadSteps:
    """Counts them; stored with a checkpoint.

    Attributes:
      total: since the start of the run.
      in_a_row: since the last step that was applied.
    """

    total: int = 0
    in_a_row: int = 0

    @classmethod
    def of(cls, stored: Mapping[str, int] | None) -> BadSteps:
        """Returns the counts that `stored` gave, or none yet."""
        return cls(**(stored or {}))

    def stored(self) -> dict[str, int]:
        """Returns the counts as JSON can hold them."""
        return dataclasses.asdict(self)

    def add(self, applied: bool) -> None:
        """Counts a step."""
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1
