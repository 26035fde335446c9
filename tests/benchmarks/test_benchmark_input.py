"""The input benchmark: that PIL's pipeline does the same work, and the lines that it prints."""

import json

import numpy as np
import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.data.batches import BatchOrder
from fne_jax.data.images import augmentation
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(input_benchmark, "IMAGE_SIZE", 32)
    monkeypatch.setattr(input_benchmark, "SOURCE_SHAPE", (36, 48))


@pytest.mark.slow
def test_pil_does_the_same_work(small, tmp_path):
    dataset, files = input_benchmark.render_dataset(tmp_path, 12)
    assert [bytes(record["image"]) for record in dataset.images.__getitems__(range(12))] == [
        file.read_bytes() for file in files
    ]
    order = BatchOrder(0, 12, 4)
    theirs = input_benchmark.pil_batches(files, order, range(9), "randaugment", 32)
    ours = input_benchmark.our_batches(dataset, order, 9)
    differences = [
        np.abs(batch["image"].astype(int) - images).mean(axis=(1, 2, 3))
        for batch, images in zip(ours, theirs, strict=True)
    ]
    # Noise to the pixel, edges that blend otherwise: alike, not equal.
    assert np.shape(differences) == (9, 4)
    assert np.median(differences) < 4 and np.max(differences) < 20


def test_the_stages_make_what_the_pipeline_makes(small):
    jpeg = input_benchmark.render_jpeg(3)
    sampled = augmentation.sample("randaugment", 0, 0, 3, 36, 48)
    value = jpeg
    for stage in input_benchmark.OUR_STAGES.values():
        value = stage(value, sampled)
    made = TrainingImages(32, "randaugment", seed=0)(jpeg, 0, 3)
    np.testing.assert_array_equal(value, made)


def test_rendered_images_weigh_what_photographs_do():
    sizes = [len(input_benchmark.render_jpeg(n)) for n in range(2)]
    assert all(50_000 < size < 100_000 for size in sizes)


def test_lines(small, capsys):
    benchmark.main(["input", "--images=5", "--batch=2", "--batches=2", "--repeats=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    pipelines = {line["pipeline"]: line for line in lines if line["benchmark"] == "input"}
    assert pipelines.keys() == {"ours", "pil"}
    for line in pipelines.values():
        assert line["image_size"] == 32 and line["batch"] == 2
        assert line["images_per_s"] > 0 and line["images_per_s_per_core"] > 0
        assert line["per_core_over_pil"] == pytest.approx(
            line["images_per_s_per_core"] / pipelines["pil"]["images_per_s_per_core"]
        )
    stages = [
        (line["pipeline"], line["stage"]) for line in lines if line["benchmark"] == "input_stage"
    ]
    assert stages == [
        ("ours", "read"),
        *[("ours", stage) for stage in input_benchmark.OUR_STAGES],
        *[("pil", stage) for stage in input_benchmark.pil_stages(32)],
    ]
    needs = [line for line in lines if line["benchmark"] == "input_need"]
    assert [line["device"] for line in needs] == ["TPU v5e", "A100", "H100"]
    for line in needs:
        rate = pipelines["ours"]["images_per_s_per_core"]
        assert line["cores_ours"] == pytest.approx(line["pairs_per_s"] / rate)


@pytest.mark.parametrize("name", ["images", "batch", "batches", "repeats"])
def test_wrong_arguments(name):
    with pytest.raises(UserError, match=f"--{name} is 0; expected a number above 0"):
        benchmark.main(["input", f"--{name}=0"])
