"""Whatever `prepare` accepts of damaged images, training and evaluation read."""

import collections
import errno
import os

import numpy as np
import pytest

from fne_jax.data.batches import BatchOrder, evaluation_images, training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.sources.image_files import stamp_of, stamps_of
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from tests.support import sources
from tests.support.tiny import tiny_config


def accepted_and_read(folder, count):
    """Prepares damaged images; returns how many of each kind were accepted, and the split."""
    rows = sources.table_rows(folder / "source")
    kind_of = {}
    for number, (kind, content) in enumerate(sources.damaged_images(count)):
        name = f"images/damaged{number}.jpg"
        (folder / "source" / name).write_bytes(content)
        rows.append(
            {"image": name, "caption": "Some words.", "split": "train", "image_id": 1000 + number}
        )
        kind_of[name] = kind
    sources.write_jsonl(folder / "source", rows)
    config = tiny_config(
        data__source="jsonl",
        data__dir=str(folder / "source"),
        data__cache_dir=str(folder / "cache"),
        data__max_skipped=count,
    )
    train = load_split(config.data, 8, "train")
    accepted = collections.Counter(
        kind_of[name] for name in train.source_image_id if name in kind_of
    )
    return accepted, train


def read_all(train):
    """Reads all images in each way; returns how many were read in each."""
    pairs, images = len(train.captions), len(train.image_id)
    ids = np.zeros((pairs, 3), np.int32)
    read = []
    for augmentation, size in (("none", 24), ("crop_flip", 8), ("randaugment", 100)):
        make_image = TrainingImages(size, augmentation, seed=0)
        rows = BatchOrder(0, pairs, pairs).rows(range(1))
        (batch,) = training_batches(train, (ids, ids), rows, make_image)
        read.append(len(set(batch["image_id"].tolist())))
    batches = list(evaluation_images(train, 16, 10))
    read.append(min(images, 10 * len(batches)))
    return read


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_training_reads_every_damaged_image_that_is_accepted(tmp_path, count, capsys):
    accepted, train = accepted_and_read(tmp_path, count)
    read = read_all(train)
    with capsys.disabled():
        print(f"\n{count} tried, {accepted.total()} accepted: {dict(accepted)}, {read}")
    assert 0 < accepted.total() < count / 2, "of both there are some"
    assert read == [len(train.image_id)] * 4


def test_a_file_is_absent_where_the_file_system_says_so_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    absent = ("none", "file/below", "circle", "n" * 999, ".")
    assert stamps_of([tmp_path / name for name in absent]) == [(-1, 0)] * len(absent)
    assert stamp_of(tmp_path / "file")[0] == 4

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(UserError, match=r"file: cannot be read: .*Stale file handle") as error:
        stamp_of(tmp_path / "file")
    assert error.value.exit_code == 74
