"""The step's benchmark: its parts on a tiny config, and what it makes of their figures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fne_jax import benchmark
from fne_jax.benchmarks import pytorch, step, step_comparison
from fne_jax.errors import UserError
from fne_jax.planning.topology import Chip
from fne_jax.planning.useful import useful_flops
from tests.support import TOP
from tests.support.gpu import on_gpu
from tests.support.tiny import tiny_config

TINY = f"--config={TOP}/tests/support/tiny_train.py"
CHIPS = {"a100": Chip(3e12, 1, 1, 1), "h200": Chip(1e9, 1, 1, 1)}


@pytest.fixture(autouse=True)
def chips(monkeypatch):
    monkeypatch.setattr(step_comparison, "CHIPS", CHIPS)


def figures(seconds, **others):
    return {"platform": "gpu", "device": "NVIDIA H200", "window_step_s": seconds, **others}


def compared(config, found, rounds=1, **options):
    """Returns the comparison of parts that report, in turns, what they are given."""
    left = {name: list(each) for name, each in found.items()}
    asked = []

    def run_part(name, platform):
        asked.append((name, platform))
        return left[name].pop(0)

    options = {"run_plan": lambda topology: {"topology": topology}} | options
    result = step_comparison.compare(config, rounds, run_part=run_part, **options)
    assert json.loads(json.dumps(result)) == result
    return result, asked


def test_rates_by_the_useful_flops_and_the_median_of_all_rounds():
    config = tiny_config(global_batch_size=8, encoder__image__layers=3)
    found = {
        "jax": [figures([0.5, 9.0]), figures([0.25])],
        "pytorch_float32": [figures([2.0]), figures([2.0])],
        "pytorch_bfloat16": [figures([1.0]), figures([1.0])],
    }
    plan = {"roofline_step_seconds": 0.125, "hbm_bytes_per_chip": 10}
    found["jax"][0]["compiled_bytes"] = 20
    result, asked = compared(config, found, 2, run_plan=lambda name: plan | {"topology": name})
    # Per layer and token 8 w^2 + 4 t w + 4 w m, and 6 p^2 w for each of the patches.
    image = 3 * 5 * (8 * 16**2 + 4 * 5 * 16 + 4 * 16 * 16) + 4 * 6 * 4**2 * 16
    text = 8 * (8 * 16**2 + 4 * 8 * 16 + 4 * 16 * 16)
    assert result["useful_flops_per_step"] == 8 * 4 * (image + text)
    assert (result["chip"], result["peak_flops"]) == ("h200", 1e9)
    ours = result["parts"]["jax"]
    assert (ours["step_s"], ours["pairs_per_s"]) == (0.5, 16)
    assert ours["mfu"] == pytest.approx(8 * 4 * (image + text) / 0.5 / 1e9)
    assert result["pairs_per_s_over"] == {"pytorch_float32": 4, "pytorch_bfloat16": 2}
    assert result["plan"]["topology"] == "h200:1"
    beside = result["beside_plan"]
    assert beside["step_measured_over_planned"] == 4
    assert beside["compiled_memory_measured_over_planned"] == 2
    assert beside["memory_measured_over_planned"] is None
    # Only what JAX ran on is asked of the others.
    assert asked[:3] == [("jax", None), ("pytorch_float32", "gpu"), ("pytorch_bfloat16", "gpu")]


def test_a_part_that_fails_is_an_error_and_not_the_end():
    failing, saved = {"error": "out of memory", "exit_code": 1}, []
    found = {
        "jax": [figures([0.5]), failing],
        "pytorch_float32": [failing],
        "pytorch_bfloat16": [figures([1.0])] * 2,
    }
    result, asked = compared(
        tiny_config(),
        found,
        2,
        run_plan=lambda topology: {"error": "no compiler"},
        save=lambda result: saved.append(len(result["parts"])),
    )
    parts = result["parts"]
    assert [name for name, _ in asked].count("pytorch_float32") == 1
    assert parts["pytorch_float32"] == failing
    # What was measured before stands beside the error.
    assert (parts["jax"]["error"], parts["jax"]["step_s"]) == ("out of memory", 0.5)
    assert result["pairs_per_s_over"] == {"pytorch_bfloat16": 2}
    assert result["plan"] == {"error": "no compiler"}
    assert set(result["beside_plan"].values()) == {None}
    assert saved == [1, 2, 3, 3, 3, 3]


def test_a_device_that_no_chip_is_known_of():
    found = {name: [figures([0.5]) | {"device": "cpu"}] for name in step_comparison.PARTS}
    result, _ = compared(tiny_config(), found)
    assert result["parts"]["jax"]["mfu"] is None
    assert "['a100', 'h200']" in result["plan"]["error"]
    given, _ = compared(tiny_config(), found, peak_flops=2e9, topology="cpu:1")
    flops = given["useful_flops_per_step"]
    assert given["parts"]["jax"]["mfu"] == pytest.approx(flops / 0.5 / 2e9)
    assert given["plan"] == {"topology": "cpu:1"}


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("cpu", None),
    ],
)
def test_chips_by_the_names_of_devices(device, chip):
    assert step_comparison.chip_of(device) == chip


@pytest.mark.slow
def test_the_part_of_jax():
    found = step.jax_step(tiny_config(global_batch_size=6), steps=2, windows=3)
    assert len(found["window_step_s"]) == 3 and min(found["window_step_s"]) > 0
    assert found["applied"] is True and found["platform"] == "cpu"
    assert found["compiled_bytes"] > 0 and found["kernels"] == {}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("projection_dim", [0, 12])
def test_the_parts_of_pytorch(precision, projection_dim):
    config = tiny_config(global_batch_size=6, encoder__projection_dim=projection_dim)
    found = pytorch.pytorch_step(config, precision, 2, 3, platform="cpu")
    assert len(found["window_step_s"]) == 3 and min(found["window_step_s"]) > 0
    assert found["applied"] is True and found["dtype"] == precision


def test_a_step_of_pytorch_learns_moves_the_momentum_and_fills_the_queue():
    config = tiny_config(global_batch_size=6, queue_size=10)
    training = step.training_on_one_device(config)
    run = pytorch.Step(training, "float32", torch.device("cpu"))
    before = [queue.clone() for queue in run.queues]
    start = [weight.detach().clone() for weight in run.online.parameters()]
    run()
    loss = run.loss.item()
    # Of 10 slots the first 6 are written, with unit vectors.
    for queue, old in zip(run.queues, before, strict=True):
        changed = (queue != old).any(dim=1)
        assert changed.tolist() == [True] * 6 + [False] * 4
        assert torch.linalg.norm(queue, dim=1).numpy() == pytest.approx(np.ones(10), abs=1e-5)
    run()
    moved = zip(start, run.online.parameters(), run.momentum.parameters(), strict=True)
    share = 1 - config.momentum
    for old, online, momentum in moved:
        # The second step's momentum is that of the weights after the first.
        assert (momentum - old).abs().max() <= share * 2 * config.optimizer.learning_rate
        assert torch.isfinite(online).all()
    for _ in range(20):
        run()
    assert run.loss.item() < loss


def test_the_hardest_key_of_others():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    # The first anchor's hardest key scores 0.6, the second's 0.8, both positives 1.
    assert pytorch.hinge(anchors, keys, 0.3).item() == pytest.approx((0.0 + 0.1) / 2)
    assert pytorch.hinge(anchors, keys, 0.5).item() == pytest.approx((0.1 + 0.3) / 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_pytorch_does_not_see():
    with pytest.raises(UserError, match="sees no GPU, and JAX does"):
        pytorch.pytorch_step(tiny_config(), "float32", 1, 1, platform="gpu")


def test_a_made_up_batch_has_no_matches():
    config = tiny_config()
    config.objective.oracle = "drop"
    with pytest.raises(UserError, match=r"config\.objective\.oracle is 'drop'"):
        step.training_on_one_device(config)


def test_published_towers_are_of_the_config_s_sizes():
    from configs import flickr30k

    model = step.training_on_one_device(flickr30k.get_config()).model
    assert model.module.text.vocab_size == 30522
    # 7.43 TFLOP for 16 pairs, as fne_jax.plan counts.
    assert 16 * useful_flops(model) == pytest.approx(7.43e12, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", TINY, "--config.no_such=1"], "no_such"),
        (["strategy", "--repeats=0"], "--repeats is 0; expected a number above 0"),
        (["step", TINY, "--batch=0"], "--batch is 0"),
        (["step", TINY, "--out=/dev/null/x.json"], "--out=/dev/null/x.json cannot be written"),
        (["strategy", "--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(arguments)


def test_a_command_s_json_or_its_last_words():
    def run(code, seconds=60):
        return step_comparison.json_of([sys.executable, "-c", code], {"NAME": "x"}, seconds)

    code = "import json, os; print('noise'); print(json.dumps({'name': os.environ['NAME']}))"
    assert run(code) == {"name": "x"}
    assert run("import sys; sys.exit('no memory')") == {"error": "no memory", "exit_code": 1}
    assert run("import time; time.sleep(60)", 0.1) == {"error": "not done after 0.1 s"}
    assert "no/such" in step_comparison.json_of(["no/such"], {})["error"]


def whole_command(out, environment, *options):
    command = [
        sys.executable, "-m", "fne_jax.benchmark", "step", TINY, "--steps=2", "--windows=2",
        "--rounds=1", f"--out={out}", *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=TOP, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == json.loads(done.stdout.splitlines()[-1])
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    environment = os.environ | {"XLA_FLAGS": ""}
    result = whole_command(tmp_path / "step.json", environment, "--topology=cpu:1")
    assert set(result["parts"]) == set(step_comparison.PARTS)
    assert not any("error" in part for part in result["parts"].values())
    assert result["beside_plan"]["compiled_memory_measured_over_planned"] == pytest.approx(1)


@pytest.mark.gpu
def test_the_whole_command_on_a_gpu(tmp_path):
    result = whole_command(
        tmp_path / "step.json", on_gpu(), "--config.encoder.compute_dtype=bfloat16"
    )
    ours = result["parts"]["jax"]
    assert ours["platform"] == "gpu" and ours["applied"] and ours["peak_bytes"] > 0
