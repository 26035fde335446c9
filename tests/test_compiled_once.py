"""An equal program is compiled once, another one or one for other devices is not taken for it."""

import jax
import jax.numpy as jnp
import pytest

from tests import compiled_once


@pytest.fixture
def compilations(monkeypatch):
    """The names of the modules that reach XLA's compiler, none of them compiled before."""
    compile_it, seen = compiled_once._compile, []

    def noted(*arguments):
        seen.append(arguments[1].operation.attributes["sym_name"].value)
        return compile_it(*arguments)

    monkeypatch.setattr(compiled_once, "_compile", noted)
    monkeypatch.setattr(compiled_once, "_executables", {})
    return seen


def step_of(factor, on_step=None):
    """Returns a new jitted function, as every run makes them."""

    def step(x):
        if on_step:
            jax.debug.callback(on_step, x)
        return x * factor + 1

    return jax.jit(step)


def test_equal_programs_compile_once(compilations):
    x = jax.device_put(3.0)
    assert [step_of(2.0)(x), step_of(2.0)(x), step_of(2.0).lower(x).compile()(x)] == [7.0] * 3
    assert compilations.count("jit_step") == 1


def test_other_programs_shapes_devices_and_options_compile_anew(compilations):
    x, there = jax.device_put(3.0), jax.device_put(3.0, jax.devices()[1])
    vector = jax.device_put(jnp.arange(2.0))
    assert step_of(2.0)(x) == 7.0 and step_of(3.0)(x) == 10.0
    moved = step_of(2.0)(there)
    assert moved == 7.0 and moved.devices() == {jax.devices()[1]}
    assert step_of(2.0)(vector).tolist() == [1.0, 3.0]
    step_of(2.0).lower(x).compile(compiler_options={"xla_cpu_enable_fast_math": True})
    assert compilations.count("jit_step") == 5


def test_callbacks_are_each_their_own(compilations):
    first, second = [], []
    for seen in (first, second):
        step_of(2.0, lambda x, seen=seen: seen.append(float(x)))(jax.device_put(3.0))
    jax.effects_barrier()
    assert first == second == [3.0]
