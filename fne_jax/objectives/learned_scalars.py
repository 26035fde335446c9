"""The temperature and the bias of a loss, learned beside the encoders.

They are parameters under a name of their own beside the two towers, so that they are trained and
stored as those are. Both are told relative to the config's numbers, so that they begin at 0
whatever these are: the logarithm of the factor on the temperature, and what is added to the bias.

>>> learned = initial()[LEARNED]
>>> round(float(temperature(0.07, learned)), 4), float(bias(-10.0, learned))
(0.07, -10.0)
>>> learned["log_temperature_factor"] += 0.5
>>> round(float(temperature(0.07, learned)), 4)
0.1154
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# The name among the parameters.
LEARNED = "objective"
LOG_TEMPERATURE_FACTOR = "log_temperature_factor"
BIAS_CHANGE = "bias_change"
# A learned temperature stays within these: logits of cosines are scaled by at most 100, as in CLIP
# (Radford et al., arXiv 2103.00020, section 2.5), and at least 1, as in open_clip.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 1.0
# The lowest for one that begins below: SigLIP does not bound its scale (Zhai et al., arXiv
# 2303.15343, algorithm 1), and published ones are 112 to 118. This only keeps a run from diverging.
LOWEST_UNCLIPPED = 0.001


def initial() -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters before training, to be added to those of the towers."""
    return {
        LEARNED: {
            LOG_TEMPERATURE_FACTOR: jnp.zeros((), jnp.float32),
            BIAS_CHANGE: jnp.zeros((), jnp.float32),
        }
    }


def towers_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters without those that the objective learns."""
    return {name: part for name, part in params.items() if name != LEARNED}


def temperature(
    start: float | jax.Array, learned: Mapping[str, jax.Array] | None
) -> float | jax.Array:
    """Returns the temperature by now, of the one that it began at; that itself if it is fixed."""
    if learned is None:
        return start
    return start * jnp.exp(learned[LOG_TEMPERATURE_FACTOR])


def bias(start: float | jax.Array, learned: Mapping[str, jax.Array] | None) -> float | jax.Array:
    """Returns the bias by now, of the one that it began at; that itself if it is fixed."""
    return start if learned is None else start + learned[BIAS_CHANGE]


def log_factor_bounds(start: float) -> tuple[float, float]:
    """Returns the least and the largest logarithm of the factor on a temperature."""
    # Files in half precision state CLIP's largest scale as up to 100.2.
    clipped = start > 0.99 * LOWEST_TEMPERATURE
    lowest = min(start, LOWEST_TEMPERATURE) if clipped else LOWEST_UNCLIPPED
    return math.log(lowest / start), math.log(HIGHEST_TEMPERATURE / start)
