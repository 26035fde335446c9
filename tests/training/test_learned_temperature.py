"""A temperature and a bias that are learned: gradients, bounds, and where they are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from fne_jax import configuration
from fne_jax.data.batches import training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from fne_jax.model import model as model_lib
from fne_jax.model.model import build_model, load_workdir
from fne_jax.objectives import registry
from fne_jax.objectives.learned_scalars import (
    BIAS_CHANGE,
    LEARNED,
    LOG_TEMPERATURE_FACTOR,
    initial,
)
from fne_jax.parallel import sharding
from fne_jax.training import loop, setup
from fne_jax.training.optimizer import build_optimizer
from fne_jax.training.train_state import abstract_state, find_source_run, first_state
from tests.support.fne import make_batch
from tests.support.runs import mesh_of, new_state, stored_state, training_of
from tests.support.tiny import LinearTowers, tiny_config

LEARNING = {"objective__learn_temperature": True}


def run_steps(config, mesh, steps=9):
    """Returns the states after each step and their scalars; the warm-up has 7 steps."""
    train = load_split(config.data, 8, "train")
    order = setup.batch_order(config, train)
    tokens = np.arange(len(train.captions), dtype=np.int32)[:, None] + np.arange(8, dtype=np.int32)
    training = training_of(config, LinearTowers(), mesh, order.steps_per_epoch)
    state = new_state(training)
    batches = training_batches(
        train,
        (tokens % 30, np.ones_like(tokens)),
        order.rows(range(steps)),
        TrainingImages(8, config.data.augmentation, config.seed),
    )
    states = []
    for step, batch in enumerate(batches):
        phase = training.timeline.phase(step)
        state, scalars, _ = training.steps[phase](state, sharding.to_devices(batch, mesh))
        states.append(jax.device_get((state.params, scalars)))
    return states


@pytest.fixture(scope="module")
def learning():
    return run_steps(tiny_config(objective__name="sigmoid", **LEARNING), mesh_of(1))


@pytest.mark.parametrize("name", ["infonce", "clip", "multi_positive", "sigmoid"])
def test_the_loss_is_that_of_the_temperature_and_bias_by_now(name):
    config = base.get_config()
    fields = {"objective.name": name, "objective.temperature": 0.2, "objective.bias": -3.0}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    features, queue = make_batch(0)
    learned = {LOG_TEMPERATURE_FACTOR: jnp.log(1.5), BIAS_CHANGE: jnp.float32(0.25)}
    objective = registry.main_objective(config)

    def loss_of(learned):
        return objective(features.replace(learned=learned), queue, None, None)[0]

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(learned)
    with config.unlocked():
        config.update({"objective": {"temperature": 0.3, "bias": -2.75}})
    fixed = registry.main_objective(config)(features, queue, None, None)[0]
    np.testing.assert_allclose(loss, fixed, rtol=1e-5)
    assert grads[LOG_TEMPERATURE_FACTOR] != 0
    assert (grads[BIAS_CHANGE] != 0) == (name == "sigmoid")


def test_steps_learn_after_the_warm_up(learning):
    for params, scalars in learning[:7]:
        assert not any(jax.tree.leaves(params[LEARNED]))
        assert scalars["temperature_factor"] == 1 and scalars["bias_change"] == 0
    params, scalars = learning[-1]
    assert all(abs(leaf) > 1e-4 for leaf in jax.tree.leaves(params[LEARNED]))
    expected = np.exp(params[LEARNED][LOG_TEMPERATURE_FACTOR])
    np.testing.assert_allclose(scalars["temperature_factor"], expected, rtol=1e-6)


@pytest.mark.parametrize(("parts", "data", "fsdp"), [(1, 4, 2), (2, 1, 1)])
def test_devices_and_micro_batches_learn_the_same(learning, parts, data, fsdp):
    config = tiny_config(objective__name="sigmoid", micro_batches=parts, **LEARNING)
    other = run_steps(config, mesh_of(data, fsdp))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        other[-1][0][LEARNED],
        learning[-1][0][LEARNED],
    )


def test_the_temperature_stays_within_its_bounds_and_is_not_decayed():
    optimizer = tiny_config(optimizer__weight_decay=0.1).optimizer
    tx = build_optimizer(optimizer, optax.constant_schedule(1.0), None, 0.07)
    params = {"image": {"kernel": jnp.ones((2, 2))}, **initial()}
    for sign, expected in ((1, 0.01), (-1, 1.0)):
        state, moved = tx.init(params), params
        for _ in range(6):
            gradients = jax.tree.map(jnp.zeros_like, params)
            gradients[LEARNED][LOG_TEMPERATURE_FACTOR] = jnp.float32(sign)
            updates, state = tx.update(gradients, state, moved)
            moved = optax.apply_updates(moved, updates)
        temperature = 0.07 * np.exp(moved[LEARNED][LOG_TEMPERATURE_FACTOR])
        np.testing.assert_allclose(temperature, expected, rtol=1e-5)
        assert moved[LEARNED][BIAS_CHANGE] == 0 and (moved["image"]["kernel"] < 1).all()
    params[LEARNED][BIAS_CHANGE] = jnp.float32(5.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates[LEARNED][BIAS_CHANGE] == 0


def test_a_start_out_of_bounds_is_refused():
    config = tiny_config()
    with config.unlocked():
        config.objective.update(learn_temperature=True, temperature=3.0)
    with pytest.raises(UserError, match=r"config.objective.temperature is 3.0; with learn_"):
        configuration.validate(config)


@pytest.mark.slow
def test_runs_keep_what_they_learned_and_hand_on_the_towers_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(model_lib, "build_module", lambda *arguments: LinearTowers())
    whole, parts, fixed = (tmp_path / name for name in ("whole", "parts", "fixed"))
    config = tiny_config(objective__name="clip", num_epochs=1.5, **LEARNING)
    loop.train_and_evaluate(config, whole)
    loop.train_and_evaluate(config, parts, warmup_only=True)
    loop.train_and_evaluate(config, parts)
    ours, theirs = (stored_state(folder) for folder in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    learned = ours.params[LEARNED]
    assert learned[LOG_TEMPERATURE_FACTOR] != 0
    model = load_workdir(whole, "latest")
    assert model.params[LEARNED] == learned
    assert model.embed_split(model.load_split("val")).image_emb.shape == (60, 16)

    # From there without a temperature of its own, and back.
    for source, fields in ((whole, {}), (fixed, LEARNING)):
        config = tiny_config(objective__name="clip", init_from=str(source), **fields)
        model = build_model(config, {}, None, mesh_of(1), module=LinearTowers())
        like = abstract_state(model, optax.constant_schedule(0.1))
        assert find_source_run(model, like)[0] == source
        state = first_state(model, like)
        expected = stored_state(source, "best")
        for name in ("params", "momentum_params"):
            values = getattr(state, name)
            assert (LEARNED in values) == bool(fields)
            for tower in ("image", "text"):
                stored = getattr(expected, name)[tower]
                jax.tree.map(np.testing.assert_array_equal, values[tower], stored)
            assert not any(jax.tree.leaves(values.get(LEARNED, {})))
        if source is whole:
            begun = tiny_config(objective__name="clip", num_epochs=1.0)
            loop.train_and_evaluate(begun, fixed)
