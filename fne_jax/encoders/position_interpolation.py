"""Position embeddings of an image tower for another image size, as its fine-tuning makes them."""

from __future__ import annotations

import numpy as np

# The parameters of PyTorch's cubic convolutions, without and with antialiasing.
_CUBIC, _ANTIALIASED_CUBIC = -0.75, -0.5


def resize_positions(
    positions: np.ndarray, old: int, new: int, *, antialias: bool = False
) -> np.ndarray:
    """Returns position embeddings for a grid of new x new patches, interpolated bicubically.

    They are [1, tokens, width] float32; tokens before the last old x old stay as they are. With
    `antialias` the kernel widens where the grid shrinks.
    """
    before = positions.shape[1] - old**2
    grid = positions[0, before:].reshape(old, old, -1)
    matrix = _matrix(old, new, antialias)
    grid = np.einsum("yi,xj,ijd->yxd", matrix, matrix, grid, optimize=True)
    return np.concatenate(
        [positions[:, :before], grid.reshape(1, new**2, -1).astype(np.float32)], axis=1
    )


def _matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Returns the [new, old] weights of cubic convolution along one axis.

    Points are at the centres of equal cells. Beyond the ends the outermost point is repeated; with
    antialiasing there are none.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    index = np.arange(-2, old + 2)
    distance = place[:, None] - index
    if antialias:
        within = _cubic(distance / max(old / new, 1), _ANTIALIASED_CUBIC)[:, 2:-2]
        return within / within.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (slice(None), np.clip(index, 0, old - 1)), _cubic(distance, _CUBIC))
    return matrix


def _cubic(distance: np.ndarray, parameter: float) -> np.ndarray:
    """Returns the cubic convolution kernel, which is 0 from a distance of 2 on."""
    far = np.abs(distance)
    near_weight = (parameter + 2) * far**3 - (parameter + 3) * far**2 + 1
    far_weight = parameter * (far**3 - 5 * far**2 + 8 * far - 4)
    return np.where(far <= 1, near_weight, np.where(far < 2, far_weight, 0.0))
