"""How fast training images are read, decoded, augmented and batched, beside a pipeline in PIL.

That one does the same as carefully as PIL allows.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
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
from PIL import Image, ImageEnhance, ImageOps

from fne_jax.data.batches import BatchOrder, training_batches
from fne_jax.data.images import preprocessing
from fne_jax.data.images.augmentation import FILL, OPERATIONS, Augmentation, sample
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
    """Times this project's pipeline and PIL's in turns.

    Both make the same crops, mirrorings and operations of the same images. `images_per_s` is by
    the clock, with as many threads as the pipeline takes (PIL's: one); `images_per_s_per_core` is
    images in a second of processor time, which other programs on the machine do not change much.
    Starting the pipeline is included.

    Args:
      images: The number of images to render.
      batch_size: The images in a batch.
      batches: The batches in each measurement.
      repeats: The measurements of each pipeline, whose median counts.

    Yields:
      A line for each pipeline, one for each of its stages, and one for what each kind of device
      needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        dataset, files = render_dataset(pathlib.Path(folder), images)
        order = BatchOrder(0, images, min(batch_size, images))
        pipelines = {
            "ours": lambda: our_batches(dataset, order, batches),
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
            "ours": {"read": read} | _stage_seconds(OUR_STAGES, jpegs, repeats),
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
OUR_STAGES = {
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


def _rates(pipelines, images, repeats):
    """Returns the images a second of each pipeline by the clock and by processor time."""
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
    """Returns the median processor time of each stage in seconds an image."""
    seconds = {name: [] for name in stages}
    for epoch in range(repeats):
        total = dict.fromkeys(stages, 0.0)
        for pair, jpeg in enumerate(jpegs):
            shape = preprocessing.image_shape(jpeg)
            sampled = sample(AUGMENTATION, 0, epoch, pair, *shape)
            value: Any = jpeg
            for name, stage in stages.items():
                start = time.thread_time()
                value = stage(value, sampled)
                total[name] += time.thread_time() - start
        for name in stages:
            seconds[name].append(total[name] / len(jpegs))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _read_seconds(dataset: PairDataset, batch_size: int) -> float:
    """Returns the processor time in seconds of reading a record, a batch at a time."""
    count = len(dataset.image_id)
    start = time.process_time()
    for first in range(0, count, batch_size):
        dataset.images.__getitems__(list(range(first, min(first + batch_size, count))))
    return (time.process_time() - start) / count


def pil_batches(
    files: list[pathlib.Path], order: BatchOrder, steps: range, augmentation: str, size: int
) -> Iterator[np.ndarray]:
    """Yields [batch, size, size, 3] uint8 batches, from files that are read as they come.

    Args:
      files: A JPEG for each pair.
      order: The order of the pairs.
      steps: The batches to yield.
      augmentation: A key of `augmentation.AUGMENTATIONS`.
      size: The pixels of a side.
    """
    for rows in order.rows(steps):
        images = []
        for pair in rows.pair:
            image = Image.open(io.BytesIO(files[pair].read_bytes()))
            width, height = image.size
            sampled = sample(augmentation, order.seed, rows.epoch, int(pair), height, width)
            images.append(np.asarray(_augment(_crop(image, sampled, size), sampled)))
        yield np.stack(images)


def _crop(image: Image.Image, sampled: Augmentation, size: int) -> Image.Image:
    """Decodes no larger than needed, then crops and resizes in one call."""
    width, height = image.size
    top, left, crop_height, crop_width = sampled.window
    least = math.ceil(size * width / crop_width), math.ceil(size * height / crop_height)
    image.draft("RGB", least)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _augment(image: Image.Image, sampled: Augmentation) -> Image.Image:
    if sampled.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, argument in zip(sampled.operations, sampled.arguments, strict=True):
        image = _OPERATIONS[OPERATIONS[operation]](image, argument)
    return image


def _affine(image, matrix, resample=Image.Resampling.BILINEAR):
    transform = Image.Transform.AFFINE
    return image.transform(image.size, transform, matrix, resample, fillcolor=(FILL,) * 3)


def _moved(image, x, y):
    # By whole pixels, where PIL need not interpolate.
    return _affine(image, (1, 0, x, 0, 1, y), Image.Resampling.NEAREST)


_OPERATIONS = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, tangent: _affine(image, (1, -tangent, 0, 0, 1, 0)),
    "shear_y": lambda image, tangent: _affine(image, (1, 0, 0, -tangent, 1, 0)),
    "translate_x": lambda image, pixels: _moved(image, pixels, 0),
    "translate_y": lambda image, pixels: _moved(image, 0, pixels),
    "rotate": lambda image, degrees: image.rotate(
        degrees, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3
    ),
}


def _decode(jpeg, sampled):
    del sampled
    image = Image.open(io.BytesIO(jpeg))
    image.load()
    return image


def pil_stages(size: int) -> dict[str, Callable]:
    """Returns the stages of an image by name; each takes what the one before gives."""
    return {
        "decode": _decode,
        "crop and resize": lambda image, sampled: _crop(image, sampled, size),
        "mirror and RandAugment": _augment,
        "to an array": lambda image, _: np.asarray(image),
    }
