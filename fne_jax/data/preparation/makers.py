"""What makes the shards of a dataset: threads, processes, or an Apache Beam pipeline."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from PIL import Image

from fne_jax.data.preparation.image_shards import ImageShard, write_shard
from fne_jax.errors import UserError, needs_extra
from fne_jax.files import as_user_error

# Makes shards in a folder, and yields once for each of them that is done.
Maker = Callable[[Sequence[ImageShard], pathlib.Path], Iterator[None]]


def in_threads(
    shards: Sequence[ImageShard], folder: pathlib.Path, threads: int | None = None
) -> Iterator[None]:
    """Makes shards in threads of this process, by default one for each core.

    PIL and the decoder of JPEGs let go of the interpreter while they work.
    """
    Image.init()  # PIL loads its formats on first use, which must not happen in many threads
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            waiting = [pool.submit(write_shard, shard, folder, stop.is_set) for shard in shards]
            for one in concurrent.futures.as_completed(waiting):
                yield one.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def in_processes(
    shards: Sequence[ImageShard], folder: pathlib.Path, processes: int
) -> Iterator[None]:
    """Makes shards in so many processes, whose main module must be one that can be imported.

    Raises UserError if one of them is killed.
    """
    # Neither threads nor TensorFlow survive a fork.
    spawn = multiprocessing.get_context("spawn")
    advice = "was memory short? Give fewer --processes; what is finished is kept"
    with (
        as_user_error("a process that prepares images ended", advice, BrokenProcessPool),
        concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool,
    ):
        try:
            waiting = [pool.submit(write_shard, shard, folder) for shard in shards]
            for one in concurrent.futures.as_completed(waiting):
                yield one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def by_beam(shards: Sequence[ImageShard], folder: pathlib.Path, options: str) -> Iterator[None]:
    """Makes shards by a pipeline of Apache Beam, whose workers see the folder by the same path.

    Args:
      shards: The shards.
      folder: Where their files go.
      options: The pipeline's, as on its command line, e.g. "--runner=DirectRunner".

    Raises:
      UserError: If Beam is not installed, or the pipeline fails or leaves out shards.
    """
    with needs_extra("beam", "--beam"):
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

    with (
        as_user_error("the pipeline of Beam failed", errors=Exception),
        beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline,
    ):
        made = pipeline | beam.Create(shards) | beam.Reshuffle()
        made | beam.Map(functools.partial(write_shard, folder=folder))
    # A runner has lost elements before (DirectRunner with several processes).
    lost = sum(not shard.is_made(folder) for shard in shards)
    if lost:
        raise UserError(
            f"the pipeline of Beam left out {lost} of {len(shards)} shards, or wrote them where "
            f"{folder} is another folder; give the same command again, or workers one file system"
        )
    yield from [None] * len(shards)
