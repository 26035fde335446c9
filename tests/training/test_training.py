"""Steps, resumes and devices on a tiny run: what must agree does, to the bit where it can."""

import collections
import functools
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fne_jax import configuration
from fne_jax.data.batches import training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.errors import Interrupted, UserError
from fne_jax.model import model as model_lib
from fne_jax.model.model import load_workdir
from fne_jax.objectives.features import Features
from fne_jax.objectives.similarity_statistics import SimilarityStatistics, StatisticsRule
from fne_jax.objectives.triplet_loss import TripletAux
from fne_jax.parallel import sharding
from fne_jax.training import loop, metric_log, setup
from fne_jax.training.interruption import StopRequest
from fne_jax.training.metric_log import MetricLog, read_metrics
from fne_jax.training.optimizer import build_optimizer, learning_rate_schedule
from fne_jax.training.step_results import StepResults, true_false_negative_rates
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_step import _negative_pairs
from tests.support import TOP
from tests.support.runs import mesh_of, new_state, stored_state, training_of
from tests.support.tiny import LinearTowers, tiny_config

STEPS = 20


def run_steps(config, mesh, steps=STEPS, module=None):
    """Returns the state, the scalars and the chosen negatives of a few steps."""
    train = load_split(config.data, 8, "train")
    order = setup.batch_order(config, train)
    tokens = np.tile(np.arange(8, dtype=np.int32), (len(train.captions), 1))
    tokens = (tokens + np.arange(len(train.captions))[:, None]).astype(np.int32) % 30
    module = module or build_dual_encoder(config.encoder, 30)
    training = training_of(config, module, mesh, order.steps_per_epoch)
    state, jitted = new_state(training), training.steps
    scalars, negatives = [], []
    batches = training_batches(
        train,
        (tokens, np.ones_like(tokens)),
        order.rows(range(steps)),
        TrainingImages(8, config.data.augmentation, config.seed),
    )
    for step, batch in enumerate(batches):
        step_of_phase = jitted[training.timeline.phase(step)]
        state, values, chosen = step_of_phase(state, sharding.to_devices(batch, mesh))
        scalars.append(jax.device_get(values))
        negatives.append(jax.device_get(chosen))
    compiled = {phase: step._cache_size() for phase, step in jitted.items()}
    return (
        jax.device_get(state.replace(key=jax.random.key_data(state.key))),
        scalars,
        negatives,
        compiled,
    )


@pytest.fixture(scope="module")
def one_device():
    return run_steps(tiny_config(), mesh_of(1))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("data", "fsdp"), [slow(8, 1), slow(4, 2), (2, 4)])
