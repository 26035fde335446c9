"""A tiny step compiled for GPUs that are not there; `-m gpu_plan` with the extra `plan-gpu`."""

import json
import os
import subprocess
import sys

import jax
import pytest
from jax._src import xla_bridge

from fne_jax.errors import UserError
from fne_jax.planning import topology
from tests.support import TOP

_PLUGIN = "jax_cuda13_plugin"
_SIZES = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48}


def _plan(machine):
    overrides = [
        f"--config.encoder.{tower}.{field}={value}"
        for tower in ("image", "text")
        for field, value in _SIZES.items()
    ]
    command = [
        sys.executable, "-m", "fne_jax.plan", "--config=configs/shapes.py", "--batch=8", "--json",
        f"--topology={machine}", "--config.encoder.compute_dtype=bfloat16", *overrides,
    ]  # fmt: skip
    # On its own, as JAX looks for plugins once, and the tests' XLA_FLAGS are for CPUs.
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.gpu_plan
@pytest.mark.parametrize("machine", ["a100:1", "h100:2", "h200:1", "b200:1"])
def test_a_tiny_step_for_gpus(machine):
    pytest.importorskip(_PLUGIN)
    found = _plan(machine)
    devices = int(machine.partition(":")[2])
    assert found["fits"] and found["devices"] == devices
    # The same products as on CPUs; what lies between them is written otherwise.
    reference = _plan(f"cpu:{devices}")
    assert found["useful_flops_per_chip"] == reference["useful_flops_per_chip"]
    assert found["flops_per_chip"] == pytest.approx(reference["flops_per_chip"], rel=0.1)
    assert 0 < found["roofline_mfu"] < 1
    assert any(kernel["kernel"].startswith("__cublas$") for kernel in found["kernels"])
    assert all(kernel["flops"] for kernel in found["kernels"])
    reduced = [one["scope"] for one in found["collectives"] if one["kind"] == "all-reduce"]
    assert ("online_encoders" in reduced) == (devices > 1)


def test_without_the_extra(monkeypatch):
    jax.devices()  # registers the plugins that are installed
    monkeypatch.delitem(xla_bridge._topology_factories, "cuda", raising=False)
    with pytest.raises(UserError, match=r"--topology=h100:8: .*pip install -e '\.\[plan-gpu\]'"):
        topology.find("h100:8")


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:9", "h100:2x4", "v100:1"])
def test_unknown_gpus(name):
    with pytest.raises(UserError, match=r"there is no such machine.*at most 8 GPUs"):
        topology.find(name)
