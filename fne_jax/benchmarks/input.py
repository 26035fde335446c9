"""How fast training images are read, decoded, augmented and batched, beside a pipeline in PIL."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fne_jax.benchmarks.pil_pipeline import pil_batches, pil_stages
from fne_jax.data.batches import BatchOrder, training_batches
from fne_jax.data.images import augmentation, preprocessing
from fne_jax.data.pairs import PairDataset, load_split

IMAGE_SIZE = 384
# Height and width of the pictures that are drawn; every other one stands upright.
SOURCE_SHAPE = (375, 500)
JPEG_QUALITY = 90
AUGMENTATION = "randaugment"
# Pairs a second that a device trains: ViT-B/16 at 384 pixels and BERT-base, with momentum encoders,
# at 35 % of the device's bfloat16 peak.
DEVICE_NEEDS = {"TPU v5e": 147, "A100": 233, "H100": 738}


def input_pipeline(
    pictures: int, batch_size: int, batches: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times this project's pipeline, with either place of augmentation, and PIL's, in turns.

    All make the same crops, mirrorings and operations of the same pictures. `images_per_s` is by
    the clock, with as many threads as the pipeline takes (PIL's: one); `images_per_s_per_core` is
    images in a second of processor time, which other programs on the machine do not change much.
    Starting the pipeline is included.

    Args:
      pictures: how many to draw.
      batch_size: images in a batch.
      batches: in each measurement.
      repeats: measurements of each; the median counts.

    Yields:
      A line for each pipeline, one for each of its stages, and one for what each kind of device
      needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset, files = draw_dataset(pathlib.Path(folder), pictures)
        order = BatchOrder(0, pictures, min(batch_size, pictures))
        pipelines = {
            "host": functools.partial(our_batches, dataset, order, "host", batches),
            "device": functools.partial(our_batches, dataset, order, "device", batches),
            "pil": lambda: pil_batches(files, order, range(batches), AUGMENTATION, IMAGE_SIZE),
        }
        rates = _rates(pipelines, order.global_batch_size * batches, repeats)
        about = {
            "image_size": IMAGE_SIZE,
            "source_shape": list(SOURCE_SHAPE),
            "jpeg_bytes": round(statistics.mean(file.stat().st_size for file in files)),
            "augmentation": AUGMENTATION,
            "batch": order.global_batch_size,
            "cores": len(os.sched_getaffinity(0)),
        }
        for name, (wall, core) in rates.items():
            yield {
                "benchmark": "input",
                "pipeline": name,
                **about,
                "images_per_s": statistics.median(wall),
                "images_per_s_per_core": statistics.median(core),
                "per_core_over_pil": statistics.median(
                    ours / pil for ours, pil in zip(core, rates["pil"][1], strict=True)
                ),
            }
        jpegs = [file.read_bytes() for file in files]
        read = _read_seconds(dataset, order.global_batch_size)
        stages = {
            "host": {"read": read} | _stage_seconds(OUR_STAGES, jpegs, repeats),
            "pil": _stage_seconds(pil_stages(IMAGE_SIZE), jpegs, repeats),
        }
        for name, seconds in stages.items():
            for stage, value in seconds.items():
                yield {
                    "benchmark": "input_stage",
                    "pipeline": name,
                    "stage": stage,
                    "ms_per_image": 1000 * value,
                }
    for device, pairs in DEVICE_NEEDS.items():
        yield {
            "benchmark": "input_need",
            "device": device,
            "pairs_per_s": pairs,
            **{
                f"cores_{name}": pairs / statistics.median(core)
                for name, (_, core) in rates.items()
            },
        }


def draw_dataset(folder: pathlib.Path, pictures: int) -> tuple[PairDataset, list[pathlib.Path]]:
    """Returns a prepared dataset of drawn pictures, one caption each, and their files."""
    from configs import base

    (folder / "images").mkdir()
    entries = []
    # One more for each of the splits that are not measured.
    for number, split in enumerate(["train"] * pictures + ["val", "test"]):
        name = f"{number}.jpg"
        (folder / "images" / name).write_bytes(drawn_jpeg(number))
        sentences = [{"raw": f"picture {number}", "sentid": number}]
        entry = {"filename": name, "split": split, "imgid": number, "sentids": [number]}
        entries.append(entry | {"sentences": sentences})
    content = {"dataset": "drawn", "images": entries}
    (folder / "dataset_drawn.json").write_text(json.dumps(content))
    data = base.get_config().data
    data.update(source="karpathy", dir=str(folder), cache_dir=str(folder / "cache"))
    # What preparing prints is no line of the benchmark.
    with contextlib.redirect_stdout(sys.stderr):
        dataset = load_split(data, IMAGE_SIZE, "train")
    return dataset, [folder / "images" / f"{number}.jpg" for number in range(pictures)]


def drawn_jpeg(number: int) -> bytes:
    """Returns a JPEG with structure of every size, to take as many bytes as a photograph."""
    shape = SOURCE_SHAPE if number % 2 else SOURCE_SHAPE[::-1]
    rng = np.random.default_rng(number)
    pixels = np.full((*shape, 3), 128.0)
    # Cells across the picture and the deviation of their levels, which falls with frequency.
    for cells, deviation in ((4, 50), (16, 30), (64, 15), (256, 10)):
        grid = rng.normal(size=(cells, cells, 3))
        # Mostly grey, as photographs are.
        grid = 0.5 * grid + grid.mean(axis=2, keepdims=True)
        pixels += deviation * cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)
    stream = io.BytesIO()
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


# Each takes what the one before gives.
OUR_STAGES = {
    "decode": lambda jpeg, drawn: preprocessing.decode_jpeg(jpeg),
    "crop and resize": lambda image, drawn: preprocessing.crop(image, drawn.window, IMAGE_SIZE),
    "mirror and RandAugment": preprocessing.augmented,
}


def our_batches(
    dataset: PairDataset, order: BatchOrder, augment_on: str, batches: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the first batches of this project's pipeline."""
    tokens = np.zeros((order.pairs, 1), np.int32)
    return training_batches(
        dataset,
        (tokens, tokens),
        order,
        range(batches),
        image_size=IMAGE_SIZE,
        augmentation=AUGMENTATION,
        augment_on=augment_on,
    )