def test_every_mesh_does_what_one_device_does(one_device, monkeypatch, data, fsdp):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    state, scalars, negatives, _ = run_steps(tiny_config(), mesh_of(data, fsdp))
    for ours, theirs in zip(scalars, one_device[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=3e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    for ours, theirs in zip(negatives, one_device[2], strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in ("image_id", "pair_id", "pointer"):
        np.testing.assert_array_equal(
            getattr(state.queue, name), getattr(one_device[0].queue, name)
        )
    for side in ("image", "text"):
        memory = getattr(one_device[0].queue, side)
        np.testing.assert_allclose(getattr(state.queue, side), memory, atol=5e-6)
    # Adam divides by the size of the gradient: where that is tiny, its last bits decide.
    for name, tolerance in (("params", 1e-3), ("momentum_params", 1e-4)):
        jax.tree.map(
            lambda a, b, atol=tolerance: np.testing.assert_allclose(a, b, atol=atol),
            getattr(state, name),
            getattr(one_device[0], name),
        )


def test_a_step_in_micro_batches_is_the_plain_step(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    towers = LinearTowers()
    _, expected, chosen, _ = run_steps(tiny_config(), mesh_of(1), 10, towers)
    _, scalars, negatives, _ = run_steps(tiny_config(micro_batches=2), mesh_of(2, 4), 10, towers)
    for step in range(10):
        for name, value in scalars[step].items():
            np.testing.assert_allclose(
                value, expected[step][name], rtol=2e-3, atol=1e-5, err_msg=name
            )
        for name, value in negatives[step].items():
            np.testing.assert_array_equal(value, chosen[step][name], err_msg=name)
    assert negatives[-1]


def test_nothing_recompiles(one_device):
    assert one_device[3] == {Phase.WARMUP: 0, Phase.WARMUP_FILLING: 1, Phase.FNE: 1}


def test_the_run_has_both_phases_and_its_scalars(one_device):
    _, scalars, negatives, _ = one_device
    assert "hinge_active" not in scalars[6] and "hinge_active" in scalars[7]
    assert not negatives[6] and negatives[7]["negative_i2t"].shape == (16,)
    assert [round(float(s["queue_filled"]) * 40) for s in scalars[:4]] == [16, 32, 40, 40]


def test_statistics_begin_anew_with_each_epoch_or_decay():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    image /= jnp.linalg.norm(image, axis=1, keepdims=True)
    features = Features(image, image, image, image, jnp.arange(6), jnp.eye(6, dtype=bool))
    config = tiny_config()
    rule = StatisticsRule(config.fne.ema_decay, steps_per_epoch=3)
    stats, counts = SimilarityStatistics.create(), []
    for step in range(5):
        stats = rule.add(rule.before_step(stats, jnp.int32(step)), features)
        counts.append(int(stats.positive.count))
    assert counts == [6, 12, 18, 6, 12]
    rule = StatisticsRule(ema_decay=0.5, steps_per_epoch=3)
    for step in range(5):
        stats = rule.add(rule.before_step(stats, jnp.int32(step)), features)
    np.testing.assert_allclose(stats.positive.count, 12 / 2**5 + 12 * (1 - 1 / 2**5))


@pytest.mark.parametrize(
    ("name", "queue"),
    [("hardest", True), ("hardest", False), ("semi_hard", True), ("random", True),
     ("random", False), ("infonce", True), ("infonce", False), ("sigmoid", False)],
)  # fmt: skip
def test_every_objective_trains_by_the_same_loop(name, queue):
    config = tiny_config(
        objective__name=name, objective__queue=queue, fne__start_epoch=0.0, num_epochs=1.0
    )
    towers = LinearTowers()
    start, _, _, _ = run_steps(config, mesh_of(1), 0, towers)
    state, scalars, negatives, compiled = run_steps(config, mesh_of(1), 5, towers)
    assert compiled == {Phase.WARMUP: 0, Phase.WARMUP_FILLING: 0, Phase.FNE: 1}
    assert all(np.isfinite(s["loss"]) and s["loss"] > 0 for s in scalars)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start.params)
    assert all(jax.tree.leaves(moved))
    if name in ("semi_hard", "random") or (name == "hardest" and queue):
        last = negatives[-1]
        from_queue = ~np.isin(last["negative_i2t"], last["anchor"])
        assert queue or not from_queue.any()
        same_as_hardest = (last["negative_i2t"] == last["hardest_i2t"]).mean()
        assert (same_as_hardest == 1) == (name == "hardest")
    else:
        assert negatives[-1] == {}


def test_momentum_encoders_follow_before_they_encode():
    config = tiny_config(momentum=0.75)
    start, _, _, _ = run_steps(config, mesh_of(1), 0, LinearTowers())
    first, _, _, _ = run_steps(config, mesh_of(1), 1, LinearTowers())
    second, _, _, _ = run_steps(config, mesh_of(1), 2, LinearTowers())
    jax.tree.map(np.testing.assert_array_equal, first.momentum_params, start.params)
    expected = optax.incremental_update(first.params, first.momentum_params, 0.25)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        second.momentum_params,
        expected,
    )


def test_schedules():
    optimizer = tiny_config().optimizer
    optimizer.update(learning_rate=1.0, step_epochs=(2.0, 4.0), warmup_epochs=0.5)
    schedule = learning_rate_schedule(optimizer, 10, 60)
    values = [float(schedule(s)) for s in (0, 1, 5, 19, 21, 39, 41, 59)]
    np.testing.assert_allclose(values, [0, 0.2, 1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)
    # Two factors of one step, where both lie within the rise, are both applied.
    optimizer.update(step_epochs=(0.1, 0.3), warmup_epochs=2.0)
    schedule = learning_rate_schedule(optimizer, 10, 60)
    np.testing.assert_allclose([float(schedule(s)) for s in (10, 21)], [0.5, 0.01], rtol=1e-5)
    optimizer.update(schedule="cosine", warmup_epochs=0.5)
    schedule = learning_rate_schedule(optimizer, 10, 60)
    np.testing.assert_allclose([float(schedule(s)) for s in (5, 60)], [1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, []),
        ({"num_epochs": 10.0, "fne__start_epoch": 0.0, "optimizer__schedule": "cosine"}, []),
        ({"num_epochs": 1.0, "fne__start_epoch": 2.0}, ["ends within the warm-up"]),
        (
            {"num_epochs": 10.0, "fne__start_epoch": 8.0, "optimizer__schedule": "cosine"},
            ["objective.name=fne acts on 1.3 % of .*, from step 800 of 1000 on"],
        ),
        ({"fne__ema_decay": 0.9, "fne__min_count": 159}, []),
        ({"fne__ema_decay": 0.9, "fne__min_count": 160}, ["no more than 160 similarities"]),
        ({"fne__ema_decay": 0.9, "fne__min_count": 160, "objective__name": "clip"}, []),
        ({"fne__min_count": 1600}, ["nothing is ever suspected"]),
    ],
)
def test_a_run_that_is_hardly_meant_is_doubted(fields, words):
    config = tiny_config(**{"num_epochs": 5.0, "fne__start_epoch": 1.0} | fields)
    found = loop.doubts(config, Timeline.of(config, 100))
    assert len(found) == len(words)
    for doubt, expected in zip(found, words, strict=True):
        assert re.search(expected, doubt), doubt


def test_decay_and_factors_touch_what_they_should():
    optimizer = tiny_config().optimizer
    optimizer.update(weight_decay=0.5, image_factor=0.5, clip_norm=1e9)
    params = {
        "image": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "probe": jnp.ones((1, 1, 2))},
        "text": {"kernel": jnp.ones((2, 2)), "relative_attention_bias": jnp.ones((2, 2))},
    }
    tx = build_optimizer(optimizer, optax.constant_schedule(0.1), None)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["text"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["image"]["kernel"], -0.025)
    for tower, name in (
        ("image", "bias"), ("image", "probe"), ("text", "relative_attention_bias"),
    ):  # fmt: skip
        assert (updates[tower][name] == 0).all()


def validations(plan):
    return {step for step in range(plan.total_steps + 2) if plan.validates(step)}


@pytest.mark.parametrize("per_epoch", [1, 2, 3, 7, 11, 12, 24, 50])
@pytest.mark.parametrize("steps_per_epoch", [1, 4, 11, 12])
def test_validations_are_where_counting_the_intervals_finds_them(steps_per_epoch, per_epoch):
    for epochs in (0.3, 1.0, 3.4):
        config = tiny_config(num_epochs=epochs, evaluation__per_epoch=per_epoch)
        plan = Timeline.of(config, steps_per_epoch)
        counted = {round(n * steps_per_epoch / per_epoch) for n in range(1, 1000)}
        expected = {step for step in counted if 0 < step < plan.total_steps}
        assert validations(plan) == expected | {plan.total_steps}


def test_phases():
    config = tiny_config(fne__start_epoch=1.5, num_epochs=3.0, evaluation__per_epoch=2)
    plan = Timeline.of(config, 10)
    assert [plan.phase(s) for s in (0, 14, 15)] == [Phase.WARMUP_FILLING] * 2 + [Phase.FNE]
    assert validations(plan) == {5, 10, 15, 20, 25, 30} and plan.total_steps == 30
    config.warmup.objective = "hardest"  # the memory of 40 takes 3 batches of 16
    plan = Timeline.of(config, 10)
    assert [plan.phase(s) for s in (11, 12, 15)] == [Phase.WARMUP, Phase.WARMUP_FILLING, Phase.FNE]


def test_true_false_negative_rates():
    # Captions 0 and 1 are of image 0, caption 2 of image 1; caption 0 is true of both.
    truth = [[True, True, False], [True, False, True]]

    class Known:
        def is_true(self, caption, image):
            return np.array([truth[i][c] for c, i in zip(caption, image, strict=True)])

    aux = TripletAux(
        negative_i2t=np.array([1, 0]),  # image 0: caption 2 false; image 1: caption 0 true
        negative_t2i=np.array([1, 0]),  # caption 0: image 1 true; caption 2 has no negative
        counts_i2t=np.array([True, True]),
        counts_t2i=np.array([True, False]),
        hardest_i2t=np.array([1, -1]),
        hardest_t2i=np.array([-1, -1]),
        fallback_fraction=0.0,
        posterior=0.0,
        active_fraction=0.0,
    )
    negatives = _negative_pairs(aux, np.array([0, 2]))
    rates = true_false_negative_rates(Known(), np.array([0, 0, 1]), negatives)
    assert rates == {"sampled_false_negative_rate": 2 / 3, "hardest_false_negative_rate": 0.0}
    none = _negative_pairs(aux.replace(hardest_i2t=np.array([-1, -1])), np.array([0, 2]))
    rates = true_false_negative_rates(Known(), np.array([0, 0, 1]), none)
    assert rates == {"sampled_false_negative_rate": 2 / 3}


def test_means_survive_a_save():
    pairs = types.SimpleNamespace(truth=None)
    ours, resumed = StepResults(None, pairs), StepResults(None, pairs)
    for step, value in enumerate((0.1, 0.7, 0.3)):
        resumed = StepResults(None, pairs, json.loads(json.dumps(resumed.stored())))
        for results in (ours, resumed):
            count = {"positive_count": 10.0 * step}
            # No anchor had a negative at the first step.
            of_sampled = {"sampled_posterior": value if step else np.nan}
            results.add(step, {"loss": value, "applied": True} | count | of_sampled, {})
            results.settle()
            assert results.last_loss == value
    means = ours.take_means()
    assert means["positive_count"] == 20 and means["sampled_posterior"] == 0.5
    assert means == resumed.take_means() and means["loss"] == pytest.approx(1.1 / 3)
    assert ours.take_means() == {}


def test_resumed_metrics_hold_no_step_twice(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "empty": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    MetricLog(tmp_path, 2).write(3, {"loss": 30.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}
    ]  # fmt: skip


def train(workdir, **fields):
    config = tiny_config(**fields)
    towers = LinearTowers(config.encoder.text.mlp_width)
    loop.train_and_evaluate(config, workdir, module=towers)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir)
    return workdir


def state_of(workdir, mesh=None):
    return stored_state(workdir, mesh=mesh, module=LinearTowers())


def without_times(workdir):
    timed = ("pairs_per_s", "data_wait_share")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(workdir)]


