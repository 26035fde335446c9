"""The folder of a run: checked before it is touched, held by one run, and tied to its data."""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from fne_jax import files, train
from fne_jax.data.sources import registry
from fne_jax.errors import UserError
from fne_jax.model import checkpoints
from fne_jax.model import model as model_lib
from fne_jax.parallel import sharding
from fne_jax.training import loop, setup, train_state
from fne_jax.training import workdir as run_folder
from fne_jax.training.dry_run import describe
from tests.support import TOP
from tests.support.runs import content_of, stored_state
from tests.support.tiny import LinearTowers, tiny_config


@pytest.fixture(autouse=True, scope="module")
def one_device():
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", lambda *sizes: mesh)
        yield


def short_config(**fields):
    return tiny_config(num_epochs=0.3, **fields)


def run(workdir, config=None):
    loop.train_and_evaluate(config or short_config(), workdir, module=LinearTowers())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("workdir") / "run"
    run(workdir)
    return workdir


# What is wrong shows before anything is written.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective__name": "fen"}, "objective.name"),
        ({"warmup__objective": "hard"}, "warmup.objective"),
        ({"fne__elimination": "strong"}, "fne.elimination"),
        ({"optimizer__schedule": "linear"}, "optimizer.schedule"),
        ({"encoder__compute_dtype": "float8"}, "encoder.compute_dtype"),
        ({"encoder__attention": "flash"}, "encoder.attention"),
        ({"encoder__text__pooling": "median"}, "encoder.text.pooling"),
        ({"encoder__text__width": 17}, "encoder.text.width"),
        ({"encoder__image__patch_size": 3}, "encoder.image.image_size"),
        ({"data__tokenizer": "no/such"}, "data.tokenizer"),
        ({"data__text_length": 600}, "data.text_length"),
        ({"init_from": "/no/such"}, "init_from=/no/such: .* is not the workdir of a run"),
        ({"encoder__image__pretrained": "/no/such"}, "/no/such"),
        ({"global_batch_size": 4096, "queue_size": 4096}, "global_batch_size"),
    ],
)
def test_a_mistaken_start_leaves_nothing(tmp_path, fields, message):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        loop.train_and_evaluate(tiny_config(**fields), workdir)
    assert not workdir.exists()


@pytest.mark.parametrize("name", ["a[1]", "back\\slash", "all*", "what?"])
def test_a_folder_where_checkpoints_would_be_lost_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"Orbax loses checkpoints there, for the .* in its path"):
        run(tmp_path / name / "run")
    assert not (tmp_path / name).exists()


