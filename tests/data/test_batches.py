"""Batches are a function of (seed, step): across epochs, resumes and processes."""

import dataclasses
import io
import math
import os
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fne_jax.data import batches
from fne_jax.data.batches import BatchOrder, evaluation_images, training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import PairDataset
from fne_jax.data.preparation.storage import RecordSource
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config, write_karpathy


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("karpathy")
    write_karpathy(folder / "source")
    config = tiny_config(
        data__source="karpathy",
        data__dir=str(folder / "source"),
        data__cache_dir=str(folder / "cache"),
    )
    return config, {s: load_split(config.data, 8, s) for s in ("train", "val", "test")}


def tokens_of(dataset):
    ids = np.arange(len(dataset.captions) * 3, dtype=np.int32).reshape(-1, 3)
    return ids, np.ones_like(ids)


def batches_of(dataset, order, steps, augmentation="crop_flip", **where):
    make_image = TrainingImages(8, augmentation, order.seed)
    return list(
        training_batches(dataset, tokens_of(dataset), order.rows(steps, **where), make_image)
    )


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_every_epoch_visits_every_pair_once():
    order = BatchOrder(seed=3, pairs=23, global_batch_size=4)
    assert order.steps_per_epoch == 5
    rows = list(order.rows(range(15)))
    for epoch in range(3):
        seen = np.concatenate([r.pair for r in rows[epoch * 5 : epoch * 5 + 5]])
        assert len(set(seen.tolist())) == 20
        assert sorted(order.epoch_order(epoch).tolist()) == list(range(23))
        assert {r.epoch for r in rows[epoch * 5 : epoch * 5 + 5]} == {epoch}


def test_pairs_that_are_left_out_are_in_no_batch_and_the_others_keep_their_order():
    whole = BatchOrder(seed=3, pairs=23, global_batch_size=4)
    order = dataclasses.replace(whole, left_out=(2, 7, 22))
    assert order.steps_per_epoch == 5
    for epoch in range(3):
        kept = [row for row in whole.epoch_order(epoch).tolist() if row not in (2, 7, 22)]
        assert order.epoch_order(epoch).tolist() == kept


def test_epochs_and_seeds_differ_without_correlation():
    orders = [BatchOrder(s, 5000, 10).epoch_order(e).argsort() for s, e in ((0, 0), (0, 1), (1, 0))]
    for i in range(3):
        for j in range(i):
            assert abs(np.corrcoef(orders[i], orders[j])[0, 1]) < 0.06


def test_reads_the_pairs_that_it_names(prepared):
    _, splits = prepared
    train = splits["train"]
    order = BatchOrder(0, len(train.captions), 4)
    for batch in batches_of(train, order, range(2), "none"):
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        for row, pair in enumerate(batch["pair_id"]):
            image = train.caption_image[pair]
            assert batch["image_id"][row] == train.image_id[image]
            np.testing.assert_array_equal(batch["input_ids"][row], tokens_of(train)[0][pair])
            jpeg = train.images[int(image)]["image"]
            resized = Image.open(io.BytesIO(jpeg)).resize((8, 8), Image.Resampling.BICUBIC)
            difference = np.abs(batch["image"][row].astype(int) - np.array(resized)).mean()
            assert difference < 2, "as PIL's bicubic, within rounding"


def test_resume_and_processes_see_the_same_batches(prepared):
    _, splits = prepared
    train = splits["train"]  # 13 pairs, which no batch divides
    order = BatchOrder(5, len(train.captions), 4)
    full = batches_of(train, order, range(7), "randaugment")
    for start in (3, 6):
        assert_same(full[start:], batches_of(train, order, range(start, 7), "randaugment"))
    # Processes whose rows are no neighbours, as on many TPU slices.
    local = [np.array([0, 2]), np.array([1, 3])]
    parts = [batches_of(train, order, range(7), "randaugment", local=rows) for rows in local]
    for batch, *of_processes in zip(full, *parts, strict=True):
        for rows, part in zip(local, of_processes, strict=True):
            assert_same([{name: array[rows] for name, array in batch.items()}], [part])


def test_a_pair_is_augmented_alike_in_whatever_batch_it_comes(prepared):
    _, splits = prepared
    train = splits["train"]

    def by_pair(batch_size):
        order = BatchOrder(5, len(train.captions), batch_size)
        batches = batches_of(train, order, range(order.steps_per_epoch), "randaugment")
        return {
            int(pair): image
            for batch in batches
            for pair, image in zip(batch["pair_id"], batch["image"], strict=True)
        }

    threes, fives = by_pair(3), by_pair(5)
    both = threes.keys() & fives.keys()
    assert len(both) >= 9
    for pair in both:
        np.testing.assert_array_equal(threes[pair], fives[pair])


