import dataclasses
import pathlib

import numpy as np
import pytest

from fne_jax.data import match_files
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError

DATASET = PairDataset(
    captions=["a", "b", "c", "d", "e"],
    caption_image=np.array([0, 0, 1, 2, 2], np.int32),
    image_id=np.array([70, 10, 40], np.int32),
    images=np.zeros((3, 2, 2, 3), np.uint8),
    caption_id=np.array([5, 900, 3, 12, 7]),
    source_image_id=["../x", "y", "z"],
)
PAIRS = Pairs(
    np.array([2, 0, 4]), np.array([0, 1, 1]), probability=np.array([0.9, 0.8, 1.0], np.float32)
)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "lists" / "matches.npz"
    match_files.write_match_list(path, DATASET, PAIRS, {"by": "hand"})
    return path


def test_a_list_comes_back_for_a_split_in_another_order(stored):
    back = match_files.read_match_list(stored, DATASET)
    np.testing.assert_array_equal(back.caption, PAIRS.caption)
    np.testing.assert_array_equal(back.image, PAIRS.image)
    np.testing.assert_array_equal(back.probability, PAIRS.probability.astype(np.float16))
    turned = dataclasses.replace(
        DATASET,
        image_id=DATASET.image_id[::-1],
        source_image_id=["z", "y", "/another/disk/x"],
        caption_image=2 - DATASET.caption_image,
    )
    np.testing.assert_array_equal(match_files.read_match_list(stored, turned).image, [2, 1, 1])


def test_an_empty_list_is_one(tmp_path):
    none = PAIRS[:0]
    match_files.write_match_list(tmp_path / "a.npz", DATASET, none, {})
    assert match_files.read_match_list(tmp_path / "a.npz", DATASET).caption.shape == (0,)


def test_the_checksum_tells_pairs_and_probabilities_but_not_their_order():
    order = np.array([1, 2, 0])
    assert PAIRS[order].identity == PAIRS.identity
    assert PAIRS.replace(image=PAIRS.image[order]).identity != PAIRS.identity
    assert PAIRS.replace(probability=PAIRS.probability[order]).identity != PAIRS.identity


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"captions": ["a", "b", "c", "d", "f"]}, "about other captions"),
        ({"caption_id": np.array([5, 900, 3, 12, 8])}, "about other captions"),
        ({"image_id": np.array([71, 10, 40], np.int32)}, "captions or images"),
        ({"source_image_id": ["../x", "z", "y"]}, "or about images of other names"),
    ],
)
def test_a_list_of_another_split_is_refused(stored, changes, message):
    with pytest.raises(UserError, match=f"matches.npz.*{message}"):
        match_files.read_match_list(stored, dataclasses.replace(DATASET, **changes))


def test_what_is_no_list_is_refused(stored, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.npz: there is no such file; `audit --matches`"):
        match_files.read_match_list(tmp_path / "nowhere.npz", DATASET)
    whole = stored.read_bytes()
    for content in (b"", b"PK\3\4", whole[: len(whole) // 2], b"caption_id,image_id\n1,2\n"):
        stored.write_bytes(content)
        with pytest.raises(UserError, match=r"matches.npz: expected a list of matches"):
            match_files.read_match_list(stored, DATASET)
    np.savez(stored, caption_id=np.arange(3))
    with pytest.raises(UserError, match=r"matches.npz: expected a list of matches.*image_id"):
        match_files.read_match_list(stored, DATASET)


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("probability", np.zeros(3), r"expected probability as .* of shape \[3\], got"),
        ("image_id", np.zeros(2, np.int64), r"expected image_id as .* of shape \[3\], got"),
        ("probability", np.float16([1, np.nan, 2]), "expected probabilities .*, got nan in row 1"),
    ],
)
def test_arrays_that_do_not_fit_are_named(stored, name, array, message):
    with np.load(stored) as arrays:
        content = dict(arrays)
    np.savez(stored, **content | {name: array})
    with pytest.raises(UserError, match=f"matches.npz: {message}"):
        match_files.read_match_list(stored, DATASET)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    pathlib.Path(tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a.npz: cannot be written"):
        match_files.write_match_list(tmp_path / "file" / "a.npz", DATASET, PAIRS, {})
