"""Trackers get the scalars of TensorBoard, and fail alone. Fakes stand for the packages."""

import importlib
import json
import logging
import sys

import pytest

from fne_jax import configuration
from fne_jax.errors import UserError
from fne_jax.training import loop
from fne_jax.training.metric_log import MetricLog, read_metrics, tensorboard_tag
from fne_jax.training.trackers import FILE_NAME, open_trackers
from tests.support.tiny import LinearTowers, tiny_config

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
"""
# The arguments that each is given, as wandb 0.31 and trackio 0.43 name them.
INIT = {
    "wandb": "project, id, name, dir, config, resume, reinit",
    "trackio": "project, name, config, resume, embed",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    modules = {}
    for name, arguments in INIT.items():
        text = f"""{FAKE}
def init(*, {arguments}):
    if "init" in fails:
        raise RuntimeError("no key")
    calls.append(dict(locals()))
    return Run(name)
"""
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        modules[name] = importlib.import_module(name)
    yield modules
    for name in INIT:
        sys.modules.pop(name)


def write(workdir, resumed_step, steps, names=("wandb", "trackio")):
    config = tiny_config(logging__also=names)
    workdir.mkdir(exist_ok=True)
    log = MetricLog(workdir, resumed_step, also=open_trackers(config, workdir, resumed_step))
    for step in steps:
        log.write(step, {"loss": step / 4, "eval_rsum": 10.0 * step})
    log.close()


def test_scalars_have_steps_names_and_values_of_tensorboard(tmp_path, fakes):
    write(tmp_path / "run", 0, (2, 5))
    (label,) = {call["name"] for fake in fakes.values() for call in fake.calls}
    assert label.startswith("run-")
    for fake in fakes.values():
        assert fake.logged == [
            (label, 2, {"train/loss": 0.5, "validation/rsum": 20.0}),
            (label, 5, {"train/loss": 1.25, "validation/rsum": 50.0}),
        ]
        assert fake.calls[0]["config"]["queue_size"] == tiny_config().queue_size
        json.dumps(fake.calls[0]["config"])
        assert fake.finished == [label]


def test_a_resumed_run_goes_on_with_its_remote_run(tmp_path, fakes):
    fake = fakes["wandb"]
    for resumed_step in (0, 3, 0):
        write(tmp_path / "run", resumed_step, (resumed_step + 1,))
    first, resumed, anew = (call["id"] for call in fake.calls)
    assert first == resumed != anew
    assert all(call["resume"] == "allow" for call in fake.calls)
    (tmp_path / "run" / FILE_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"trackers\.json: cannot be read"):
        write(tmp_path / "run", 3, ())


@pytest.mark.parametrize(("fails", "reason"), [("init", "no key"), ("log", "no route to host")])
def test_what_fails_warns_once(tmp_path, fakes, fails, reason, caplog):
    caplog.set_level(logging.WARNING)
    fakes["wandb"].fails = (fails,)
    write(tmp_path / "run", 0, (1, 2, 3))
    warnings = [record.message for record in caplog.records if "wandb" in record.message]
    assert warnings == [f"wandb: {reason}; nothing more is written there, and the training goes on"]
    # Nobody else misses anything.
    assert [step for _, step, _ in fakes["trackio"].logged] == [1, 2, 3]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_training_writes_what_metrics_jsonl_has(tmp_path, fakes):
    config = tiny_config(num_epochs=1.0, logging__also=("trackio",))
    workdir = tmp_path / "run"
    loop.train_and_evaluate(config, workdir, module=LinearTowers(config.encoder.text.mlp_width))
    fake = fakes["trackio"]
    lines = read_metrics(workdir)
    assert [step for _, step, _ in fake.logged] == [line.pop("step") for line in lines]
    for (_, _, scalars), line in zip(fake.logged, lines, strict=True):
        assert line
        for name, value in line.items():
            assert scalars[tensorboard_tag(name)] == pytest.approx(value)
    assert len(fake.finished) == 1 and not fakes["wandb"].calls


def test_a_missing_package_is_told_before_anything_is_written(tmp_path, monkeypatch):
    # A folder of that name, as W&B leaves it behind, is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(logging__also=("wandb",))
    with pytest.raises(UserError, match=r"config\.logging\.also names wandb.*fne-jax\[wandb\]"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_field_takes_names_of_trackers():
    load = configuration.load_config
    assert load("configs/shapes.py", []).logging.also == ()
    one = load("configs/shapes.py", ["--config.logging.also=wandb"])
    assert one.logging.also == ("wandb",)
    for value in ("wandp", "('wandb', 'wandb')"):
        with pytest.raises(UserError, match=r"config\.logging\.also.*any of wandb, trackio"):
            load("configs/shapes.py", [f"--config.logging.also={value}"])
