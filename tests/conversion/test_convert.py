"""The authors' checkpoint in, and nothing run on the way."""

import argparse
import io
import json
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest
import torch

import fne_jax
from configs import base, flickr30k, flickr30k_reference
from fne_jax import configuration, convert, evaluate
from fne_jax.conversion import reference
from fne_jax.data import captions
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders.dual_encoder import pool_mean_to_longest
from fne_jax.errors import UserError
from fne_jax.evaluation.results import read_values
from fne_jax.model.model import load_workdir
from fne_jax.training.timeline import Phase, Timeline
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def config_path(golden, tmp_path_factory):
    """A config of the golden run's encoders, with a tokenizer whose ids they know."""
    folder = tmp_path_factory.mktemp("reference")
    train = load_split(tiny_config().data, 8, "train")
    captions.fit_tokenizer(train.captions, 50).save_pretrained(folder / "tokenizer")
    trajectory = golden / "trajectory"
    (folder / "config.py").write_text(
        "from tests.support.tiny import tiny_config\n\n"
        "def get_config():\n"
        "    return tiny_config(\n"
        f"        encoder__image__pretrained={str(trajectory / 'vit')!r},\n"
        f"        encoder__text__pretrained={str(trajectory / 'bert')!r},\n"
        "        encoder__image__image_size=16, encoder__text__pooling='mean_with_padding',\n"
        f"        data__tokenizer={str(folder / 'tokenizer')!r}, data__text_length=12,\n"
        "    )\n"
    )
    return folder / "config.py"


@pytest.fixture(scope="module")
def converted(golden, config_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("converted") / "run"
    checkpoint = golden / "trajectory" / "model_best.pth.tar"
    convert.main(["reference", str(checkpoint), f"--out={workdir}", f"--config={config_path}"])
    return workdir


def test_the_authors_checkpoint_becomes_a_run(converted, golden):
    trajectory = golden / "trajectory"
    restored = load_workdir(converted, "best")
    assert restored.step == 3 and restored.config.fne.margin == pytest.approx(0.2)
    for params, prefix in (
        (restored.params, "final_"),
        (restored.momentum_params, "final_momentum_"),
    ):
        for tower, name in (("image", "vit"), ("text", "bert")):
            expected = fne_jax.load_pretrained(trajectory / f"{prefix}{name}")[1]
            jax.tree.map(np.testing.assert_array_equal, dict(params[tower]), expected)
    arrays = np.load(trajectory / "trajectory.npz")
    queue = restored.queue
    np.testing.assert_array_equal(queue.image, arrays["final_image_queue"])
    np.testing.assert_array_equal(queue.text, arrays["final_text_queue"])
    np.testing.assert_array_equal(queue.image_id, arrays["final_queue_image_id"])
    assert queue.pointer == arrays["final_queue_pointer"]


def test_a_converted_run_is_evaluated(converted):
    evaluate.main([f"--workdir={converted}", "--split=test"])
    report = json.loads((converted / "eval_test.json").read_text())
    assert report["step"] == 3 and read_values(report)["rsum"] > 0


def test_an_existing_folder_is_left_alone(converted, golden, config_path):
    checkpoint = golden / "trajectory" / "model_best.pth.tar"
    reference = ["reference", str(checkpoint), f"--config={config_path}"]
    for command in (reference, ["export", f"--workdir={converted}"]):
        with pytest.raises(UserError, match="already exists and is not empty"):
            convert.main([*command, f"--out={converted}"])
        with pytest.raises(UserError, match="expected a folder"):
            convert.main([*command, f"--out={checkpoint}"])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_zip(path, marker):
    """A checkpoint in torch's own layout whose pickle would make a folder when opened."""
    torch.save({"model": [{}], "opt": argparse.Namespace(), "epoch": 1, "best_rsum": 0.0}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            if name.endswith("data.pkl"):
                data = pickle.dumps({"model": [Hostile(marker)]}, protocol=2)
            archive.writestr(name, data)


def test_a_hostile_pickle_is_refused(tmp_path, config_path):
    marker = tmp_path / "was_run"
    hostile_zip(tmp_path / "hostile.pth.tar", marker)
    with pytest.raises(UserError, match=r"hostile.pth.tar: refused, it holds more than tensors"):
        convert.main(
            ["reference", str(tmp_path / "hostile.pth.tar"), f"--out={tmp_path / 'out'}",
             f"--config={config_path}"]
        )  # fmt: skip
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoints_of_theirs(tmp_path, config_path, golden):
    def attempt(path):
        convert.main(["reference", str(path), f"--out={tmp_path / 'o'}", f"--config={config_path}"])

    with pytest.raises(UserError, match="cannot be read"):
        attempt(tmp_path / "nowhere.pth.tar")
    (tmp_path / "text.pth.tar").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"text.pth.tar: "):
        attempt(tmp_path / "text.pth.tar")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match="which holds model, opt, epoch, best_rsum"):
        attempt(tmp_path / "other.pth.tar")
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(golden / "trajectory" / "model_best.pth.tar", weights_only=True)
    del saved["model"][0]["visual_encoder.layernorm.weight"]
    torch.save(saved, tmp_path / "lacking.pth.tar")
    with pytest.raises(UserError, match=r"visual_encoder\..* missing layernorm.weight"):
        attempt(tmp_path / "lacking.pth.tar")
    assert not (tmp_path / "o").exists()


