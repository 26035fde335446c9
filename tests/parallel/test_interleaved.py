"""Meshes in which the devices of the processes take turns: nothing assumes their order."""

import os
import subprocess
import sys

import jax
import numpy as np

from fne_jax.parallel import sharding
from tests.support import TOP, interleaved
from tests.support.ports import free_port
from tests.support.runs import mesh_of


def test_two_processes_that_take_turns_find_what_one_does(tmp_path):
    port, out = free_port(), tmp_path / "found.npz"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={interleaved.DEVICES}"
    }
    command = [sys.executable, "-m", "tests.support.interleaved", str(port)]
    started = [
        subprocess.Popen(
            [*command, str(index), str(out)],
            cwd=TOP, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for index in range(interleaved.PROCESSES)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], logs
    theirs, ours = np.load(out), interleaved.found(mesh_of(1))
    # Rows 0 to 3 and 8 to 11 of 16: the first and the third device are of the first process.
    np.testing.assert_array_equal(theirs["local"], [0, 1, 2, 3, 8, 9, 10, 11])
    np.testing.assert_array_equal(theirs["pairs"], ours["pairs"])
    for name in ("images", "texts", "pixels"):
        assert theirs[name].shape == ours[name].shape
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5, err_msg=name)


def test_local_rows_are_those_that_the_sharding_puts_on_a_processs_devices():
    mesh = mesh_of(4, 2)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 24), np.arange(24))
    assert len(sharding.local_rows(mesh, 24, process=0)) == 24
    placed = sharding.to_devices({"x": np.arange(24)}, mesh)["x"]
    np.testing.assert_array_equal(jax.device_get(placed), np.arange(24))
