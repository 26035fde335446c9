"""Settings of the rendered dataset that cannot be."""

import pytest

from fne_jax.data.loading import load_split
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shapes", 9, "config.data.shapes.shapes: expected a number from 1 to 8, got 9"),
        ("colours", 0, "config.data.shapes.colours: expected a number from 1 to 10, got 0"),
        ("val_images", 0, r"the split sizes \(10000, 0, 1000\) must be at least 1"),
    ],
)
def test_settings_out_of_range(tmp_path, field, value, message):
    config = tiny_config(data__source="shapes", data__cache_dir=str(tmp_path))
    config.data.shapes[field] = value
    with pytest.raises(UserError, match=message):
        load_split(config.data, 8, "train")
