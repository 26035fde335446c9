"""Splits of arrays, and mistakes in them."""

import numpy as np
import pytest

from fne_jax.data.sources.registry import load_split
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
ARRAYS = {
    "images": IMAGES,
    "captions": np.array(["a", "b", "c", "d"]),
    "caption_image": np.array([2, 0, 1, 2]),
}


def load(folder, arrays):
    np.savez(folder / "val.npz", **arrays)
    return load_split(tiny_config(data__source="npz", data__dir=str(folder)).data, 8, "val")


def test_arrays_are_taken_as_they_are(tmp_path):
    split = load(tmp_path, ARRAYS)
    np.testing.assert_array_equal(split.images, IMAGES)
    assert split.in_memory and split.captions == ["a", "b", "c", "d"]
    assert split.caption_image.tolist() == [2, 0, 1, 2] and split.caption_image.dtype == np.int32
    assert split.image_id.tolist() == [0, 1, 2] and split.source_image_id == ["0", "1", "2"]
    assert split.caption_id.tolist() == [0, 1, 2, 3]
    named = load(tmp_path, ARRAYS | {"image_id": np.array([7, 8, 9])})
    assert named.image_id.tolist() == [7, 8, 9] and named.source_image_id == ["7", "8", "9"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, r"expected uint8 .* got float32 \[3, 8, 8, 3\]"),
        ({"images": IMAGES[:, :4]}, r"\[images, 8, 8, 3\] .*image_size\), got uint8 \[3, 4, 8, 3"),
        ({"caption_image": np.array([2, 0, 1])}, "expected one number for each caption"),
        ({"caption_image": np.array([2, 0, 1, 3])}, "expected numbers from 0 to 2"),
        ({"caption_image": np.array([2, 0, 1, -1])}, "expected numbers from 0 to 2"),
        ({"caption_image": np.array([2.0, 0, 1, 2])}, r"an integer \[4\], got float64"),
        ({"caption_image": np.array([2, 0, 0, 2])}, r"images\[1\] has no caption"),
        ({"caption_image": np.array([0, 0, 0, 0])}, r"images\[1\] and 1 more has no caption"),
        ({"captions": np.array([1, 2, 3, 4])}, "captions: expected text .* got int64"),
        ({"captions": np.array([["a"]] * 4)}, r"captions: expected text .* \[4, 1\]"),
        ({"captions": np.array("a")}, r"captions: expected text .* \[\]"),
        ({"captions": np.array(["a", " ", "c", "d"])}, r"captions\[1\]: the caption is empty"),
        ({"captions": np.array([b"a", b"\xff", b"c", b"d"])}, r"captions\[1\]: not text in UTF-8"),
        ({"captions": np.array(list("abcd"), object)}, r"dtype=str"),
        ({"image_id": np.array([7, 8])}, r"image_id: .* integer \[3\], got int64 \[2\]"),
        ({"image_id": np.array([7.0, 8, 9])}, "image_id: .* got float64"),
        ({"image_id": np.array([7, 8, 7])}, "image_id: 7 is there 2 times"),
        ({"image_id": np.array([7, 8, -1])}, "image_id: expected numbers from 0 to 2147483647"),
        ({"image_id": np.array([7, 8, 2**31])}, "image_id: expected numbers from 0"),
        ({"image_id": np.array([7, 8, 2**63], np.uint64)}, "image_id: expected numbers from 0"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, ARRAYS | change)


def test_bytes_are_text_in_utf8(tmp_path):
    captions = np.array(["ein Hündchen".encode(), b"b", b"c", b"d"])
    split = load(tmp_path, ARRAYS | {"captions": captions})
    assert split.captions == ["ein Hündchen", "b", "c", "d"]


def test_the_folder_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "val.npz", **ARRAYS)
    config = tiny_config(data__source="npz", data__dir="~")
    assert load_split(config.data, 8, "val").captions == ["a", "b", "c", "d"]


def test_the_identity_is_that_of_the_arrays(tmp_path):
    same, other = load(tmp_path, ARRAYS).identity, ARRAYS["images"].copy()
    assert load(tmp_path, ARRAYS).identity == same
    assert (same.pairs, same.images, len(same.checksum)) == (4, 3, 16)
    other[2, 7, 7, 2] += 1
    changes = (
        {"images": other},
        {"captions": np.array(["a", "b", "c", "e"])},
        {"caption_image": np.array([2, 1, 0, 2])},
        {"image_id": np.array([0, 2, 1])},
    )
    assert len({same, *(load(tmp_path, ARRAYS | change).identity for change in changes)}) == 5


def test_files_that_are_missing_or_incomplete(tmp_path):
    config = tiny_config(data__source="npz", data__dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train.npz \(config.data.dir\): cannot be read"):
        load_split(config.data, 8, "train")
    (tmp_path / "train.npz").write_bytes(b"no arrays")
    with pytest.raises(UserError, match=r"train.npz \(config.data.dir\): cannot be read"):
        load_split(config.data, 8, "train")
    np.save(tmp_path / "single.npy", IMAGES)
    (tmp_path / "single.npy").rename(tmp_path / "train.npz")
    with pytest.raises(UserError, match=r"it is a single array, as np\.save writes"):
        load_split(config.data, 8, "train")
    with pytest.raises(UserError, match="'captions' is missing; it has images, caption_image"):
        load(tmp_path, {name: ARRAYS[name] for name in ("images", "caption_image")})
