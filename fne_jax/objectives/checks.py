"""Argument checks of the objectives: shapes, dtypes and ranges, at no cost after tracing."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` is an array of the expected shape."""
    _is_array(name, array)
    if jnp.shape(array) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {jnp.shape(array)}")


def embeddings(**arrays: jax.Array) -> tuple[int, int]:
    """Returns the [batch, dim] shape that all the named float arrays share.

    Raises ValueError if one is not a float matrix, has no rows, or is not shaped as the first.
    """
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        _is_array(name, array)
        dtype = jnp.result_type(array)
        if jnp.ndim(array) != 2:
            raise ValueError(f"{name}: expected shape [batch, dim], got {jnp.shape(array)}")
        if not len(array):
            raise ValueError(f"{name}: expected at least one row, got none")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}: expected a float dtype, got {dtype}")
        if jnp.shape(array) != jnp.shape(first):
            raise ValueError(
                f"{name}: expected shape {jnp.shape(first)} as {first_name} has, "
                f"got {jnp.shape(array)}"
            )
    batch, dim = jnp.shape(first)
    return batch, dim


def ids(name: str, array: jax.Array, count: int) -> None:
    """Raises ValueError unless `array` holds `count` integers that int32 can hold."""
    shape(name, array, (count,))
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise ValueError(f"{name}: expected an integer dtype, got {jnp.result_type(array)}")
    fit_int32(name, array)


def fit_int32(name: str, array: jax.Array | np.ndarray | None) -> None:
    """Raises ValueError if JAX would cut integers of NumPy to other ones, which may be equal."""
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.dtype.itemsize >= 4:
        bad = array[(array < -(2**31)) | (array >= 2**31)]
        if bad.size:
            raise ValueError(
                f"{name}: expected integers that int32 can hold, got {bad[0]}; number them anew, "
                "as numpy.unique(..., return_inverse=True) does"
            )


def mask(name: str, array: jax.Array, expected: tuple[int, ...] | None = None) -> None:
    """Raises ValueError unless `array` is bool, and of the expected shape if there is one.

    `~` of a 0 or 1 that is an integer is true either way.
    """
    shape(name, array, jnp.shape(array) if expected is None else expected)
    if jnp.result_type(array) != jnp.bool_:
        raise ValueError(f"{name}: expected a bool dtype, got {jnp.result_type(array)}")


def _is_array(name, array):
    if isinstance(array, list | tuple):
        raise ValueError(f"{name}: expected an array, got a {type(array).__name__}")


def in_range(
    name: str,
    value: float | jax.Array,
    low: float,
    high: float = float("inf"),
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises ValueError unless a number lies between two bounds; a traced one passes."""
    if isinstance(value, jax.core.Tracer):
        return
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{name}: expected a number in {left}{low}, {high}{right}, got {value}")