def test_a_run_leaves_its_files(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "tokenizer"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    logged = {line["step"]: line["warmup"] for line in read_metrics(whole_run) if "loss" in line}
    # Every three steps, and where the warm-up ends: no mean is taken over both losses.
    assert logged == {3: 1, 6: 1, 7: 1, 9: 0, 12: 0, 14: 0}


def test_tensorboard_shows_a_few_groups(whole_run):
    events = EventAccumulator(str(whole_run), size_guidance={"tensors": 0}).Reload()
    groups = collections.Counter(tag.split("/")[0] for tag in events.Tags()["tensors"])
    assert set(groups) == {"train", "validation", "statistics", "negatives", "system"}
    tags = set(events.Tags()["tensors"])
    assert {"train/loss", "validation/rsum", "system/pairs_per_s"} <= tags
    for name in {name for line in read_metrics(whole_run) for name in line} - {"step"}:
        assert metric_log.tensorboard_tag(name) in tags


def test_counts_of_the_statistics_are_no_means(whole_run):
    last = read_metrics(whole_run)[-2]
    stats = state_of(whole_run).stats
    assert last["step"] == 14 and last["positive_count"] == stats.positive.count
    assert last["negative_count"] == stats.negative.count


@pytest.mark.parametrize("stop_after", [5, slow(9)])
def test_interrupted_run_ends_as_one_never_stopped(
    whole_run, tmp_path, monkeypatch, caplog, stop_after
):
    add, calls = StepResults.add, []

    def interrupt(*args):
        add(*args)
        calls.append(1)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepResults, "add", interrupt)
    with pytest.raises(Interrupted) as stop:
        train(tmp_path)
    assert stop.value.exit_code == 130 and "saved" in str(stop.value)
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, logger="fne_jax.progress"):
        train(tmp_path, logging__progress_seconds=0)
    shown = [r.getMessage() for r in caplog.records if r.getMessage().startswith("train: ")]
    # The first steps' losses are still on their way.
    assert all("loss" in line for line in shown[2:]) and len(shown) == 14 - stop_after
    ours, theirs = jax.device_get((state_of(tmp_path), state_of(whole_run)))
    for name in ("params", "momentum_params", "opt_state", "queue", "stats", "step"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), getattr(theirs, name))
    assert without_times(tmp_path) == without_times(whole_run)


