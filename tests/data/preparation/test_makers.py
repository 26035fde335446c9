"""Whoever makes the shards, the dataset is the same, and what fails is told in one line."""

import functools
import os
import signal

import pytest

from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation import image_shards, makers, preparing
from fne_jax.data.preparation.image_shards import plan_shards
from fne_jax.data.sources.image_files import MadeImage
from fne_jax.data.sources.listing import ListedImage
from fne_jax.errors import UserError
from tests.support import sources
from tests.support.tiny import tiny_config

SEVERAL = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"


class Killing(MadeImage):
    """An image whose reading ends the process that reads it."""

    def read(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Unreadable(MadeImage):
    """An image on a disk that fails."""

    def read(self):
        raise OSError(5, "Input/output error")


class Readable(MadeImage):
    """An image."""

    def read(self):
        return sources.jpeg(1)


def shards_of(kind):
    """Returns two shards of an image each."""
    images = [
        ListedImage(split, kind(split, 5), split, number, split, ["One."], [number])
        for number, split in enumerate(("train", "val"))
    ]
    return plan_shards(images, [(5, 0)] * 2, [], 0)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares 35 images in shards of 7 by a maker; returns what was prepared."""
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    monkeypatch.setattr(image_shards, "IMAGES_PER_SHARD", 7)

    def call(name, maker):
        config = tiny_config(
            data__source="jsonl",
            data__dir=str(tmp_path / "source"),
            data__cache_dir=str(tmp_path / name),
        )
        prepared = preparing.prepare(config.data, maker)
        for split in SPLITS:
            prepared.check(split)
        return prepared

    return call


@pytest.mark.slow
def test_processes_make_what_threads_make(prepare):
    by_threads = prepare("threads", makers.in_threads)
    by_processes = prepare("processes", functools.partial(makers.in_processes, processes=2))
    assert by_processes.summaries == by_threads.summaries
    assert list(by_processes.shards.values()) == list(by_threads.shards.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message", "code"),
    [
        (Killing, "a process that prepares images ended: .*fewer --processes", 2),
        (Unreadable, "/train: cannot be read: .*Input/output error", 74),
    ],
)
def test_what_ends_a_process_is_told(tmp_path, kind, message, code):
    with pytest.raises(UserError, match=message) as error:
        list(makers.in_processes(shards_of(kind), tmp_path, 1))
    assert error.value.exit_code == code


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--runner=DirectRunner", SEVERAL])
def test_beam_makes_what_threads_make(prepare, options):
    pytest.importorskip("apache_beam", reason="the extra `beam` has packages of its own: .ci/run")
    by_threads = prepare("threads", makers.in_threads)
    by_beam = prepare("beam", functools.partial(makers.by_beam, options=options))
    assert by_beam.summaries == by_threads.summaries
    assert list(by_beam.shards.values()) == list(by_threads.shards.values())


def test_a_pipeline_that_leaves_shards_out_is_noticed(tmp_path, monkeypatch):
    beam = pytest.importorskip("apache_beam", reason="the extra `beam`: .ci/run")
    monkeypatch.setattr(beam, "Create", lambda shards: beam.transforms.core.Create(shards[1:]))
    shards = shards_of(Readable)
    with pytest.raises(UserError, match="left out 1 of 2 shards"):
        list(makers.by_beam(shards, tmp_path, "--runner=DirectRunner"))
