"""The benchmark of frozen layers: its variants, timed in turns on a tiny config."""

import pytest

from fne_jax.benchmarks import step
from tests.support.tiny import tiny_config


def test_variants_freeze_ever_more():
    found = step.variants({"image": 12, "text": 1})
    assert next(iter(found)) == "nothing frozen" and not found["nothing frozen"]
    assert list(found.values())[-1] == {
        "encoder.image.frozen_layers": "10",
        "encoder.text.frozen_layers": "0",
        "data.keep_frozen": True,
    }


@pytest.mark.slow
def test_what_is_frozen_takes_less_memory():
    config = tiny_config(encoder__image__layers=3, encoder__text__layers=2, data__vocab_size=100)
    found = step.frozen_steps(config, 1)["variants"]
    names = list(step.variants({"image": 3, "text": 2}))
    assert list(found) == names and found[names[0]]["of_nothing_frozen"] == 1
    sizes = [found[name]["state_bytes"] for name in names]
    # Whether the output is kept changes nothing of the state.
    assert sizes[0] > sizes[1] == sizes[2]
    assert sizes[0] > sizes[3]
    scratch = [found[name]["scratch_bytes"] for name in names]
    assert scratch[0] > scratch[1] >= scratch[2]
    assert all(found[name]["step_s"] > 0 for name in names)
