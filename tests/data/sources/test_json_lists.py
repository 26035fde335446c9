"""The authors' lists, and mistakes in them."""

import collections
import json

import pytest

from fne_jax.data.sources import json_lists
from fne_jax.errors import UserError
from tests.support import sources


def test_objects_of_one_image_make_one_image(tmp_path):
    sources.write_json_lists(tmp_path)
    listing = json_lists.read_listing(str(tmp_path))
    assert collections.Counter(image.split for image in listing.images) == sources.SPLITS
    first, last = listing.images[0], listing.images[-1]
    assert (first.source_id, last.source_id) == ("image0.jpg", "image34.jpg")
    assert first.captions == ["Image 0, seen 0 times.", "Image 0, seen 1 times."]
    assert first.path == tmp_path / "images" / "image0.jpg"


def test_an_image_in_two_lists(tmp_path):
    lists = sources.write_json_lists(tmp_path)
    lists["test"].append(lists["val"][0])
    (tmp_path / "flickr_test.json").write_text(json.dumps(lists["test"]))
    with pytest.raises(UserError, match=r"flickr_test.json: \[6\]: split of 'image24.jpg'"):
        json_lists.read_listing(str(tmp_path))


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"\*train\*.json.*found none"):
        json_lists.read_listing(str(tmp_path))
    sources.write_json_lists(tmp_path)
    (tmp_path / "flickr_test.json").write_text('{"image": 1}')
    with pytest.raises(UserError, match="expected a list of objects"):
        json_lists.read_listing(str(tmp_path))