def test_a_run_is_restored_on_another_mesh(whole_run, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    state = state_of(whole_run, mesh_of(2, 4))
    kernel = state.params["image"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 8
    jax.tree.map(np.testing.assert_array_equal, state.params, state_of(whole_run).params)


def test_the_loop_copies_nothing_to_the_devices_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "to_devices", lambda batch, mesh: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(tmp_path)


def test_a_complete_run_is_left_alone(whole_run):
    before = without_times(whole_run)
    train(whole_run)
    assert without_times(whole_run) == before


def test_a_run_begins_with_another_runs_weights(whole_run, tmp_path, monkeypatch):
    def towers(config, *_):
        return LinearTowers(config.encoder.text.mlp_width)

    monkeypatch.setattr(model_lib, "build_module", towers)
    train(tmp_path, init_from=str(whole_run), num_epochs=0.2, optimizer__learning_rate=1e-9)
    best, ours = load_workdir(whole_run, "best"), load_workdir(tmp_path, "latest")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours.params, best.params)
    wider = {"encoder__text__mlp_width": 20, "init_from": str(whole_run)}
    with pytest.raises(UserError, match=r"text.*kernel.*: \(40, 16\) there, \(40, 20\) here"):
        train(tmp_path / "wider", **wider)


def test_a_second_signal_is_not_held_back():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu"):
    sys.modules[name] = None
import pathlib
import fne_jax
from fne_jax.training.loop import train_and_evaluate
from tests.support.tiny import LinearTowers, tiny_config
train_and_evaluate(tiny_config(num_epochs=0.2), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_trains_where_tensorflow_tfds_and_clu_are_not_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)],
        cwd=TOP, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path)[-1]["step"] > 0


