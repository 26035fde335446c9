"""W&B gets the scalars of TensorBoard, and fails alone. A fake stands for the package but once."""

import importlib
import json
import logging
import sys

import pytest

from fne_jax.errors import UserError
from fne_jax.training import loop
from fne_jax.training.metric_log import MetricLog, read_metrics, tensorboard_tag
from fne_jax.training.wandb_log import FILE_NAME, WandbLog
from tests.support.tiny import LinearTowers, tiny_config

# The arguments are named as by wandb 0.31.
FAKE = """
calls = []  # of init
logged = []  # (id of the run, step, scalars)
finished = []
fails = ()

class Run:
    def __init__(self, name):
        self.name = name

    def log(self, metrics, step=None):
        if "log" in fails:
            raise RuntimeError("no route\\nto host")
        logged.append((self.name, step, metrics))

    def finish(self):
        finished.append(self.name)

def init(*, project, id, name, dir, config, resume, reinit):
    if "init" in fails:
        raise RuntimeError("no key")
    calls.append(dict(locals()))
    return Run(name)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    (folder / "wandb.py").write_text(FAKE)
    importlib.invalidate_caches()
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb")


def write(workdir, resumed_step, steps):
    config = tiny_config(logging__wandb=True)
    workdir.mkdir(exist_ok=True)
    log = MetricLog(workdir, resumed_step, also=WandbLog(config, workdir, resumed_step))
    for step in steps:
        log.write(step, {"loss": step / 4, "eval_rsum": 10.0 * step})
    log.close()


def test_scalars_have_steps_names_and_values_of_tensorboard(tmp_path, fake):
    write(tmp_path / "run", 0, (2, 5))
    (call,) = fake.calls
    label = call["name"]
    assert label.startswith("run-")
    assert fake.logged == [
        (label, 2, {"train/loss": 0.5, "validation/rsum": 20.0}),
        (label, 5, {"train/loss": 1.25, "validation/rsum": 50.0}),
    ]
    assert call["config"]["queue_size"] == tiny_config().queue_size
    json.dumps(call["config"])
    assert fake.finished == [label]


def test_a_resumed_run_goes_on_with_its_remote_run(tmp_path, fake):
    for resumed_step in (0, 3, 0):
        write(tmp_path / "run", resumed_step, (resumed_step + 1,))
    first, resumed, anew = (call["id"] for call in fake.calls)
    assert first == resumed != anew
    assert all(call["resume"] == "allow" for call in fake.calls)
    (tmp_path / "run" / FILE_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"wandb\.json: cannot be read"):
        write(tmp_path / "run", 3, ())


@pytest.mark.parametrize(("fails", "reason"), [("init", "no key"), ("log", "no route to host")])
def test_what_fails_warns_once(tmp_path, fake, fails, reason, caplog):
    caplog.set_level(logging.WARNING)
    fake.fails = (fails,)
    write(tmp_path / "run", 0, (1, 2, 3))
    warnings = [record.message for record in caplog.records if "wandb" in record.message]
    assert warnings == [f"wandb: {reason}; nothing more is written there, and the training goes on"]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_training_writes_what_metrics_jsonl_has(tmp_path, fake):
    config = tiny_config(num_epochs=1.0, logging__wandb=True)
    workdir = tmp_path / "run"
    loop.train_and_evaluate(config, workdir, module=LinearTowers(config.encoder.text.mlp_width))
    lines = read_metrics(workdir)
    assert [step for _, step, _ in fake.logged] == [line.pop("step") for line in lines]
    for (_, _, scalars), line in zip(fake.logged, lines, strict=True):
        assert line
        for name, value in line.items():
            assert scalars[tensorboard_tag(name)] == pytest.approx(value)
    assert len(fake.finished) == 1


@pytest.mark.slow
def test_the_package_itself_takes_both_parts_of_a_run(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb", reason="not among the suite's own packages: .ci/run")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path / "run", 0, (1, 2, 3))
    write(tmp_path / "run", 3, (4, 5))
    wandb.teardown()  # with all files whole
    parts = [path.read_bytes() for path in sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))]
    assert [tensorboard_tag("eval_rsum").encode() in part for part in parts] == [True, True]
    assert "nothing more is written" not in caplog.text


def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch):
    # A folder of that name, as W&B leaves it behind, is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(logging__wandb=True)
    with pytest.raises(UserError, match=r"config\.logging\.wandb is True.*'\.\[wandb\]'"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
