"""Batches are a function of (seed, step): across epochs, resumes and processes."""

import io

import numpy as np
import pytest
from PIL import Image

from fne_jax.data import input_pipeline, karpathy
from fne_jax.data.datasets import load_split
from fne_jax.data.input_pipeline import BatchOrder, evaluation_images, training_batches
from tests.tiny import tiny_config, write_karpathy


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
    return list(
        training_batches(
            dataset,
            tokens_of(dataset),
            order,
            steps,
            image_size=8,
            augmentation=augmentation,
            **where,
        )
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
    train = splits["train"]
    order = BatchOrder(5, len(train.captions), 4)
    whole = batches_of(train, order, range(7))
    assert_same(whole[3:], batches_of(train, order, range(3, 7)))
    halves = [batches_of(train, order, range(7), process=p, processes=2) for p in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(whole, joined)


def test_augmentation_differs_between_epochs_of_a_pair(prepared):
    _, splits = prepared
    train = splits["train"]
    order = BatchOrder(5, len(train.captions), 4)
    seen = {}
    for batch in batches_of(train, order, range(6 * order.steps_per_epoch)):
        for pair, image in zip(batch["pair_id"], batch["image"], strict=True):
            seen.setdefault(int(pair), []).append(image.tobytes())
    assert all(len(set(images)) > 1 for images in seen.values() if len(images) > 2)


def test_evaluation_covers_every_image_once_in_order(prepared):
    _, splits = prepared
    test = splits["test"]
    batches = list(evaluation_images(test, 8, 3))
    assert [len(b) for b in batches] == [3, 3]
    assert (batches[1][1:] == 0).all()
    alone = [next(evaluation_images(test, 8, 1)) for _ in range(1)]
    np.testing.assert_array_equal(batches[0][:1], alone[0])
    assert len({image.tobytes() for image in np.concatenate(batches)[:4]}) == 4


def test_in_memory_arrays_go_the_same_way():
    config = tiny_config()
    train = load_split(config.data, 8, "train")
    order = BatchOrder(0, len(train.captions), 16)
    batches = batches_of(train, order, range(4))
    assert_same(batches[2:], batches_of(train, order, range(2, 4)))
    for batch in batches:
        np.testing.assert_array_equal(
            batch["image"], train.images[train.caption_image[batch["pair_id"]]]
        )


def test_splits_keep_order_captions_and_restval(prepared, tmp_path):
    _, splits = prepared
    content = write_karpathy(tmp_path / "again")
    records = karpathy.read_karpathy(tmp_path / "again" / "dataset_made-up.json")
    assert [r.image_id for r in records["train"]] == list(range(7)), "restval is training data"
    for split, dataset in splits.items():
        assert dataset.image_id.tolist() == [r.image_id for r in records[split]]
        raw = [s["raw"] for r in records[split] for s in content["images"][r.image_id]["sentences"]]
        assert dataset.captions == raw
    ids = np.concatenate([d.image_id for d in splits.values()])
    assert len(set(ids.tolist())) == len(ids) == 14


def test_padding_adds_zero_rows():
    padded = input_pipeline.pad_rows(np.ones((2, 3)), 5)
    assert padded.shape == (5, 3) and padded.sum() == 6