def test_a_workdir_without_a_checkpoint_is_taken_over(tmp_path, monkeypatch, whole_run):
    def failing(*arguments):
        raise UserError("the first batch failed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunSetup, "batches", failing)
        with pytest.raises(UserError, match="first batch"):
            run(tmp_path, short_config(momentum=0.5, data__vocab_size=200, data__synthetic__seed=1))
    assert (tmp_path / "config.json").exists()
    run(tmp_path)
    ours, theirs = content_of(tmp_path), content_of(whole_run)
    for name in ("config.json", "data.json", "tokenizer/tokenizer.json"):
        assert ours[pathlib.Path(name)] == theirs[pathlib.Path(name)], name


def test_a_dry_run_finds_what_the_run_would(tmp_path, whole_run, monkeypatch):
    monkeypatch.setattr(model_lib, "build_module", lambda *arguments: LinearTowers())
    for workdir, fields, message in (
        (tmp_path / "new", {"init_from": "/nope"}, "init_from=/nope"),
        (whole_run, {"momentum": 0.5}, "config.momentum: 0.995 in the run, 0.5 now"),
        (whole_run, {"data__dir": "x", "data__synthetic__images": 60}, None),
    ):
        before = content_of(tmp_path)
        if message is None:
            assert "7 steps an epoch" in describe(short_config(**fields), workdir)
        else:
            with pytest.raises(UserError, match=message):
                describe(short_config(**fields), workdir)
        assert content_of(tmp_path) == before


# One dataset.


def changed_splits(monkeypatch, changes):
    def changed(data, image_size, splits=registry.SPLITS):
        found = registry.load_splits(data, image_size, splits)
        return [
            changes.get(name, lambda same: same)(one)
            for name, one in zip(splits, found, strict=True)
        ]

    monkeypatch.setattr(setup, "load_splits", changed)
    monkeypatch.setattr(
        model_lib, "load_split", lambda data, side, name: changed(data, side, [name])[0]
    )


def with_another_caption(dataset):
    return dataclasses.replace(dataset, captions=[*dataset.captions[:-1], "other"])


def none_of_it(dataset):
    raise UserError("no training split")


def brighter(dataset):
    return dataclasses.replace(dataset, images=dataset.images | 1)


@pytest.mark.parametrize(
    ("split", "change"),
    [("train", with_another_caption), ("train", brighter), ("val", with_another_caption)],
)
def test_resuming_on_other_data_is_refused(whole_run, monkeypatch, split, change):
    before = content_of(whole_run)
    changed_splits(monkeypatch, {split: change})
    with pytest.raises(UserError, match=f"other data: its '{split}' split had 1.*checksum"):
        run(whole_run)
    assert content_of(whole_run) == before


def test_weights_that_were_converted_are_no_run_to_resume(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"run holds weights, .*--config.init_from=.*/run to begin"):
        run(tmp_path / "run")


def test_what_reads_a_run_tells_of_other_data(whole_run, monkeypatch, caplog):
    model = model_lib.stored_model(whole_run, module=LinearTowers())
    for split in registry.SPLITS:
        assert model.load_split(split).identity == model.data[split]
    assert not caplog.text
    for changes, refused in (
        ({"train": with_another_caption}, ""),
        ({"train": brighter, "test": with_another_caption}, ""),
        ({"test": brighter}, ""),
        ({"train": brighter, "test": brighter}, "Nor is the training split.* trained on"),
    ):
        caplog.clear()
        with monkeypatch.context() as patch:
            changed_splits(patch, changes)
            split = list(changes)[-1]
            if refused:
                with pytest.raises(UserError, match=refused):
                    model.load_split(split)
            else:
                model.load_split(split)
                assert f"the {split} split is not that of the run, which had 120" in caplog.text
    with monkeypatch.context() as patch:
        changed_splits(patch, {"train": none_of_it, "test": brighter})
        with pytest.raises(
            UserError, match="cannot be told: no training split; give the run's own"
        ):
            model.load_split("test")


def test_only_evaluation_limits_captions(tmp_path):
    config = short_config(evaluation__captions_per_image=1)
    run(tmp_path, config)
    model = model_lib.stored_model(tmp_path, module=LinearTowers())
    assert len(model.load_split("test").captions) == model.data["test"].pairs == 120
    assert len(model.load_evaluation_split("test").captions) == 60


# One run at a time.

HOLD = """
import pathlib, sys
from fne_jax.training import workdir
with workdir.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_live_run_is_refused_and_a_dead_one_is_no_obstacle(whole_run):
    before = content_of(whole_run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(whole_run)],
        cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is training there \(process {holder.pid} on "):
        run(whole_run)
    holder.kill()
    holder.communicate()
    run(whole_run)
    after = content_of(whole_run)
    lock = pathlib.Path("run.lock")
    assert after.pop(lock).startswith(f"process {os.getpid()} on ".encode())
    before.pop(lock)
    assert after == before


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with run_folder.held(tmp_path):
        assert "no locks here" in caplog.text


# The weights of another run.


@pytest.mark.parametrize(
    ("fields", "refused", "told"),
    [
        ({"encoder__image__heads": 4}, "fit:\n  module.image.heads: 2 there, 4 here$", ""),
        ({"encoder__text__pooling": "max"}, "module.text_pooling: mean there, max here$", ""),
        ({"encoder__text__dropout": 0.1, "encoder__remat": "full"}, "", ""),
        ({"data__text_length": 9}, "", "trained with data.text_length: 8 there, 9 here$"),
        (
            {"image_std": (1, 1, 1), "data__prompt": "a "},
            "",
            'prompt: "" .*std: .0.2.* .1, 1, 1. h',
        ),
    ],
    ids=str,
)
def test_weights_of_another_function_are_refused(
    whole_run, monkeypatch, caplog, fields, refused, told
):
    theirs, config = tiny_config(), tiny_config(init_from=str(whole_run), **fields)
    stored_model = functools.partial(
        train_state.stored_model, module=model_lib.build_module(theirs, {}, 40)
    )
    monkeypatch.setattr(train_state, "stored_model", stored_model)
    module = model_lib.build_module(config, {}, 40)
    model = model_lib.build_model(config, {}, None, sharding.create_mesh(), module=module)
    like = train_state.abstract_state(model, optax.constant_schedule(0.1))
    if refused:
        with pytest.raises(UserError, match=refused):
            train_state.find_source_run(model, like)
    else:
        assert train_state.find_source_run(model, like)[0] == whole_run
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("fne_jax")]
    assert re.search(told, ours[0]) if told else not ours


# What the devices hold.


def test_a_run_that_begins_with_weights_never_holds_two_states(whole_run, tmp_path, monkeypatch):
    read, seen = checkpoints.read, []

    def watched(manager, step, like):
        seen.append((set(like), sum(array.nbytes for array in jax.live_arrays())))
        return read(manager, step, like)

    stored_model = functools.partial(train_state.stored_model, module=LinearTowers())
    config = short_config(init_from=str(whole_run), optimizer__learning_rate=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(train_state, "stored_model", stored_model)
        patch.setattr(checkpoints, "read", watched)
        before = sum(array.nbytes for array in jax.live_arrays())
        run(tmp_path, config)
    ((fields, live),) = seen
    assert fields == {"params", "momentum_params", "frozen_params"}
    assert live - before < 1000, "no state is there yet"
    ours, theirs = (stored_state(w, module=LinearTowers()) for w in (tmp_path, whole_run))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours.params, theirs.params
    )


# The command line.


def test_the_command_takes_a_home_folder_and_refuses_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(
        train, "train_and_evaluate", lambda config, workdir, **_: given.append(workdir)
    )
    config = f"--config={TOP / 'configs' / 'shapes.py'}"
    train.main([config, "--workdir=~/runs/a"])
    assert given == [tmp_path / "runs" / "a"]
    with pytest.raises(UserError, match=r"--workdir=gs://b/run: .*mount"):
        train.main([config, "--workdir=gs://b/run"])
    assert list(tmp_path.iterdir()) == []
