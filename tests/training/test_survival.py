"""What a run survives: signals, kills, damaged checkpoints, full disks, losses that are NaN."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.stats

from fne_jax.data.batches import BatchOrder
from fne_jax.errors import EnvironmentFailure, Interrupted, UserError
from fne_jax.model import checkpoints
from fne_jax.model.model import load_workdir
from fne_jax.objectives.similarity_statistics import GaussianStatistics, SimilarityStatistics
from fne_jax.parallel import sharding
from fne_jax.training import loop, setup
from fne_jax.training.checkpointing import Checkpoints
from fne_jax.training.metric_log import MetricLog, read_metrics
from fne_jax.training.step_results import StepResults
from fne_jax.training.timeline import Phase
from tests.support import TOP, soak_kill
from tests.support.runs import content_of, new_state, stored_state, training_of
from tests.support.tiny import LinearTowers, tiny_config
from tests.support.xla_flags import xla_flags


@pytest.fixture(autouse=True, scope="module")
def one_device():
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", lambda *sizes: mesh)
        yield


def train(workdir, config=None):
    """Trains with towers that compile fast."""
    config = tiny_config(checkpoint__every_steps=3) if config is None else config
    loop.train_and_evaluate(config, workdir, module=LinearTowers())


def state_of(workdir):
    return stored_state(workdir, module=LinearTowers())


def fresh_training(config, steps_per_epoch, learning_rate=None):
    mesh = sharding.create_mesh()
    return training_of(config, LinearTowers(), mesh, steps_per_epoch, learning_rate)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("survival") / "whole"
    train(workdir)
    return workdir


@pytest.fixture
def own_run(whole_run, tmp_path):
    """A copy of the complete run: checkpoints 12 and 14, and the best of 7 and 14."""
    return shutil.copytree(whole_run, tmp_path / "run")


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


# Signals.


@pytest.mark.parametrize("step", [7, 14])
def test_a_signal_during_validation_abandons_it(whole_run, tmp_path, monkeypatch, step):
    validate = loop.validate

    def interrupted(run, state, at, log):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(run, state, at, log)

    monkeypatch.setattr(loop, "validate", interrupted)
    with pytest.raises(Interrupted, match=f"stopped at step {step}, saved") as stop:
        train(tmp_path)
    assert stop.value.exit_code == 143
    assert steps_of(tmp_path)[-1] == step
    assert not any("eval_rsum" in m for m in read_metrics(tmp_path) if m["step"] == step)
    monkeypatch.undo()
    train(tmp_path)
    assert soak_kill.differences(tmp_path, whole_run) == []
    managers = (checkpoints.reader(workdir) for workdir in (tmp_path, whole_run))
    ours, theirs = ((m.best_step(), m.metrics(m.best_step())) for m in managers)
    assert ours == theirs


def test_a_line_of_an_abandoned_validation_is_dropped(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step, values in ((3, {"loss": 1.0}), (3, {"eval_rsum": 2.0})):
        log.write(step, values)
    MetricLog(tmp_path, 3)
    assert len(read_metrics(tmp_path)) == 2
    MetricLog(tmp_path, 3, validated=False)
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 1.0}]


@pytest.mark.slow
def test_sigterm_then_kills_change_nothing(tmp_path):
    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    variables = soak_kill.cached(tmp_path / "xla")
    soak_kill.finish(soak_kill.start(untouched, variables=variables))
    process = soak_kill.start(stopped, variables=variables)
    for line in process.stderr:
        if "step 0:" in line:
            process.send_signal(signal.SIGTERM)
            break
    with process.stderr:
        log = process.stderr.read()
    assert process.wait() == 143 and "saved; the same command goes on" in log
    process.stderr.close()
    # In the middle of the save that follows the next step.
    process = soak_kill.start(stopped, variables=variables)
    for line in process.stderr:
        if "resumed from step" in line:
            break
    begun = steps_of(stopped)[-1]
    while steps_of(stopped)[-1] == begun and not unfinished(stopped, begun + 1):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stderr.close()
    log, _ = soak_kill.finish(soak_kill.start(stopped, variables=variables))
    assert "resumed from step" in log
    assert soak_kill.differences(stopped, untouched) == []
    assert not list((stopped / "checkpoints").glob("*tmp*"))


def unfinished(workdir, step):
    return list((workdir / "checkpoints").glob(f"{step}.*tmp*"))


@pytest.mark.slow
def test_twenty_kills_at_random_change_nothing(tmp_path):
    different, _, _ = soak_kill.soak(tmp_path, 20, 0)
    assert different == []


# Checkpoints that were damaged, are of another layout, or cannot be written.


def files_of(checkpoint):
    return sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file())


def test_whatever_file_is_cut_off_the_run_ends_the_same(whole_run, tmp_path, caplog):
    like = state_of(whole_run)
    set_aside = 0
    for number, name in enumerate(files_of(whole_run / "checkpoints" / "14")):
        workdir = shutil.copytree(whole_run, tmp_path / str(number))
        path = workdir / "checkpoints" / "14" / name
        os.truncate(path, path.stat().st_size // 2)
        state, _ = Checkpoints(workdir, tiny_config().checkpoint).restore_newest(like)
        step = int(state.step)
        if step == 14:  # a file that nothing depends on
            np.testing.assert_array_equal(state.queue.image, like.queue.image)
        else:
            assert step == 12 and list((workdir / "damaged_checkpoints").iterdir())
            set_aside += 1
    assert set_aside >= 3
    assert len([r for r in caplog.records if "set aside as" in r.message]) == set_aside


@pytest.mark.parametrize("missing", ["state", "position"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(own_run, whole_run, missing):
    shutil.rmtree(own_run / "checkpoints" / "14" / missing)
    train(own_run)
    assert soak_kill.differences(own_run, whole_run) == []
    assert [path.name for path in (own_run / "damaged_checkpoints").iterdir()] == ["14-0"]


@pytest.mark.parametrize("damaged", ["state/_METADATA", "metrics/metrics"])
def test_a_run_without_an_undamaged_checkpoint_stops_and_changes_nothing(own_run, damaged):
    for checkpoint in (own_run / "checkpoints").iterdir():
        if damaged == "metrics/metrics":
            (checkpoint / "metrics").mkdir(exist_ok=True)
        (checkpoint / damaged).write_text("{")
    before = content_of(own_run)
    with pytest.raises(
        UserError, match=r"(?s)no checkpoint is undamaged:.*/12 is damaged.*start the run again"
    ):
        train(own_run)
    assert content_of(own_run) == before


def unreadable_array():
    """Returns what Orbax raises for an array that TensorStore could not read."""
    error = Exception("Encountered error while reading array index")
    error.__cause__ = ValueError("UNAVAILABLE: Error reading params.image.kernel")
    return error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "no"), PermissionError("no"), MemoryError(), unreadable_array()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_storage_stops_the_run_and_changes_nothing(own_run, monkeypatch, error):
    before = content_of(own_run)

    def restore(*arguments, **keywords):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(UserError, match=r"checkpoints/14 could not be read: .*nothing was changed"):
        train(own_run)
    assert content_of(own_run) == before


def test_arrays_other_than_the_saved_ones_are_told(own_run):
    # Orbax reads a chunk that does not exist as zeros, without an error.
    position = own_run / "checkpoints" / "14" / "position" / "metadata"
    values = json.loads(position.read_text())
    changed = values["fingerprints"] | {"queue": values["fingerprints"]["queue"] ^ 1}
    position.write_text(json.dumps(values | {"fingerprints": changed}))
    with pytest.raises(UserError, match="14 is damaged: the arrays of 'queue' are not those"):
        load_workdir(own_run, "latest", module=LinearTowers())
    assert steps_of(own_run)[-1] == 14, "a reader moves nothing"


def test_the_fingerprint_sees_bits_places_and_leaves(monkeypatch):
    tree = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.arange(4), "c": jax.random.key(0)}

    def fingerprint(tree):
        return checkpoints.fingerprints({"all": tree})["all"]

    same = fingerprint(jax.tree.map(jnp.copy, tree))
    assert fingerprint(tree) == same
    others = [
        tree | {"a": tree["a"].at[1, 1].set(jnp.nextafter(jnp.float32(4), jnp.float32(5)))},
        tree | {"a": tree["a"].T},
        tree | {"a": jnp.zeros((2, 2))},
        tree | {"b": tree["b"][::-1]},
        tree | {"c": jax.random.key(1)},
    ]
    assert len({same, *map(fingerprint, others)}) == 6
    rows = sharding.NamedSharding(
        jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), jax.sharding.PartitionSpec("x")
    )
    split = tree | {name: jax.device_put(tree[name], rows) for name in "ab"}
    split["c"] = jax.random.key(0)
    assert fingerprint(split) == same
    # What other devices compute is what the host does.
    monkeypatch.setattr(checkpoints, "_on_host", lambda leaf: False)
    assert fingerprint(tree) == fingerprint(split) == same
    large = {"d": jnp.arange(2**21 + 5, dtype=jnp.bfloat16)}
    on_device = fingerprint(large)
    monkeypatch.undo()
    assert fingerprint(large) == on_device


def test_another_layout_is_named(own_run):
    position = own_run / "checkpoints" / "14" / "position" / "metadata"
    values = json.loads(position.read_text())
    position.write_text(json.dumps(values | {"layout": 3}))
    with pytest.raises(UserError, match="layout 3; this fne_jax reads layout 4"):
        train(own_run)
    assert steps_of(own_run)[-1] == 14, "it is not damaged"


def test_a_full_disk_leaves_the_last_checkpoint(own_run):
    shutil.rmtree(own_run / "checkpoints" / "14")
    before = state_of(own_run)
    assert int(before.step) == 12
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stored = (own_run / "checkpoints").rglob("*")
    size = max(path.stat().st_size for path in stored if path.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(
            EnvironmentFailure, match=r"could not be written: .*last good one is of step 12"
        ):
            train(own_run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = state_of(own_run)
    assert int(after.step) == 12
    np.testing.assert_array_equal(after.queue.image, before.queue.image)


def test_workdirs_that_cannot_be_written(own_run, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written to"):
            train(workdir, tiny_config())
    shutil.rmtree(own_run / "checkpoints")
    (own_run / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints.*is not a folder"):
        train(own_run)


# Losses and gradients that are no number.


def poisoned(objective, image_ids):
    """The objective, but NaN for batches that hold any of the images."""

    def wrapped(features, queue, stats, rng):
        loss, aux = objective(features, queue, stats, rng)
        hit = jnp.isin(features.image_id, jnp.asarray(image_ids)).any()
        return loss * jnp.where(hit, jnp.nan, 1.0), aux

    return wrapped


def poison(monkeypatch, image_ids):
    for name in ("warmup_objective", "main_objective"):
        make = getattr(setup.registry, name)
        monkeypatch.setattr(
            setup.registry,
            name,
            lambda config, make=make: poisoned(make(config), image_ids),
        )


def test_a_bad_batch_changes_nothing_but_the_step(monkeypatch):
    config = tiny_config(fne__start_epoch=0.0, optimizer__warmup_epochs=1.0)
    poison(monkeypatch, [100])
    training = fresh_training(config, 7)
    state, step = new_state(training), training.steps[Phase.FNE]
    batch = random_batch()
    state, scalars, _ = step(state, batch)
    assert bool(scalars["applied"])
    before = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    state, scalars, _ = step(state, batch | {"image_id": batch["image_id"] + 85})  # holds 100
    after = jax.device_get(state.replace(key=jax.random.key_data(state.key)))
    assert not bool(scalars["applied"]) and np.isnan(scalars["loss"])
    assert int(after.step) == int(before.step) + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)
    rate = scalars["learning_rate"]
    state, scalars, _ = step(state, batch)
    assert bool(scalars["applied"]) and scalars["learning_rate"] == rate > 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, before.params)
    assert all(jax.tree.leaves(moved))


def test_statistics_begin_anew_with_an_epoch_whose_first_batch_is_bad(monkeypatch):
    config = tiny_config()
    poison(monkeypatch, [100])
    training = fresh_training(config, 2, 0.0)
    state, step = new_state(training), training.steps[Phase.FNE]
    batch = random_batch() | {"image_id": np.arange(16, dtype=np.int32) + 85}  # holds 100
    counts = []
    for _ in range(4):  # epochs of two steps
        gaussian = GaussianStatistics.from_moments(9, mean=0.5, variance=0.1)
        stats = SimilarityStatistics(gaussian, jax.tree.map(jnp.copy, gaussian))
        state, scalars, _ = step(state.replace(stats=stats), batch)
        assert not scalars["applied"]
        counts.append(float(state.stats.positive.count))
    assert counts == [0, 9, 0, 9]


def random_batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 255, (16, 8, 8, 3)).astype(np.uint8),
        "input_ids": rng.integers(0, 30, (16, 8)).astype(np.int32),
        "attention_mask": np.ones((16, 8), np.int32),
        "image_id": np.arange(16, dtype=np.int32),
        "pair_id": np.arange(16, dtype=np.int32),
    }


def test_bad_steps_are_counted_and_their_pairs_logged(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, [5])  # its two captions: at most two batches an epoch
    config = tiny_config(max_bad_steps=3)
    with caplog.at_level(logging.WARNING, logger="fne_jax"):
        train(tmp_path, config)
    told = [r.message for r in caplog.records if "is not applied" in r.message]
    lines = [line for line in read_metrics(tmp_path) if "bad_steps" in line]
    assert 1 <= lines[-1]["bad_steps"] == len(told) <= 4
    for message in told:
        pairs = list(map(int, message.partition("pairs ")[2].split()))
        assert len(pairs) == 16 and {10, 11} & set(pairs) and "loss nan" in message
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    config = tiny_config(max_bad_steps=3, num_epochs=1.0)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, list(range(60)))
        with pytest.raises(UserError, match="last 3 steps to step 3 had a loss or gradient"):
            train(tmp_path, config)
    saved = state_of(tmp_path)
    start = new_state(fresh_training(config, 7))
    jax.tree.map(np.testing.assert_array_equal, saved.params, start.params)
    train(tmp_path, config)  # the cause is gone: it goes on
    last = read_metrics(tmp_path)[-2]
    assert last["step"] == 7 and last["bad_steps"] == int(saved.step) == 3


def test_bad_steps_survive_a_checkpoint():
    order, pairs = BatchOrder(seed=0, pairs=40, global_batch_size=8), types.SimpleNamespace()
    pairs.truth, results = None, StepResults(order, pairs)
    for step, applied in enumerate((True, False, True, False, False)):
        results.add(step, {"applied": applied, "loss": np.nan, "gradient_norm": 1.0}, {})
    results.settle()
    resumed = StepResults(order, pairs, json.loads(json.dumps(results.stored())))
    assert (resumed.bad_steps, resumed.bad_in_a_row) == (3, 2)


# Long runs.

MEMORY = """
import ctypes, gc, json, pathlib, sys