def test_config_survives_json(tmp_path):
    config = tiny_config()
    configuration.store_config(config, tmp_path)
    stored = configuration.read_config(tmp_path)
    assert configuration.flatten(stored).keys() == configuration.flatten(config).keys()


@pytest.mark.slow
def test_a_profile_marks_its_five_steps(tmp_path):
    config = tiny_config(logging__profile_step=3)
    loop.train_and_evaluate(config, tmp_path, module=LinearTowers())
    (trace,) = tmp_path.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    marked = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]
    assert marked == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(("name", "used"), [("clip", False), ("infonce", True)])
def test_momentum_encoders_embed_only_what_is_compared(name, used):
    config = tiny_config(objective__name=name, warmup__objective="hardest", fne__start_epoch=1.0)
    mesh = mesh_of(1)
    training = training_of(config, LinearTowers(), mesh, 7, 0.1)
    state, steps = new_state(training), training.steps
    embeds = {
        phase: "/momentum_encoders/" in step.as_text()
        for phase, step in training.compiled(Phase).items()
    }
    assert embeds == {Phase.WARMUP: False, Phase.WARMUP_FILLING: True, Phase.FNE: used}
    rows = {
        name: np.zeros(array.shape, array.dtype) + (array.dtype == jnp.int32)
        for name, array in training.abstract_batch().items()
    }
    before = jax.tree.map(np.asarray, state.momentum_params)
    state, _, _ = steps[Phase.FNE](state, sharding.to_devices(rows, mesh))
    state, scalars, _ = steps[Phase.FNE](state, sharding.to_devices(rows, mesh))
    assert (np.asarray(state.momentum_params["text"]["kernel"]) != before["text"]["kernel"]).any()
    assert (scalars["queue_filled"] > 0) == used
