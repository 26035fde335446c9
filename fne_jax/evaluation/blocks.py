"""Similarities of many rows to many others, computed block by block.

A block of rows is compared with everything at once, so that the whole matrix is never held. All
that ranks, lists or searches by similarity goes through `by_blocks`, but for `ranks`, which needs
each similarity for both directions and so walks over tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Rows whose similarities to everything are held at once.
BLOCK_ROWS = 256


def by_blocks(rows: int, compute: Callable[[slice], Any]) -> Any:
    """Returns what a function computes of each block of rows, joined along the first axis.

    Args:
      rows: number of all rows, at least 1.
      compute: takes the slice of a block's rows, and returns an array of as many rows or a pytree
        of such arrays.

    Returns:
      The arrays on the host, in the function's structure, each [rows, ...].
    """
    blocks = [
        jax.device_get(compute(slice(start, min(start + BLOCK_ROWS, rows))))
        for start in range(0, rows, BLOCK_ROWS)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