def test_damaged_checkpoints_are_refused_or_read(tmp_path):
    """Whatever 300 damages leave of a small checkpoint, in either of torch's layouts."""
    content = {"model": [{"a": torch.zeros(3)}], "opt": argparse.Namespace(margin=0.2)}
    whole = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(
            content | {"epoch": 1, "best_rsum": 0.0},
            stream,
            _use_new_zipfile_serialization=zipped,
        )
        whole.append(stream.getvalue())
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged.pth", 0
    for number in range(300):
        data = bytearray(whole[number % 2])
        if number % 3:
            for place in rng.integers(min(len(data), 400), size=3):
                data[place] = rng.integers(256)
        else:
            del data[rng.integers(len(data)) :]
        path.write_bytes(data)
        try:
            assert list(reference._load(path)["model"][0]) != []
        except UserError as error:
            refused += "damaged.pth" in str(error)
    assert refused > 200


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5}, {"model": []}, {"model": [{"a": 3}]}, {"model": {"a": torch.zeros(1)}},
        {"epoch": "one"}, {"opt": 1},
    ],
)  # fmt: skip
def test_checkpoints_of_another_layout_are_refused(tmp_path, change):
    content = {"model": [{"a": torch.zeros(3)}], "opt": argparse.Namespace(), "epoch": 1}
    torch.save(content | {"best_rsum": 0.0} | change, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth: not a checkpoint of the authors' code, where"):
        reference._load(tmp_path / "other.pth")


def test_the_reference_config_differs_where_design_says():
    ours = configuration.flatten(flickr30k.get_config())
    theirs = configuration.flatten(flickr30k_reference.get_config())
    assert {name: theirs[name] for name in theirs if theirs[name] != ours[name]} == {
        "encoder.compute_dtype": "float32",
        "data.text_length": 64,
        "encoder.text.training_pooling": "mean_to_longest",
        "encoder.text.pooling": "mean_with_padding",
        "evaluation.text_length": 30,
        "evaluation.per_epoch": 1,
        "fne.mask_same_image": False,
        "warmup.fill_queue": False,
    }
    published = {
        "optimizer.learning_rate": 2e-5, "optimizer.b1": 0.9, "optimizer.b2": 0.999,
        "optimizer.eps": 1e-8, "optimizer.clip_norm": 2.0, "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "step", "optimizer.step_epochs": (5.0, 15.0),
        "optimizer.step_factor": 0.1, "optimizer.warmup_epochs": 0.0, "global_batch_size": 32,
        "queue_size": 8224, "num_epochs": 25.0, "momentum": 0.995, "fne.start_epoch": 1.0,
        "fne.margin": 0.2, "fne.tau": 0.5, "fne.prior": 1e-4, "fne.posterior_threshold": None,
        "fne.min_count": 200, "fne.monotone": False, "fne.ema_decay": 1.0,
        "fne.elimination": "soft", "fne.cut_down": True, "warmup.objective": "hardest",
        "objective.name": "fne", "objective.queue": True, "encoder.image.image_size": 384,
        "encoder.image.dropout": 0.0, "encoder.text.dropout": 0.0,
        "encoder.image.pretrained": "google/vit-base-patch16-384",
        "encoder.text.pretrained": "bert-base-uncased", "encoder.projection_dim": 0,
        "data.augmentation": "randaugment",
    }  # fmt: skip
    assert {name: theirs[name] for name in published} == published


def test_the_authors_do_not_fill_the_memory_before_fne():
    config = base.get_config()
    plan = Timeline.of(config, 1000)
    assert plan.phase(999) is Phase.WARMUP_FILLING and plan.phase(742) is Phase.WARMUP
    config.warmup.fill_queue = False
    assert Timeline.of(config, 1000).phase(999) is Phase.WARMUP


def test_mean_to_longest_is_padding_to_the_longest():
    hidden = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_allclose(pool_mean_to_longest(hidden, mask), hidden[:, :3].mean(axis=1))
