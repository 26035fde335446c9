"""What each field of a config may be: mistakes are named, and all else builds."""

import contextlib
import functools
import math
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from fne_jax import configuration
from fne_jax.configuration.rules import FIELDS
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.parallel import sharding
from fne_jax.training.optimizer import build_optimizer, learning_rate_schedule
from fne_jax.training.setup import Training
from fne_jax.training.timeline import Timeline
from tests.support.tiny import tiny_config


def test_every_field_has_a_rule_and_every_rule_a_field():
    assert configuration.flatten(base.get_config()).keys() == FIELDS.keys()


def with_value(config, name, value):
    """Returns the config with a field's value, of whatever type, as an own config may set it."""
    config = config.copy_and_resolve_references()
    *groups, leaf = name.split(".")
    group = functools.reduce(lambda group, part: group[part], groups, config)
    with group.unlocked(), group.ignore_type():
        group[leaf] = value
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.image.heads", 0),
        ("encoder.text.layers", 0),
        ("encoder.projection_dim", -4),
        ("encoder.image.dropout", 1.5),
        ("encoder.text.pooling", "last"),
        ("encoder.compute_dtype", "float16"),
        ("encoder.attention", "flash"),
        ("encoder.remat", True),
        ("seed", 2**70),
        ("image_mean", (0.5,)),
        ("image_std", (0.0, 0.0, 0.0)),
        ("fne.posterior_threshold", 2.0),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.b1", 1.0),
        ("optimizer.b1", 0.99999999),
        ("optimizer.eps", 0.0),
        ("optimizer.warmup_epochs", -1.0),
        ("optimizer.step_epochs", 5.0),
        ("optimizer.schedule", "linear"),
        ("data.prefetch", -3),
        ("data.vocab_size", 3),
        ("data.text_length", 2),
        ("data.cache_dir", ""),
        ("init_from", "a\0b"),
        ("num_epochs", math.nan),
        ("num_epochs", math.inf),
        ("queue_size", 64.0),
        ("fne.monotone", 1),
        ("momentum", None),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_field(name, value):
    with pytest.raises(UserError, match=rf"^config.{name} is .*; expected "):
        configuration.resolve(with_value(tiny_config(), name, value))


def ends(rule):
    """Returns the least and the greatest number that a field may be, if it is a number."""
    return [value for value in rule.values if not isinstance(value, str)]


def test_no_number_that_is_allowed_takes_long():
    begun, timelines, refused = time.monotonic(), 0, set()
    for name, rule in FIELDS.items():
        for value in ends(rule):
            config = with_value(tiny_config(num_epochs=2e5), name, value)
            with contextlib.suppress(UserError):  # it does not fit to the others
                config, _ = configuration.resolve(config)
            try:
                timeline = Timeline.of(config, 10**4)
            except UserError as error:
                assert str(error).startswith(f"config.{name} is {float(value)}; with 10000 steps")
                refused.add((name, value))
                continue
            schedule = learning_rate_schedule(config.optimizer, 10**4, timeline.total_steps)
            assert timeline.validates(timeline.total_steps) and schedule(7) >= 0
            timelines += 1
    assert refused == {("num_epochs", 10**6), ("optimizer.warmup_epochs", 10**6)}
    assert timelines > 100 and time.monotonic() - begun < 60


def some_values(rule):
    """Returns values in, at, and beyond the ends of a rule, and of other types."""
    near = [x for end in ends(rule) for x in (end, end - 1, end + 1, end * 2, end / 2, -end)]
    names = [value for value in rule.values if isinstance(value, str)]
    numbers = [0, 1, -1, 2, 3, 7, 16, 10**30, 0.5, 1e-30, 1e300, math.nan, math.inf, *near]
    others = [True, False, None, "", "x", "a\0b", "~", (), (0.5,), (0.5,) * 3, (2.0,) * 3, ("x",)]
    return st.sampled_from([*numbers, *[round(v) for v in near], *names * 4, *others])


def builds(config):
    """Builds all that a run of a config compiles, without any array, at most so large."""
    sizes = config.encoder.image, config.encoder.text
    if config.encoder.image.image_size // config.encoder.image.patch_size > 2**9:
        return
    if max(tower.layers for tower in sizes) > 8:
        return
    module = build_module(config, {}, 30)
    mesh = sharding.create_mesh()
    model = build_model(config, {}, None, mesh, module=module)
    training = Training.of(model, 7)
    timeline = training.timeline
    schedule = learning_rate_schedule(config.optimizer, 7, timeline.total_steps)
    assert all(np.isfinite(schedule(step)) for step in (0, 1, timeline.total_steps))
    assert timeline.phase(0) and training.state.step.shape == ()


def refused_by_name_or_built(data):
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(some_values(FIELDS[name]))
    try:
        config, _ = configuration.resolve(with_value(tiny_config(), name, value))
        builds(config)
    except UserError as error:
        assert f"config.{name}" in str(error) or name.rpartition(".")[2] in str(error)
        assert "\n" not in str(error)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_value_is_refused_by_its_name_or_builds(data):
    refused_by_name_or_built(data)


@pytest.mark.slow
@hypothesis.settings(max_examples=600, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_six_hundred_values_are_refused_by_name_or_build(data):
    refused_by_name_or_built(data)


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "clip_norm"])
def test_no_allowed_optimizer_makes_weights_other_than_finite(name):
    # The guard of the train step looks at losses and gradients, not at what the update makes.
    optimizer = tiny_config().optimizer
    optimizer.update(learning_rate=1.0, clip_norm=1e6, eps=1e-20, b1=0.9999, b2=0.0)
    rule = FIELDS[f"optimizer.{name}"]
    for value in map(float, rule.values):
        optimizer[name] = value
        update = build_optimizer(optimizer, optax.constant_schedule(1.0), None)
        params = {"image": {"kernel": jnp.array([0.0, 1.0, -1e18, 1e-38])}}
        state = update.init(params)
        for gradient in (0.0, 1e-45, 1.0, 1e18, 0.0):
            grads = jax.tree.map(lambda leaf, g=gradient: jnp.full_like(leaf, g), params)
            changes, state = update.update(grads, state, params)
            params = optax.apply_updates(params, changes)
            assert np.isfinite(params["image"]["kernel"]).all(), (value, gradient)


def test_batches_that_the_devices_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"is 12, which the 8 devices do not divide; .* of 8$"):
        configuration.check_batches(tiny_config(global_batch_size=12), 8)
    with pytest.raises(UserError, match=r"in config.micro_batches=4 parts; .* of 32$"):
        configuration.check_batches(tiny_config(micro_batches=4), 8)


def test_captions_longer_than_the_text_encoder_takes_are_refused():
    with pytest.raises(UserError, match=r"data.text_length is 600, more than the 512 tokens that"):
        tiny_config(data__text_length=600)
