"""Matrix products that a training step cannot do without, whatever program computes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from fne_jax.encoders.freezing import is_frozen_below
from fne_jax.encoders.rematerialization import NONE
from fne_jax.model.kept_features import kept_towers
from fne_jax.model.model import Model, initial_params
from fne_jax.objectives.registry import uses_keys


def useful_flops(model: Model) -> int:
    """Returns the useful operations on one pair, its caption of full length.

    What is frozen runs forwards once, or not at all where its output is kept.
    """
    config, module = model.config, plain(model.module)
    side, tokens = config.encoder.image.image_size, (1, config.data.text_length)
    shapes = ((1, side, side, 3), jnp.float32), (tokens, jnp.int32), (tokens, jnp.int32)
    pixels, *texts = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    params, _ = jax.eval_shape(lambda: initial_params(module, config, jax.random.key(0)))

    def forward(*inputs, method=None):
        run = functools.partial(module.apply, method=method)
        return matrix_flops(run, {"params": params}, *inputs)

    frozen = {
        tower: forward(*own, method=f"frozen_{tower}")
        for tower, own in (("image", [pixels]), ("text", texts))
        if is_frozen_below(module, tower)
    }
    kept = kept_towers(module, config, training=True)
    once = sum(flops for tower, flops in frozen.items() if tower not in kept)
    # The online encoders' forward, twice as much backward, and the momentum encoders' forward.
    passes = 3 + uses_keys(config)
    return passes * (forward(pixels, *texts) - sum(frozen.values())) + once


def plain(module: nn.Module) -> nn.Module:
    """Returns a `DualEncoder` with products that can be counted, and nothing computed again."""
    options = {"attention": "xla", "remat": NONE}  # neither padded nor hidden in a kernel
    return module.clone(image=module.image.clone(**options), text=module.text.clone(**options))


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the operations of the matrix products of a function as it is traced.

    A multiplication and an addition are two operations. What only the compiled program adds, such
    as padding, is not among them. A loop counts as often as it runs, and of a choice the largest
    branch.

    Raises ValueError if it holds a loop of unknown length, or a kernel of its own.
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
