"""The encoders' benchmark: the lines that it prints."""

import json
import sys
import types

import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import encoders
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config


@pytest.mark.slow
def test_the_line_of_the_encoders(monkeypatch, capsys):
    monkeypatch.setitem(encoders.SIZES, "tiny", "tiny_size")
    monkeypatch.setitem(sys.modules, "tiny_size", types.SimpleNamespace(get_config=tiny_config))
    monkeypatch.setattr(encoders, "PEAK_SIDE", 64)
    benchmark.main(["encoders", "--size", "tiny", "--batch", "2", "--repeats", "1"])
    towers = json.loads(capsys.readouterr().out)
    assert (towers["benchmark"], towers["size"]) == ("encoders", "tiny")
    assert (towers["image_tokens"], towers["text_tokens"], towers["dtype"]) == (5, 8, "float32")
    assert towers["image_attention"] == "xla"
    # Of two pairs; of a product's gradients, that of the pixels is not computed.
    patches = 2 * 2 * 4 * 48 * 16
    assert towers["train_flops"] == 3 * towers["forward_flops"] - patches
    assert towers["train_pairs_per_s"] == pytest.approx(2 / towers["train_s"])
    for kind in ("forward", "train"):
        speed = towers[f"{kind}_flops"] / towers[f"{kind}_s"]
        assert towers[f"{kind}_flops_per_s"] == pytest.approx(speed)
        share = towers[f"{kind}_share_of_peak"]
        assert share == pytest.approx(speed / towers["measured_peak_flops"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0; expected a number above 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["encoders", *arguments])


def test_without_the_configs(monkeypatch):
    monkeypatch.setitem(encoders.SIZES, "shapes", "configs_that_are_not_there")
    with pytest.raises(UserError, match="run this from the top of the repository"):
        benchmark.main(["encoders", "--size", "shapes"])
