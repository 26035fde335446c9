"""Splits of arrays, and mistakes in them."""

import numpy as np
import pytest

from fne_jax.data.loading import load_split
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
        ({"caption_image": np.array([2, 0, 1])}, "expected one index for each caption"),
        ({"caption_image": np.array([2, 0, 1, 3])}, "expected indices from 0 to 2"),
        ({"caption_image": np.array([2, 0, 1, -1])}, "expected indices from 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, ARRAYS | change)


def test_files_that_are_missing_or_incomplete(tmp_path):
    config = tiny_config(data__source="npz", data__dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train.npz \(config.data.dir\): cannot be read"):
        load_split(config.data, 8, "train")
    (tmp_path / "train.npz").write_bytes(b"no arrays")
    with pytest.raises(UserError, match=r"train.npz \(config.data.dir\): cannot be read"):
        load_split(config.data, 8, "train")
    with pytest.raises(UserError, match="'captions' is missing; it has images, caption_image"):
        load(tmp_path, {name: ARRAYS[name] for name in ("images", "caption_image")})
