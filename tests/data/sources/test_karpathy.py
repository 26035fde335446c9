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
    images = listing.images
    assert [image.split for image in images] == ["train"] * 7 + ["val"] * 3 + ["test"] * 4
    assert [image.image_id for image in images] == list(range(14)), "restval is training data"
    for image, entry in zip(images, content["images"], strict=True):
        assert image.captions == [sentence["raw"] for sentence in entry["sentences"]]
        assert image.path == tmp_path / "images" / entry["filename"]


def test_coco_keeps_its_own_ids_and_folders(tmp_path):
    entries = sources.write_coco(tmp_path)
    listing = karpathy.read_listing(str(tmp_path), "coco")
    for image, entry in zip(listing.images, entries, strict=True):
        name = f"{entry['filepath']}/{entry['filename']}"
        assert (image.image_id, image.source_id) == (entry["cocoid"], name)
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
    with pytest.raises(UserError, match=r"images/val2014 does not exist.*by hand.*val2014\.zip"):
        karpathy.read_listing(str(tmp_path), "coco")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cocoid", 391_000, r"images\[2\]: the image id 391000 is also that of .*images\[0\]"),
        ("cocoid", "x", r"images\[2\]: the image id is 'x'"),
        ("filename", 5, r"images\[2\]: 'filename' is 5"),
        (
            "sentences",
            [{"raw": "words", "sentid": "x"}],
            r"images\[2\]: the id of a caption is 'x'",
        ),
        ("sentences", [{"raw": "words", "sentid": True}], "the id of a caption is True"),
        (
            "sentences",
            [{"raw": "words", "sentid": 770_000}],
            r"images\[2\]: the id of a caption, 770000, already appears in .*images\[0\]",
        ),
        ("cocoid", True, r"images\[2\]: the image id is True"),
        ("filename", "a\0.jpg", r"images\[2\]: 'filename' is 'a\\x00.jpg'"),
        ("filename", "\ud800.jpg", r"images\[2\]: 'filename' is '\\ud800.jpg'"),
        ("filepath", ["a"], r"images\[2\]: 'filepath' is \['a'\]"),
        ("split", ["train"], r"images\[2\]: 'split' is \['train'\]"),
    ],
)
def test_mistakes_are_named_with_their_entry(tmp_path, field, value, message):
    entries = sources.write_coco(tmp_path)
    entries[2][field] = value
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match=message):
        karpathy.read_listing(str(tmp_path), "coco")


@pytest.mark.parametrize("name", ["image0.jpg", "./image0.jpg", "../train2014/image0.jpg"])
def test_one_file_in_two_splits(tmp_path, name):
    entries = sources.write_coco(tmp_path)
    entries[-1] |= {"filename": name, "filepath": "train2014"}
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    with pytest.raises(UserError, match=r"images\[34\]: the image .* is also that of .*s\[0\]"):
        karpathy.read_listing(str(tmp_path), "coco")


@pytest.mark.parametrize("odd", [None, 2**70])
def test_ids_that_some_lack_are_numbers_for_all(tmp_path, odd, caplog):
    entries = sources.write_coco(tmp_path)
    entries[2]["cocoid"] = entries[2]["sentences"][0]["sentid"] = odd
    if odd is None:
        del entries[2]["cocoid"], entries[2]["sentences"][0]["sentid"]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    images = karpathy.read_listing(str(tmp_path), "coco").images
    assert [image.image_id for image in images] == [entry["imgid"] for entry in entries]
    ids = [number for image in images for number in image.caption_ids]
    assert ids == list(range(len(ids)))
    for said in ("1 of 35 have no cocoid or one above 2147483647", "1 of 104 have no sentid"):
        assert said in caplog.text


def test_captions_without_ids_are_numbered(tmp_path):
    entries = sources.write_coco(tmp_path)
    for entry in entries:
        entry["sentences"] = [sentence["raw"] for sentence in entry["sentences"]]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    images = karpathy.read_listing(str(tmp_path), "coco").images
    ids = [number for image in images for number in image.caption_ids]
    assert ids == list(range(sum(len(entry["sentences"]) for entry in entries)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "dataset_a.json: not JSON: maximum recursion"),
        (b'{"images": ' + b"9" * 10_000 + b"}", "dataset_a.json: not JSON"),
        (b"\xe9", "dataset_a.json: line 1: not text in UTF-8"),
        (b"[]", "the key 'images' is missing"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "dataset_a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        karpathy.read_listing(str(tmp_path))
    (tmp_path / "dataset_a.json").unlink()
    (tmp_path / "dataset_a.json").mkdir()
    with pytest.raises(UserError, match=r"dataset_a.json: cannot be read"):
        karpathy.read_listing(str(tmp_path))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    content = write_karpathy(tmp_path)
    path = tmp_path / "dataset_made-up.json"
    expected = karpathy.read_listing(str(tmp_path)).images
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(content), encoding=encoding)
        assert karpathy.read_listing(str(tmp_path)).images == expected
