"""Matrix products that a training step cannot do without, whatever program computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Forward passes' worth of work on a pair by what is trained: the online encoders' forward, twice as
# much backward, and the momentum encoders' forward.
PASSES = 4


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the operations of the matrix products of a function as it is traced.

    A multiplication and an addition are two operations. What only the compiled program adds, such
    as padding, is not among them. A loop counts as often as it runs, and of a choice the largest
    branch.

    Args:
      function: A function of arrays that can be traced.
      *arguments: Arrays, or their shapes and dtypes.

    Raises:
      ValueError: if it holds a loop of unknown length, or a kernel of its own.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
        window = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # without the output's features
        return 2 * equation.outvars[0].aval.size * window
    if name in ("while", "pallas_call"):
        raise ValueError(f"the operations of a {name} are not known before it runs")
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in parameters["branches"])
    times = parameters["length"] if name == "scan" else 1
    inner = (value for value in parameters.values() if isinstance(value, (ClosedJaxpr, Jaxpr)))
    return times * sum(_flops(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in inner)