def test_augmentation_differs_between_epochs_of_a_pair(prepared):
    _, splits = prepared
    train = splits["train"]
    order = BatchOrder(5, len(train.captions), 4)
    seen = {}
    for batch in batches_of(train, order, range(6 * order.steps_per_epoch)):
        for pair, image in zip(batch["pair_id"], batch["image"], strict=True):
            seen.setdefault(int(pair), []).append(image.tobytes())
    assert all(len(set(images)) > 1 for images in seen.values() if len(images) > 2)


@pytest.mark.parametrize("stripes", [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0, 3], [1], [2]]])
@pytest.mark.parametrize("in_memory", [False, True])
def test_evaluation_covers_every_image_once_in_order(prepared, in_memory, stripes):
    _, splits = prepared
    dataset = splits["train"]  # 7 images
    expected = np.stack(
        [
            Image.open(io.BytesIO(dataset.images[n]["image"])).resize((8, 8), Image.BICUBIC)
            for n in range(7)
        ]
    )
    if in_memory:
        dataset = dataclasses.replace(dataset, images=expected)
    for batch_size in (4, 12):
        count = math.ceil(7 / batch_size)
        images = np.full((count, batch_size, 8, 8, 3), 99, np.uint8)
        for stripe in stripes:
            local = np.flatnonzero(np.isin(np.arange(batch_size) % 4, stripe))
            batches = list(evaluation_images(dataset, 8, batch_size, local))
            assert len(batches) == count
            images[:, local] = np.stack(batches)
        images = images.reshape(-1, 8, 8, 3)
        np.testing.assert_array_equal(images[:7], expected)
        assert (images[7:] == 0).all()


def jpeg_bytes(seed, height=375, width=500):
    small = np.random.default_rng(seed).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class Jpegs:
    """Records in memory, as a prepared dataset gives them."""

    def __init__(self, jpegs):
        self._jpegs = jpegs

    def __getitems__(self, indices):
        return [{"image": self._jpegs[index]} for index in indices]


def records_of(source, count):
    table = pa.table({"record": range(count), "file": [""] * count})
    records = RecordSource(pathlib.Path("a folder"), "train", table, "")
    records._source = source
    return records


def dataset_of(jpegs):
    count = len(jpegs)
    return PairDataset(
        captions=["an image"] * count,
        caption_image=np.arange(count, dtype=np.int32),
        image_id=np.arange(count, dtype=np.int32) + 100,
        images=records_of(Jpegs(jpegs), count),
        caption_id=np.arange(count),
        source_image_id=[str(number) for number in range(count)],
    )


def test_a_damaged_record_is_named():
    jpegs = [jpeg_bytes(n, 20, 30) for n in range(6)]
    jpegs[4] = jpegs[4][:300]
    dataset = dataset_of(jpegs)
    message = r"record 4 of the split train in a folder is damaged \(.*prepare the dataset again"
    with pytest.raises(UserError, match=message):
        batches_of(dataset, BatchOrder(0, 6, 3), range(2))
    with pytest.raises(UserError, match=message):
        list(evaluation_images(dataset, 8, 4))


def test_a_record_that_cannot_be_read_is_named():
    class Unreadable(Jpegs):
        def __getitems__(self, indices):
            if 2 in indices:
                raise RuntimeError("checksum")
            return super().__getitems__(indices)

    records = Unreadable([jpeg_bytes(n, 20, 30) for n in range(5)])
    dataset = dataclasses.replace(dataset_of([b""] * 5), images=records_of(records, 5))
    with pytest.raises(
        UserError, match=r"record 2 of the split train in a folder is damaged \(checksum"
    ):
        batches_of(dataset, BatchOrder(0, 5, 5), range(1))


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_five_epochs():
    # 96 rows of 442 kB an epoch: keeping one epoch's would show.
    dataset = dataset_of([jpeg_bytes(n) for n in range(96)])
    order = BatchOrder(0, 96, 16)
    ids = np.zeros((96, 3), np.int32)
    make_image = TrainingImages(384, "randaugment", seed=0)
    batches = training_batches(dataset, (ids, ids), order.rows(range(30)), make_image)
    resident = []
    for step, _ in enumerate(batches):
        if step % 6 == 5:
            resident.append(resident_bytes())
    assert len(resident) == 5
    assert resident[-1] < 1.05 * resident[0]


def test_in_memory_arrays_go_the_same_way():
    config = tiny_config()
    train = load_split(config.data, 8, "train")
    order = BatchOrder(0, len(train.captions), 16)
    batches = batches_of(train, order, range(4))
    assert_same(batches[2:], batches_of(train, order, range(2, 4)))
    for batch in batches_of(train, order, range(4), "none"):
        np.testing.assert_array_equal(
            batch["image"], train.images[train.caption_image[batch["pair_id"]]]
        )


def test_padding_adds_zero_rows():
    padded = batches.pad_rows(np.ones((2, 3)), 5)
    assert padded.shape == (5, 3) and padded.sum() == 6
