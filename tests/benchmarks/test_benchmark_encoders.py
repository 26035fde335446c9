"""The encoders' benchmark: the lines that it prints."""

import json
import sys
import types

import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import encoders
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config


def test_a_line_for_the_encoders_and_one_for_each_attention(monkeypatch, capsys):
    monkeypatch.setitem(encoders.SIZES, "tiny", "tiny_size")
    monkeypatch.setitem(sys.modules, "tiny_size", types.SimpleNamespace(get_config=tiny_config))
    monkeypatch.setattr(encoders, "PEAK_SIDE", 64)
    benchmark.main(["encoders", "--size", "tiny", "--batch", "2", "--repeats", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["benchmark"] for line in lines] == ["encoders", *["attention"] * 4]
    assert {line["size"] for line in lines} == {"tiny"}
    towers, *alone = lines
    assert (towers["image_tokens"], towers["text_tokens"], towers["dtype"]) == (5, 8, "float32")
    assert towers["image_attention"] == "xla"
    # Of two pairs; of a product's gradients, that of the pixels is not computed.
    patches = 2 * 2 * 4 * 48 * 16
    assert towers["train_flops"] == 3 * towers["forward_flops"] - patches
    assert towers["train_pairs_per_s"] == pytest.approx(2 / towers["train_s"])
    by_name = {line["implementation"]: line for line in alone}
    assert "GPUs only" in by_name.pop("cudnn")["error"]
    assert "TPUs only" in by_name.pop("splash")["error"]
    for line in (towers, *by_name.values()):
        for kind in ("forward", "train"):
            speed = line[f"{kind}_flops"] / line[f"{kind}_s"]
            assert line[f"{kind}_flops_per_s"] == pytest.approx(speed)
            share = line[f"{kind}_share_of_peak"]
            assert share == pytest.approx(speed / line["measured_peak_flops"])


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
