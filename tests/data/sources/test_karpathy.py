"""Karpathy's layout: what is read of it, and mistakes in it."""

import json

import pytest

from fne_jax.data.sources import karpathy
from fne_jax.errors import UserError
from tests.support import sources
from tests.support.tiny import write_karpathy


def test_splits_keep_order_captions_and_restval(tmp_path):
    content = write_karpathy(tmp_path)
    assert content["images"][1]["split"] == "restval"
    listing = karpathy.read_listing(str(tmp_path))
    assert listing.name == "made-up"
    images = [image for split in ("train", "val", "test") for image in listing.splits[split]]
    assert [len(listing.splits[split]) for split in ("train", "val", "test")] == [7, 3, 4]
    assert [image.image_id for image in images] == list(range(14)), "restval is training data"
    for image, entry in zip(images, content["images"], strict=True):
        assert image.captions == [sentence["raw"] for sentence in entry["sentences"]]
        assert image.path == tmp_path / "images" / entry["filename"]


def test_coco_keeps_its_own_ids_and_folders(tmp_path):
    entries = sources.write_coco(tmp_path)
    listing = karpathy.read_listing(str(tmp_path), "coco")
    images = [image for split in ("train", "val", "test") for image in listing.splits[split]]
    for image, entry in zip(images, entries, strict=True):
        assert (image.image_id, image.source_id) == (entry["cocoid"], str(entry["cocoid"]))
        assert image.caption_ids == [sentence["sentid"] for sentence in entry["sentences"]]
        assert image.path == tmp_path / "images" / entry["filepath"] / entry["filename"]


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k", "coco"])
def test_a_missing_download_says_what_to_put_where(tmp_path, name):
    with pytest.raises(UserError) as error:
        karpathy.read_listing(str(tmp_path), name)
    for part in (str(tmp_path), f"dataset_{name}.json", "caption_datasets.zip", "https://",
                 "images/"):  # fmt: skip
        assert part in str(error.value)


def test_a_missing_folder_of_images_says_what_to_put_where(tmp_path):
    sources.write_coco(tmp_path)
    (tmp_path / "images" / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"images/val2014 is not there.*by hand.*val2014\.zip"):
        karpathy.read_listing(str(tmp_path), "coco")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cocoid", 391_000, r"images\[2\]: the image id 391000 is also that of .*images\[0\]"),
        ("cocoid", 2**31, r"images\[2\]: the image id is 2147483648"),
        ("cocoid", "x", r"images\[2\]: the image id is 'x'"),
        ("filename", 5, r"images\[2\]: 'filename' is 5"),
        (
            "sentences",
            [{"raw": "words", "sentid": "x"}],
            r"images\[2\]: the id of a caption is 'x'",
        ),
    ],
)
def test_mistakes_are_named_with_their_entry(tmp_path, field, value, message):
    entries = sources.write_coco(tmp_path)
    entries[2][field] = value
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match=message):
        karpathy.read_listing(str(tmp_path), "coco")
