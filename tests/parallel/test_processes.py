"""Several processes as one run: joining, following one process, a signal to one, a dead one."""

import argparse
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.parallel import processes
from fne_jax.training import loop
from fne_jax.training.metric_log import read_metrics
from tests.support import soak_kill, tiny_train
from tests.support.run_of_processes import ends_of, start_all
from tests.support.runs import content_of, stored_state
from tests.support.tiny import LinearTowers

# Parameters move by 1e-3 and more; by what the order of sums changes, they differ by 1e-7.
TOLERANCE = 1e-5


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    return parser.parse_args(arguments)


def test_flags_say_who_is_who():
    place = processes.explicit_place(
        parsed("--coordinator=host:1234", "--processes=4", "--process-index=3")
    )
    assert place == {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
    assert processes.explicit_place(parsed()) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "--coordinator, --process-index missing"),
        (["--coordinator=h", "--processes=2", "--process-index=0"], "'h'; expected HOST:PORT"),
        (["--coordinator=h:1", "--processes=2", "--process-index=2"], "is 2 of 2 processes"),
    ],
)
def test_halves_of_a_place_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        processes.explicit_place(parsed(*flags))


def test_a_heartbeat_of_no_time_is_refused():
    with pytest.raises(UserError, match="--heartbeat-timeout is 0"):
        processes.initialize(parsed("--heartbeat-timeout=0"))


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        ({}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_where_jax_is_asked_for_other_processes(variables, cluster):
    assert processes.may_be_cluster(variables) is cluster


def wait_for(process, workdir, step):
    """Waits until a checkpoint of the step or a later one is there."""
    folder = workdir / "checkpoints"
    while not any(p.name.isdigit() and int(p.name) >= step for p in folder.glob("*")):
        assert process.poll() is None
        time.sleep(0.02)


def train(workdir):
    with pytest.MonkeyPatch.context() as patch:
        tiny_train.record_negatives(patch, workdir)
        loop.train_and_evaluate(tiny_train.get_config(), workdir, module=LinearTowers())


@pytest.fixture(scope="module")
def single_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single")
    train(workdir)
    return workdir


def leaves_of(workdir):
    state = stored_state(workdir, module=LinearTowers())
    return jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))


def assert_follows(workdir, single):
    """Asserts that two runs chose the same negatives and are equal up to rounding."""
    ours, theirs = map(tiny_train.recorded_negatives, (workdir, single))
    assert ours.keys() == theirs.keys() == set(range(14))
    for step in theirs:
        assert ours[step] == theirs[step], f"step {step}"
    assert "negative_i2t" in theirs[13]
    for a, b in zip(leaves_of(workdir), leaves_of(single), strict=True):
        if jax.numpy.issubdtype(a.dtype, jax.numpy.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    ours, theirs = read_metrics(workdir), read_metrics(single)
    assert [(m["step"], m.keys()) for m in ours] == [(m["step"], m.keys()) for m in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - set(soak_kill.TIMED):
            expected = pytest.approx(other[name], rel=10 * TOLERANCE, abs=10 * TOLERANCE)
            assert mine[name] == expected, (name, mine["step"])


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    """Two processes of four devices: a signal to the second, begun again, the second killed."""
    workdir = tmp_path_factory.mktemp("hosts") / "run"
    started = start_all(workdir, 2, 4, "flags")
    wait_for(started[0][0], workdir, 2)
    started[1][0].send_signal(signal.SIGTERM)
    stopped = ends_of(started)
    started = start_all(workdir, 2, 4, "slurm", heartbeat=20)
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    wait_for(started[0][0], workdir, max(steps) + 2)
    started[1][0].kill()
    return workdir, stopped, ends_of(started)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(broken_run):
    _, (codes, logs), _ = broken_run
    assert codes == [143, 143], logs
    told = {line for log in logs for line in log.splitlines() if line.startswith("stopped at step")}
    assert len(told) == 1


@pytest.mark.slow
def test_a_dead_process_ends_the_others(broken_run):
    _, _, (codes, logs) = broken_run
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert "resumed from step" in logs[0]


@pytest.mark.slow
def test_two_processes_resumed_as_one_follow_one(broken_run, single_run, tmp_path):
    workdir = shutil.copytree(broken_run[0], tmp_path / "run")
    train(workdir)
    assert_follows(workdir, single_run)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(4, 2), (2, 4)])
def test_two_processes_resumed_as_more_follow_one(broken_run, single_run, tmp_path, count, devices):
    workdir = shutil.copytree(broken_run[0], tmp_path / "run")
    codes, logs = ends_of(start_all(workdir, count, devices, "flags"))
    assert codes == [0] * count, logs
    assert "resumed from step" in logs[0]
    assert_follows(workdir, single_run)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_an_error_of_reading_in_one_process_ends_both_and_changes_nothing(
    single_run, tmp_path, index
):
    workdir = shutil.copytree(single_run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "14")
    for path in workdir.glob("negatives.*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:13]))
    before = content_of(workdir / "checkpoints")
    unread = "/checkpoints/13/position/metadata"
    started = start_all(workdir, 2, 4, "flags", arguments=[f"--unread={index}:{unread}"])
    begun = time.monotonic()
    codes, logs = ends_of(started)
    assert codes == [74, 74], logs
    # Importing and joining included; JAX alone would wait for a heartbeat: 100 s.
    assert time.monotonic() - begun < 80
    for log in logs:
        (error,) = (line for line in log.splitlines() if "error: " in line)
        assert f"{workdir}/checkpoints/13 " in error
        assert "Traceback" not in log and "damage" not in log
    assert f"Input/output error: '{workdir}{unread}'; nothing was changed" in logs[index]
    assert content_of(workdir / "checkpoints") == before
    train(workdir)
    assert_follows(workdir, single_run)
