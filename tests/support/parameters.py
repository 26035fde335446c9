"""Parameters for tests that compare ways of computing, whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn_parameters(module, *inputs, deviation=0.3):
    """Returns a module's parameters, all drawn at random, biases and norms included.

    A module's own `init` takes longer to compile than what most tests do with it.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, deviation, leaf.shape), jnp.float32), shapes
    )
