"""What a traced program holds."""

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(jaxpr, *names):
    """Yields the equations of some primitives, of a program and of all programs within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(inner, ClosedJaxpr):
                yield from equations(inner.jaxpr, *names)
            elif isinstance(inner, Jaxpr):
                yield from equations(inner, *names)