sys.modules["clu"] = None  # TensorFlow's memory is not ours
import psutil
from fne_jax.training import loop
from fne_jax.progress import Progress
from tests.support.tiny import LinearTowers, tiny_config

update, sizes = Progress.update, []  # of every tenth step
free_what_is_free = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)

def measured(self, done, note=""):
    update(self, done, note)
    if note and done % 10 == 0:
        gc.collect()
        free_what_is_free(0)
        sizes.append(psutil.Process().memory_info().rss)

Progress.update = measured
config = tiny_config(num_epochs=14.0, data__synthetic__images=1200, logging__every_steps=20)
loop.train_and_evaluate(config, pathlib.Path(sys.argv[1]), module=LinearTowers())
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=TOP,
        # With glibc's one pool for each thread, what is free in one of them cannot go back: up to
        # 30 MiB, over fifty epochs, while what is in use stays the same.
        env=os.environ | {"XLA_FLAGS": xla_flags(1), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sizes = np.array(json.loads(done.stdout)).reshape(14, 15)  # of each epoch
    # Steps: how the middle of an epoch grows, in the median epoch. A batch kept is 3 KiB.
    middle = sizes[2:, 3:14]
    growths = [scipy.stats.theilslopes(epoch).slope / 10 for epoch in middle]
    print("bytes a step:", [round(growth) for growth in growths])
    assert np.median(growths) < 1024
    # Epochs, with their validations and checkpoints. 0.08 MiB was measured: in each checkpoint
    # TensorStore's `to_json` (0.1.86) keeps the strings that it made, some 0.8 KiB an array. A
    # validation's embeddings are 0.3 MiB, an executable some MiB.
    levels = np.median(middle, axis=1) / 2**20
    print("MiB by epoch:", levels.round(2).tolist())
    assert scipy.stats.theilslopes(levels[2:]).slope < 0.2
