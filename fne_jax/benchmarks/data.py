"""How preparing, starting and reading grow with a dataset, on made-up tars of small images."""

from __future__ import annotations

import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fne_jax import configuration
from fne_jax.benchmarks.timing import machine
from fne_jax.data.batches import BatchOrder, training_batches
from fne_jax.data.captions import fit_tokenizer
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources.registry import load_splits
from fne_jax.model.tokenizers import clean_captions, kept_tokens

_TOP = pathlib.Path(__file__).resolve().parents[2]
_PER_TAR = 10_000  # as img2dataset's
_SIDE = 64
_PICTURES, _WORDS = 200, 3000  # different ones
_EVALUATED = 500  # images of val and of test
_BATCH = 128
_CONFIG = "configs/flickr8k.py"


def data_lines(sizes: Sequence[int], batches: int) -> Iterator[dict[str, Any]]:
    """Yields one benchmark line for each size.

    `prepare_1_s` and `prepare_2_s` are a whole `prepare --processes`, with one and with two;
    `first_start_s` and `start_s` the time from the start of a process to the first batch, with
    captions to tokenize and with their tokens kept (no model is built); `images_per_s` the rate of
    the batches after it. `..._mib` is the most memory of any one of the processes.

    An image has one caption; `batches` of 128 are read after the first.
    """
    for pairs in sizes:
        with tempfile.TemporaryDirectory() as folder:
            _write_tars(pathlib.Path(folder), pairs)
            line: dict[str, Any] = {"benchmark": "data", "pairs": pairs}
            for processes in (2, 1):
                seconds, peak = _prepare(folder, f"cache{processes}", processes)
                line |= {f"prepare_{processes}_s": seconds, f"prepare_{processes}_mib": peak}
            for name in ("first_start", "start"):
                line |= {f"{name}_{key}": value for key, value in _started(folder, batches).items()}
            yield line | machine()


def _write_tars(folder, pairs):
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(_PICTURES):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3)).astype(np.uint8))
        stream = io.BytesIO()
        small.resize((_SIDE, _SIDE)).save(stream, "JPEG")
        jpegs.append(stream.getvalue())
    for split, count in zip(SPLITS, (pairs, _EVALUATED, _EVALUATED), strict=True):
        for start in range(0, count, _PER_TAR):
            with tarfile.open(folder / f"{split}-{start:09}.tar", "w") as tar:
                for number in range(start, min(start + _PER_TAR, count)):
                    words = " ".join(f"word{word}" for word in rng.integers(0, _WORDS, 10))
                    name, jpeg = f"{number:09}", jpegs[number % _PICTURES]
                    # A comment tells each image from the others.
                    comment = f"{split} {name}".encode()
                    length = (len(comment) + 2).to_bytes(2, "big")
                    jpeg = jpeg[:2] + b"\xff\xfe" + length + comment + jpeg[2:]
                    for ending, content in (("jpg", jpeg), ("txt", words.encode())):
                        member = tarfile.TarInfo(f"{name}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def _overrides(folder, cache):
    return [
        "--config.data.source=webdataset",
        f"--config.data.dir={folder}",
        f"--config.data.cache_dir={folder}/{cache}",
    ]


def _prepare(folder, cache, processes):
    """Returns the seconds and the MiB of a process that prepares."""
    arguments = [f"--config={_CONFIG}", *_overrides(folder, cache), f"--processes={processes}"]
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "fne_jax.prepare", *arguments],
        cwd=_TOP,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)  # `Popen.wait` tells no memory
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"prepare ended with {child.returncode}")
    return time.monotonic() - began, usage.ru_maxrss / 2**10


def _started(folder, batches):
    """Returns what a process of its own measures with `start`."""
    call = f"from fne_jax.benchmarks import data; data.start({folder!r}, {batches}, {time.time()})"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=_TOP, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def start(folder: str, batches: int, began: float) -> None:
    """Prints how long a run takes to its first batch, and what it then reads, as a JSON object.

    Args:
      folder: The folder of the tars, with what was prepared of them.
      batches: How many batches are read after the first.
      began: When the process was started, in seconds since the epoch.
    """
    config = configuration.load_config(_CONFIG, _overrides(folder, "cache1"))
    config = configuration.with_model_defaults(config, {})
    train, *_ = splits = load_splits(config.data, _SIDE)
    for split in splits:
        assert split.identity
    some = clean_captions(config, train.captions[:10_000])
    tokenizer = fit_tokenizer(some, config.data.vocab_size)
    length = config.data.text_length
    tokens = kept_tokens(config, tokenizer, train, length)
    rows = BatchOrder(0, len(train.captions), _BATCH).rows(range(batches + 1))
    made = training_batches(train, tokens, rows, TrainingImages(_SIDE, "none", seed=0))
    next(made)
    first = time.time()
    count = sum(len(batch["image"]) for batch in made)
    told = {
        "s": first - began,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "images_per_s": count / (time.time() - first),
    }
    print(json.dumps(told))
