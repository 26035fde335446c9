"""Processes that start as one run: who writes, and how an error in one of them ends all."""

import os
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from jax._src import distributed

from fne_jax.data.captions import fit_tokenizer
from fne_jax.errors import EnvironmentFailure, UserError
from fne_jax.parallel import common_end, processes
from fne_jax.training import workdir
from tests.support import TOP, joined
from tests.support.ports import free_port
from tests.support.run_of_processes import ends_of, start_all
from tests.support.tiny import tiny_config
from tests.support.xla_flags import xla_flags

_WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.truncate"}
_events = []
_listening = [False]


def _listen(event, arguments):
    if not _listening[0]:
        return
    opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in _WRITES or opened:
        _events.append((event, str(arguments[0])))


@pytest.fixture
def writes():
    """The file operations that change something, while the test runs."""
    if _listen not in _listening:
        sys.addaudithook(_listen)
        _listening.append(_listen)
    _events.clear()
    _listening[0] = True
    yield _events
    _listening[0] = False


def test_only_process_0_writes_into_the_workdir(tmp_path, writes, monkeypatch):
    tokenizer = fit_tokenizer(["a red circle"], 100)
    model = types.SimpleNamespace(config=tiny_config(), tokenizer=tokenizer)

    def start(folder):
        with workdir.held(folder):
            workdir.begin(folder, model, {"image": {"model_type": "vit"}}, {})

    start(tmp_path / "run")
    assert writes
    writes.clear()
    for index in range(1, 4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        start(tmp_path / "run")
    with pytest.raises(UserError, match="process 3 does not find there what process 0 wrote"):
        start(tmp_path / "other")
    assert not writes


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("odd"), 2), (EnvironmentFailure("full"), 74)], ids=str
)
def test_processes_that_fail_together_have_one_exit_code(error, code, monkeypatch):
    with pytest.raises(type(error)), processes.failing_together("work"):
        raise error
    monkeypatch.setattr(processes, "highest", lambda value: max(value, code))
    with pytest.raises(UserError, match="work: another process failed") as raised:  # noqa: SIM117
        with processes.failing_together("work"):
            pass
    assert raised.value.exit_code == code


class Store:
    """Stands for the client of JAX's coordinator."""

    def __init__(self, **values):
        self.values = {common_end._FOLDER + key: value for key, value in values.items()}

    def key_value_dir_get(self, folder):
        assert folder == common_end._FOLDER
        return list(self.values.items())

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
        self.values[key] = value


class Exited(Exception):
    pass


@pytest.fixture
def ending(monkeypatch, capsys):
    """Ends process 1 of 3 by an error; returns what is then told, and its exit code and words."""

    def leave(number):
        raise Exited(number)

    def end(store, message, error):
        monkeypatch.setattr(distributed.global_state, "client", store)
        with pytest.raises(Exited) as exited:
            common_end.end_together(74, message, error)
        told = {key.rpartition("/")[2]: value for key, value in store.values.items()}
        return told, *exited.value.args, capsys.readouterr().err

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    return end


CLOSED = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
WRAPPED = EnvironmentFailure("the checkpoint could not be written")
WRAPPED.__cause__ = CLOSED
ECHOES = [CLOSED, WRAPPED, ValueError(*CLOSED.args), ConnectionResetError(104, "reset"),
          common_end.FailedElsewhereError("work: another process failed", 2)]  # fmt: skip


@pytest.mark.parametrize("error", ECHOES, ids=lambda error: type(error).__name__)
def test_an_echo_waits_for_its_cause(error, ending):
    store = Store()
    late = threading.Timer(
        0.3, lambda: store.key_value_set(f"{common_end._FOLDER}cause", "2 2 error: no seed\nat all")
    )
    late.start()
    told, code, said = ending(store, "echo", error)
    assert (code, said) == (2, "process 2: error: no seed\nat all\n")
    assert told == {"cause": "2 2 error: no seed\nat all", "1": ""}


def test_an_echo_without_a_cause_tells_of_itself(ending, monkeypatch):
    monkeypatch.setattr(common_end, "_ECHO_SECONDS", 0.3)
    begun = time.monotonic()
    told, code, said = ending(Store(**{"0": ""}), "echo", CLOSED)
    assert time.monotonic() - begun >= 0.3
    assert (code, said) == (74, "echo\n")
    assert told == {"0": "", "cause": "1 74 echo", "1": ""}


def judged():
    try:
        raise CLOSED
    except RuntimeError:
        raise UserError("no disk") from None


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("UNKNOWN"), OSError(5, "no disk"), judged],
    ids=["bug", "value", "disk", "judged"],
)
def test_an_error_of_this_process_is_told_at_once_and_beside_an_earlier_one(error, ending):
    if callable(error):
        with pytest.raises(UserError) as raised:
            error()
        error = raised.value
    begun = time.monotonic()
    told, code, said = ending(Store(), "own", error)
    assert time.monotonic() - begun < common_end._ECHO_SECONDS / 2
    assert (code, said, told["cause"]) == (74, "own\n", "1 74 own")
    told, code, said = ending(Store(cause="0 2 error: no seed"), "own", error)
    assert (code, said) == (2, "own\nprocess 0: error: no seed\n")
    assert told == {"cause": "0 2 error: no seed", "1": ""}
    # All processes that find the same mistake say it once.
    assert ending(Store(cause="0 2 own"), "own", error)[1:] == (2, "own\n")


def test_a_lost_coordinator_keeps_no_process(ending):
    class Lost(Store):
        def key_value_dir_get(self, folder):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection refused")

        key_value_set = key_value_dir_get

    _, code, said = ending(Lost(), "own", CLOSED)
    assert (code, said) == (74, "own\n")


def test_a_single_process_ends_by_itself(capsys):
    common_end.end_together(2, "error: unsaid", UserError("unsaid"))
    assert capsys.readouterr().err == ""


def ends(failing, kind, count=3):
    """Returns exit codes and logs of processes of which one fails, and the seconds that it took."""
    place = [f"--coordinator=localhost:{free_port()}", f"--processes={count}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.joined", str(failing), kind, *place,
             f"--process-index={index}"],
            cwd=TOP, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)},
            stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], logs


@pytest.mark.parametrize(
    ("failing", "kind", "code"),
    [
        (2, "mistake", 2),
        pytest.param(1, "mistake", 2, marks=pytest.mark.slow),
        pytest.param(0, "disk", 74, marks=pytest.mark.slow),
        pytest.param(1, "bug", 1, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_all_with_its_exit_code(failing, kind, code):
    begun = time.monotonic()
    codes, logs = ends(failing, kind)
    assert codes == [code] * 3, logs
    # JAX alone would wait for a heartbeat: 100 s.
    assert time.monotonic() - begun < 80
    for index, log in enumerate(logs):
        assert log.count("Traceback") == (kind == "bug")
        assert log.count(str(joined.FAILURES[kind])) == 1
        told = [line for line in log.splitlines() if line.startswith("process ")]
        assert [line.split(":")[0] for line in told] == [f"process {failing}"] * (index != failing)


@pytest.mark.slow
def test_three_processes_start_a_run_from_nothing(tmp_path):
    batches = [
        "--config.num_epochs=1",
        "--config.global_batch_size=24",
        "--config.evaluation.batch_size=24",
    ]
    codes, logs = ends_of(start_all(tmp_path / "run", 3, 1, "flags", arguments=batches))
    assert codes == [0] * 3, logs
    assert not list((tmp_path / "run").glob("*.incomplete"))
