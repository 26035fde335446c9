"""A file operation of a run fails once, or the process is killed there: no state is lost.

`python -m tests.support.faults` tries all operations, which takes an hour.
"""

import builtins
import errno
import io
import os
import pathlib
import subprocess
import sys

import pytest

from fne_jax.errors import UserError
from fne_jax.model import checkpoints
from fne_jax.model.model import load_workdir
from fne_jax.parallel import processes
from fne_jax.parallel.common_end import FailedElsewhereError
from tests.support import TOP, faults
from tests.support.runs import content_of
from tests.support.tiny import LinearTowers


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with faults.one_device():
        yield


@pytest.fixture(scope="module")
def starts(tmp_path_factory, one_device):
    return faults.Starts(tmp_path_factory.mktemp("faults"))


def every(starts, count, kinds=faults.KINDS):
    """Returns so many faults of one kind or more, equally far from each other."""
    possible = list(starts.faults(kinds=kinds))
    return possible[:: -(-len(possible) // count)]


def test_the_operations_are_those_of_a_run(starts):
    new, resumed = starts.operations["new"], starts.operations["resumed"]
    assert len(new) > len(resumed) > 100
    paths = {operation.path for operation in new if operation.writes}
    assert {"/metrics.jsonl", "/config.json.*.incomplete"} <= paths
    assert any(o.call == "unlink" and o.path.startswith("/checkpoints/1/") for o in new)
    assert ("open", "/checkpoints/2/position/metadata") in [o[:2] for o in resumed]


def test_some_faults_lose_nothing(starts):
    outcomes = [starts.outcome(*fault) for fault in every(starts, 5)]
    assert outcomes != ["not met"] * len(outcomes)


@pytest.mark.slow
def test_more_faults_lose_nothing(starts):
    outcomes = [starts.outcome(*fault) for fault in every(starts, 30)]
    assert len(set(outcomes) - {"went on", "not met"}) > 5


@pytest.mark.slow
def test_some_kills_lose_nothing(starts):
    outcomes = [starts.outcome(*fault) for fault in every(starts, 10, [faults.KILL])]
    assert outcomes.count("killed") > 5


@pytest.mark.parametrize("kind", ["EIO", "EACCES"])
def test_a_checkpoint_whose_parts_were_not_found_is_not_taken_for_whole(starts, kind):
    # Else Orbax would leave out the index, and a run that is complete have no last checkpoint.
    asked = (
        "scandir", "/checkpoints/3.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", False, 0
    )  # fmt: skip
    assert asked in starts.operations["new"]
    said = starts.outcome("new", faults.Operation(*asked), kind)
    assert "could not be written: " in said and "the last good one is of step 2" in said


def test_what_a_killed_start_left_is_removed(starts):
    with starts.folder_of("resumed") as workdir:
        names = {path.name for path in workdir.iterdir()}
        (workdir / "tokenizer.12345678.incomplete").mkdir()
        (workdir / "tokenizer.12345678.incomplete" / "tokenizer.json").write_text("{")
        for name in ("config.json", "data.json", "metrics.jsonl", "report.html"):
            (workdir / f"{name}.12345678.incomplete").write_text("{")
        faults.train(workdir)
        # Another command may be writing the report.
        names.add("report.html.12345678.incomplete")
        assert {path.name for path in workdir.iterdir()} == names


def refusing(call, below, number):
    """Returns the call, failing with an errno on a path and all below."""

    def refusing_call(path, *arguments, **keywords):
        if isinstance(path, str | os.PathLike) and pathlib.Path(path).is_relative_to(below):
            raise OSError(number, os.strerror(number), str(path))
        return call(path, *arguments, **keywords)

    return refusing_call


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 74), (errno.EACCES, 2)])
def test_a_folder_that_the_storage_refuses_is_not_told_as_damage(starts, monkeypatch, number, code):
    with starts.folder_of("resumed") as workdir:
        before, refused = content_of(workdir), workdir / "checkpoints" / "2" / "state"
        for module, name in ((os, "stat"), (os, "scandir"), (io, "open"), (builtins, "open")):
            call = refusing(getattr(module, name), refused, number)
            monkeypatch.setattr(module, name, call)
        with pytest.raises(UserError) as raised:
            faults.train(workdir)
        monkeypatch.undo()
        assert raised.value.exit_code == code
        message = str(raised.value)
        assert "damage" not in message and "\n" not in message
        assert f"{os.strerror(number)}: '{refused}'; nothing was changed" in message
        assert content_of(workdir) == before


def test_a_folder_that_seems_to_be_missing_once_is_found(starts):
    workdir, towers = starts.untouched, LinearTowers()
    with faults.Operations(workdir) as operations:
        load_workdir(workdir, "latest", module=towers)
    asked = [o for o in operations.done if o[:2] == ("stat", "/checkpoints/3/state")]
    for operation in asked:
        with faults.Operations(workdir, operation, "EIO"):
            assert load_workdir(workdir, "latest", module=towers)
    assert len(asked) > 1


@pytest.mark.parametrize(
    ("worst", "kind", "code"),
    [
        (1, checkpoints.DamagedCheckpoint, 2),
        (2, FailedElsewhereError, 2),
        (74, FailedElsewhereError, 74),
    ],
)
def test_what_another_process_cannot_read_ends_this_one_alike(
    starts, monkeypatch, worst, kind, code
):
    monkeypatch.setattr(processes, "highest", lambda value: max(value, worst))
    with pytest.raises(kind, match=r"checkpoints/3 .*the log of another process tells") as raised:
        load_workdir(starts.untouched, "latest", module=LinearTowers())
    assert type(raised.value) is kind and raised.value.exit_code == code


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [0, 1, 3, 6])
def test_files_that_cannot_grow_end_a_run_in_one_line(tmp_path, kibibytes):
    # The operating system's own error, which also meets what Python does not open: the tokenizer's
    # Rust and TensorStore's C++.
    command = [sys.executable, "-m", "tests.support.tiny_train", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash", *command],
        cwd=TOP,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 74, done.stderr
    assert lines[-1].startswith("error: ") and str(tmp_path / "run") in lines[-1]
    assert not any(word in line for line in lines[:-1] for word in ("error", "Error", "Traceback"))
