"""The input benchmark: that it times what training does, and the lines that it prints."""

import json

import numpy as np
import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import input as input_benchmark
from fne_jax.data.images import augmentation
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(input_benchmark, "IMAGE_SIZE", 32)
    monkeypatch.setattr(input_benchmark, "SOURCE_SHAPE", (36, 48))


def test_the_stages_make_what_the_pipeline_makes(small):
    jpeg = input_benchmark.render_jpeg(3)
    sampled = augmentation.sample("randaugment", 0, 0, 3, 36, 48)
    value = jpeg
    for stage in input_benchmark.STAGES.values():
        value = stage(value, sampled)
    made = TrainingImages(32, "randaugment", seed=0)(jpeg, 0, 3)
    np.testing.assert_array_equal(value, made)


def test_rendered_images_weigh_what_photographs_do():
    sizes = [len(input_benchmark.render_jpeg(n)) for n in range(2)]
    assert all(50_000 < size < 100_000 for size in sizes)


def test_lines(small, capsys):
    benchmark.main(["input", "--images=5", "--batch=2", "--batches=2", "--repeats=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found, *stages, tpu, a100, h100 = lines
    assert found["image_size"] == 32 and found["batch"] == 2
    assert found["images_per_s"] > 0 and found["images_per_s_per_core"] > 0
    assert [line["stage"] for line in stages] == ["read", *input_benchmark.STAGES]
    assert [line["device"] for line in (tpu, a100, h100)] == ["TPU v5e", "A100", "H100"]
    rate = found["images_per_s_per_core"]
    assert tpu["cores"] == pytest.approx(tpu["pairs_per_s"] / rate)


@pytest.mark.parametrize("name", ["images", "batch", "batches", "repeats"])
def test_wrong_arguments(name):
    with pytest.raises(UserError, match=f"--{name} is 0; expected a number above 0"):
        benchmark.main(["input", f"--{name}=0"])
