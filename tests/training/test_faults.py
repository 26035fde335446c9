"""A file operation of a run fails once: no state is lost, and one line tells.

`python -m tests.support.faults` tries all operations, which takes long.
"""

import jax
import pytest

from fne_jax.parallel import sharding
from tests.support import faults


@pytest.fixture(autouse=True, scope="module")
def one_device():
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", lambda *sizes: mesh)
        yield


@pytest.fixture(scope="module")
def starts(tmp_path_factory, one_device):
    """The untouched run, and the file operations of a new run and of one that resumes."""
    folder = tmp_path_factory.mktemp("faults")
    untouched = folder / "untouched"
    calls = {"new": faults.counted(untouched)}
    calls["resumed"] = faults.counted(faults.begun(folder / "counted", untouched))
    return untouched, calls


def check(folder, untouched, start, number, kind):
    workdir = folder / f"{start}-{number}-{kind}".replace(" ", "-")
    if start == "resumed":
        faults.begun(workdir, untouched)
    said = faults.tried(workdir, number, kind)
    assert said is None or "\n" not in said
    assert faults.lost(workdir, untouched) == []


@pytest.mark.parametrize("start", ["new", "resumed"])
def test_some_faults_lose_nothing(tmp_path, starts, start):
    untouched, calls = starts
    assert len(calls[start]) > 50
    for number, kind in faults.faults_of(calls[start], every=len(calls[start]) // 2):
        check(tmp_path, untouched, start, number, kind)