def _rates(pipelines, images, repeats):
    """Returns for each pipeline its images a second of the clock and of the processor, in turns."""
    rates = {name: ([], []) for name in pipelines}
    for repeat in range(repeats + 1):
        for name, batches in pipelines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in batches():
                pass
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat:  # the first warms up
                rates[name][0].append(images / wall)
                rates[name][1].append(images / cpu)
    return rates


def _stage_seconds(
    stages: dict[str, Callable], jpegs: list[bytes], repeats: int
) -> dict[str, float]:
    """Returns the median processor time of each stage a picture."""
    seconds = {name: [] for name in stages}
    for epoch in range(repeats):
        total = dict.fromkeys(stages, 0.0)
        for pair, jpeg in enumerate(jpegs):
            shape = preprocessing.picture_shape(jpeg)
            drawn = augmentation.draw(AUGMENTATION, 0, epoch, pair, *shape)
            value: Any = jpeg
            for name, stage in stages.items():
                start = time.thread_time()
                value = stage(value, drawn)
                total[name] += time.thread_time() - start
        for name in stages:
            seconds[name].append(total[name] / len(jpegs))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _read_seconds(dataset: PairDataset, batch_size: int) -> float:
    """Returns the processor time of reading a record, a batch at a time."""
    count = len(dataset.image_id)
    start = time.process_time()
    for first in range(0, count, batch_size):
        dataset.images.__getitems__(list(range(first, min(first + batch_size, count))))
    return (time.process_time() - start) / count
