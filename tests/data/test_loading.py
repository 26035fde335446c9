"""Every layout of captioned images is prepared, loaded and read in batches."""

import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fne_jax.configuration.rules import validate
from fne_jax.data.batches import BatchOrder, evaluation_images, training_batches
from fne_jax.data.images.preprocessing import TrainingImages, evaluation_image
from fne_jax.data.pairs import SPLITS
from fne_jax.data.sources.registry import load_split, load_splits
from fne_jax.errors import UserError
from tests.support import sources
from tests.support.tiny import tiny_config


def config_of(source, folder, cache, **fields):
    return tiny_config(
        data__source=source, data__dir=str(folder), data__cache_dir=str(cache), **fields
    )


WRITE = {
    "coco": sources.write_coco,
    "json_lists": sources.write_json_lists,
    "csv": lambda folder: sources.write_csv(folder, sources.table_rows(folder)),
    "jsonl": lambda folder: sources.write_jsonl(folder, sources.table_rows(folder)),
}


@pytest.fixture(scope="module", params=list(WRITE))
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    WRITE[request.param](folder / "source")
    config = config_of(request.param, folder / "source", folder / "cache")
    return config, {split: load_split(config.data, 8, split) for split in SPLITS}


def test_images_and_captions_of_each_layout(prepared):
    config, splits = prepared
    number = 0
    for split, dataset in splits.items():
        count = sources.SPLITS[split]
        assert len(dataset.image_id) == len(dataset.images) == count
        assert len(dataset.captions) == len(dataset.caption_id) == len(dataset.caption_image)
        assert dataset.truth is None
        expected = {
            f"Image {number + i}, seen {n} times.": i
            for i in range(count)
            for n in range(2 + (number + i) % 3)
        }
        assert dict(zip(dataset.captions, dataset.caption_image, strict=True)) == expected
        for i, name in ((0, f"image{number}.jpg"), (count - 1, f"image{number + count - 1}")):
            assert dataset.images[i]["image"] == sources.jpeg(
                number + i, width=30 + (number + i) % 11
            )
            if config.data.source != "coco":
                assert name in dataset.source_image_id[i]
        number += count
    for ids in ("image_id", "caption_id"):
        everywhere = np.concatenate([getattr(dataset, ids) for dataset in splits.values()])
        assert len(set(everywhere.tolist())) == len(everywhere)


def test_batches_of_each_layout(prepared):
    _, splits = prepared
    train = splits["train"]
    ids = np.arange(len(train.captions), dtype=np.int32)[:, None]
    order = BatchOrder(0, len(train.captions), 8)
    batches = list(
        training_batches(
            train,
            (ids, np.ones_like(ids)),
            order.rows(range(order.steps_per_epoch)),
            TrainingImages(8, "none", seed=0),
        )
    )
    assert len(batches) == len(train.captions) // 8
    for batch in batches:
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["pair_id"])
        for image, image_id, pair in zip(
            batch["image"], batch["image_id"], batch["pair_id"], strict=True
        ):
            row = train.caption_image[pair]
            assert image_id == train.image_id[row]
            expected = evaluation_image(train.images[int(row)]["image"], 8)
            np.testing.assert_array_equal(image, expected)
    (images,) = evaluation_images(splits["val"], 8, 8)
    expected = [evaluation_image(record["image"], 8) for record in splits["val"].images]
    np.testing.assert_array_equal(images[:5], expected)


def test_coco_keeps_its_own_ids(tmp_path):
    entries = sources.write_coco(tmp_path / "source")
    config = config_of("coco", tmp_path / "source", tmp_path / "cache")
    for split in SPLITS:
        dataset = load_split(config.data, 8, split)
        of_split = [e for e in entries if e["split"].replace("restval", "train") == split]
        assert dataset.image_id.tolist() == [e["cocoid"] for e in of_split]
        names = [f"{e['filepath']}/{e['filename']}" for e in of_split]
        assert dataset.source_image_id == names
        sentences = [s for e in of_split for s in e["sentences"]]
        assert dataset.caption_id.tolist() == [s["sentid"] for s in sentences]
        assert dataset.captions == [s["raw"] for s in sentences]


def test_a_rendered_split_knows_its_truth(tmp_path):
    config = config_of(
        "shapes", "", tmp_path, data__shapes__train_images=2, data__shapes__val_images=2,
        data__shapes__test_images=7,
    )  # fmt: skip
    test = load_split(config.data, 8, "test")
    matrix = test.truth.matrix()
    assert matrix.shape == (7, 35)
    assert matrix[test.caption_image, np.arange(35)].all(), "captions are true of their images"
    assert not matrix.all()
    assert test.image_id.tolist() == list(range(4, 11)), "ids count on from split to split"
    for split in ("train", "val"):
        assert load_split(config.data, 8, split).truth.matrix().shape == (2, 10)


def test_preparing_asks_nobody_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def ask(name):
        raise AssertionError(f"a bucket is asked for {name}")

    monkeypatch.setattr(tfds.core.utils.gcs_utils, "gcs_dataset_info_files", ask)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    sources.write_coco(tmp_path / "source")
    for _ in range(2):
        load_split(config_of("coco", tmp_path / "source", tmp_path / "cache").data, 8, "val")
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "dataset_info.json",
        "features.json",
        "prepared.json",
        "inputs.arrow",
        "val.arrow",
        "skipped.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", None])
def test_damaged_notes_of_a_prepared_dataset_are_told_with_their_folder(tmp_path, name, content):
    sources.write_coco(tmp_path / "source")
    data = config_of("coco", tmp_path / "source", tmp_path / "cache").data
    whole = load_split(data, 8, "val")
    (path,) = (tmp_path / "cache").rglob(name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        again = load_split(data, 8, "val")
        again.images[0]
    except UserError as error:
        assert str(path.parent) in str(error) and "delete" in str(error) and "\n" not in str(error)
    else:  # prepared anew, or nothing of the file is needed
        assert again.identity == whole.identity


def test_unknown_sources_and_splits_list_the_choices():
    config = tiny_config()
    config.data.source = "karpaty"
    with pytest.raises(UserError, match=r"'karpaty'; expected one of flickr8k, .*jsonl"):
        load_split(config.data, 8, "train")
    with pytest.raises(UserError, match=r"'training' is unknown; expected one of train, val, test"):
        load_split(tiny_config().data, 8, "training")


def test_a_split_may_come_from_elsewhere(tmp_path):
    sources.write_coco(tmp_path / "coco")
    WRITE["csv"](tmp_path / "table")
    config = config_of(
        "coco", tmp_path / "coco", tmp_path / "cache", data__val=f"csv:{tmp_path / 'table'}"
    )
    train, val, test = load_splits(config.data, 8)
    assert train.image_id[0] == test.image_id[0] - 7 * 29 == 391_000, "COCO's own"
    assert val.image_id.tolist() == [90 - number for number in range(24, 29)], "the table's own"
    assert load_split(config.data, 8, "val").identity == val.identity
    with pytest.raises(UserError, match=r'data.test is .*expected "" or SOURCE:FOLDER'):
        validate(config_of("coco", "", tmp_path, data__test=str(tmp_path / "table")))
