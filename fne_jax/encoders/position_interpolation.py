"""Position embeddings of an image tower for another image size, as ViT's fine-tuning makes them."""

from __future__ import annotations

import numpy as np

# The parameter of PyTorch's cubic convolution, by which position embeddings are interpolated.
_CUBIC = -0.75


def resize_positions(positions: np.ndarray, old: int, new: int) -> np.ndarray:
    """Returns position embeddings for a grid of new x new patches, interpolated bicubically.

    Args:
      positions: [1, tokens, width] float32; tokens before the last old x old stay as they are.
      old: Number of patches along a side.
      new: Number of patches along a side of the result.
    """
    before = positions.shape[1] - old**2
    grid = positions[0, before:].reshape(old, old, -1)
    matrix = _cubic_matrix(old, new)
    grid = np.einsum("yi,xj,ijd->yxd", matrix, matrix, grid, optimize=True)
    return np.concatenate(
        [positions[:, :before], grid.reshape(1, new**2, -1).astype(np.float32)], axis=1
    )


def _cubic_matrix(old: int, new: int) -> np.ndarray:
    """Returns the [new, old] weights of cubic convolution along one axis, without antialiasing.

    Points are at the centres of equal cells; beyond the ends the outermost point is repeated.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(place).astype(int) + tap
        far = np.abs(place - index)
        near_weight = (_CUBIC + 2) * far**3 - (_CUBIC + 3) * far**2 + 1
        far_weight = _CUBIC * (far**3 - 5 * far**2 + 8 * far - 4)
        weight = np.where(far <= 1, near_weight, far_weight)
        np.add.at(matrix, (np.arange(new), np.clip(index, 0, old - 1)), weight)
    return matrix
