"""How fast training images are read, decoded, augmented and batched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fne_jax.data.batches import BatchOrder, training_batches
from fne_jax.data.images import preprocessing
from fne_jax.data.images.augmentation import sample
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import PairDataset
from fne_jax.data.sources.registry import load_split

IMAGE_SIZE = 384
# Height and width of the images that are rendered; every other one stands upright.
SOURCE_SHAPE = (375, 500)
JPEG_QUALITY = 90
AUGMENTATION = "randaugment"
# Pairs a second that a device trains: ViT-B/16 at 384 pixels and BERT-base, with momentum encoders,
# at 35 % of the device's bfloat16 peak.
DEVICE_NEEDS = {"TPU v5e": 147, "A100": 233, "H100": 738}


def input_pipeline(
    images: int, batch_size: int, batches: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times the pipeline of training images.

    `images_per_s` is by the clock, with as many threads as the pipeline takes;
    `images_per_s_per_core` is images in a second of processor time, which other programs on the
    machine do not change much. Starting the pipeline is included.

    Yields:
      A line for the pipeline, one for each of its stages, and one for what each kind of device
      needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset, files = render_dataset(pathlib.Path(folder), images)
        order = BatchOrder(0, images, min(batch_size, images))
        per_second, per_core = _rates(dataset, order, batches, repeats)
        yield {
            "benchmark": "input",
            "image_size": IMAGE_SIZE,
            "source_shape": list(SOURCE_SHAPE),
            "jpeg_bytes": round(statistics.mean(file.stat().st_size for file in files)),
            "augmentation": AUGMENTATION,
            "batch": order.global_batch_size,
            "cores": len(os.sched_getaffinity(0)),
            "images_per_s": per_second,
            "images_per_s_per_core": per_core,
        }
        jpegs = [file.read_bytes() for file in files]
        read = _read_seconds(dataset, order.global_batch_size)
        for stage, seconds in ({"read": read} | _stage_seconds(jpegs, repeats)).items():
            yield {"benchmark": "input_stage", "stage": stage, "ms_per_image": 1000 * seconds}
    for device, pairs in DEVICE_NEEDS.items():
        yield {
            "benchmark": "input_need",
            "device": device,
            "pairs_per_s": pairs,
            "cores": pairs / per_core,
        }


def render_dataset(folder: pathlib.Path, images: int) -> tuple[PairDataset, list[pathlib.Path]]:
    """Returns a prepared dataset of rendered images, one caption each, and their files."""
    # Kept out of the module's imports: configs/ is not part of the installed package.
    from configs import base

    (folder / "images").mkdir()
    entries = []
    # One more for each of the splits that are not measured.
    for number, split in enumerate(["train"] * images + ["val", "test"]):
        name = f"{number}.jpg"
        (folder / "images" / name).write_bytes(render_jpeg(number))
        sentences = [{"raw": f"image {number}", "sentid": number}]
        entry = {"filename": name, "split": split, "imgid": number, "sentids": [number]}
        entries.append(entry | {"sentences": sentences})
    content = {"dataset": "rendered", "images": entries}
    (folder / "dataset_rendered.json").write_text(json.dumps(content))
    data = base.get_config().data
    data.update(source="karpathy", dir=str(folder), cache_dir=str(folder / "cache"))
    # What preparing prints is no line of the benchmark.
    with contextlib.redirect_stdout(sys.stderr):
        dataset = load_split(data, IMAGE_SIZE, "train")
    return dataset, [folder / "images" / f"{number}.jpg" for number in range(images)]


def render_jpeg(number: int) -> bytes:
    """Returns a JPEG with structure of every size, to take as many bytes as a photograph."""
    shape = SOURCE_SHAPE if number % 2 else SOURCE_SHAPE[::-1]
    rng = np.random.default_rng(number)
    pixels = np.full((*shape, 3), 128.0)
    # Cells across the image and the deviation of their levels, which falls with frequency.
    for cells, deviation in ((4, 50), (16, 30), (64, 15), (256, 10)):
        grid = rng.normal(size=(cells, cells, 3))
        # Mostly grey, as photographs are.
        grid = 0.5 * grid + grid.mean(axis=2, keepdims=True)
        pixels += deviation * cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


# Each takes what the one before gives.
STAGES = {
    "decode": lambda jpeg, sampled: preprocessing.decode_jpeg(jpeg),
    "crop and resize": lambda image, sampled: preprocessing.crop(image, sampled.window, IMAGE_SIZE),
    "mirror and RandAugment": preprocessing.augment_image,
}


def our_batches(
    dataset: PairDataset, order: BatchOrder, batches: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the first batches of this project's pipeline."""
    tokens = np.zeros((order.pairs, 1), np.int32)
    return training_batches(
        dataset,
        (tokens, tokens),
        order.rows(range(batches)),
        TrainingImages(IMAGE_SIZE, AUGMENTATION, order.seed),
    )


def _rates(dataset, order, batches, repeats):
    """Returns the median images a second, by the clock and by processor time."""
    rates = []
    for _ in range(repeats + 1):  # the first warms up
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in our_batches(dataset, order, batches):
            pass
        seconds = np.array([time.perf_counter() - wall, time.process_time() - cpu])
        rates.append(order.global_batch_size * batches / seconds)
    return np.median(rates[1:], axis=0).tolist()


def _stage_seconds(jpegs: list[bytes], repeats: int) -> dict[str, float]:
    """Returns the median processor time of each stage in seconds an image."""
    seconds = {name: [] for name in STAGES}
    for epoch in range(repeats):
        total = dict.fromkeys(STAGES, 0.0)
        for pair, jpeg in enumerate(jpegs):
            shape = preprocessing.image_shape(jpeg)
            sampled = sample(AUGMENTATION, 0, epoch, pair, *shape)
            value: Any = jpeg
            for name, stage in STAGES.items():
                start = time.thread_time()
                value = stage(value, sampled)
                total[name] += time.thread_time() - start
        for name in STAGES:
            seconds[name].append(total[name] / len(jpegs))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _read_seconds(dataset: PairDataset, batch_size: int) -> float:
    """Returns the processor time in seconds of reading a record, a batch at a time."""
    count = len(dataset.image_id)
    start = time.process_time()
    for first in range(0, count, batch_size):
        dataset.images.__getitems__(list(range(first, min(first + batch_size, count))))
    return (time.process_time() - start) / count
