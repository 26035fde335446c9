"""Processes that start as one run: who writes, and how an error in one of them ends all."""

import os
import subprocess
import sys
import time

import jax
import pytest
from jax._src import distributed

from fne_jax.errors import EnvironmentFailure, UserError
from fne_jax.parallel import common_end, processes
from fne_jax.training import workdir
from fne_jax.training.workdir import RunFiles
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


class StoredTokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_only_process_0_writes_into_the_workdir(tmp_path, writes, monkeypatch):
    files = RunFiles(tiny_config(), {"image": {"model_type": "vit"}}, StoredTokenizer(), {})

    def start(folder):
        with workdir.held(folder):
            workdir.begin(folder, files, begun=False)

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
        self.values = {f"{common_end._FOLDER}{k[1:]}": v for k, v in values.items()}

    def key_value_dir_get(self, folder):
        assert folder == common_end._FOLDER
        return list(self.values.items())

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value


class Exited(Exception):
    pass


@pytest.mark.parametrize(
    ("told", "code", "said"),
    [
        ({}, 1, "connection closed"),
        # The connection was closed because another had ended.
        ({"p0": "0 ", "p2": "2 error: no seed"}, 2, "process 2: error: no seed"),
        ({"p0": "74 process 2: error: no disk", "p2": "74 error: no disk"}, 74, "process 2: error"),
    ],
)
def test_an_echo_takes_the_exit_code_of_its_cause(told, code, said, monkeypatch, capsys):
    store = Store(**told)
    codes = []

    def leave(number):
        codes.append(number)
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(distributed.global_state, "client", store)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(Exited):
        common_end.end_together(1, "connection closed", echo=True)
    assert codes == [code]
    assert capsys.readouterr().err.startswith(said)
    assert store.values[f"{common_end._FOLDER}1"].startswith(f"{code} {said}")


def test_a_single_process_ends_by_itself(capsys):
    common_end.end_together(2, "error: unsaid", echo=False)
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
    assert str(joined.FAILURES[kind]) in logs[failing]
    for index, log in enumerate(logs):
        assert ("Traceback" in log) == (kind == "bug")
        # A process that fails because of a bug in another may tell of its own failure first.
        if kind != "bug":
            assert str(joined.FAILURES[kind]) in log
            assert (f"process {failing}: " in log) == (index != failing)


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
