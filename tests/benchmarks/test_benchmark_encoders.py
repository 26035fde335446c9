"""The encoders' benchmark: its FLOPs against XLA's own count, and the lines that it prints."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import cases, encoders
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.errors import UserError
from tests.support.tiny import tiny_config

TEXT_TOKENS = 12


def wide_config():
    """Wide enough for the products to outweigh all else, and no two sizes alike."""
    return tiny_config(
        encoder__attention="xla",
        encoder__projection_dim=64,
        encoder__image__image_size=16,
        encoder__image__width=192,
        encoder__image__layers=2,
        encoder__image__mlp_width=320,
        encoder__text__width=256,
        encoder__text__layers=3,
        encoder__text__mlp_width=512,
    ).encoder


@pytest.mark.parametrize("training", [False, True])
def test_flops_are_those_that_xla_counts(training):
    encoder, batch = wide_config(), 4
    module = build_dual_encoder(encoder, 50)
    ids = jnp.zeros((batch, TEXT_TOKENS), jnp.int32)
    inputs = (jnp.zeros((batch, 16, 16, 3)), ids, ids + 1)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def loss(params):
        image, text = module.apply({"params": params}, *inputs)
        return (image * text).sum()

    run = jax.grad(loss) if training else loss
    counted = jax.jit(run).lower(params).compile().cost_analysis()["flops"]
    count = encoders.training_flops if training else encoders.forward_flops
    assert batch * count(encoder, TEXT_TOKENS) == pytest.approx(counted, rel=0.1)


def test_flops_of_vit_base_and_bert_base():
    from configs import base

    # 17.6 billion multiplications at 224 pixels, as published, are 55.5 billion at 384; and BERT's
    # 85 million weights in layers are used once a token.
    flops = encoders.forward_flops(base.get_config().encoder, 30)
    assert flops == pytest.approx(2 * (55.5e9 + 30 * 85e6), rel=0.01)


def test_a_line_for_the_encoders_and_one_for_each_attention(monkeypatch, capsys):
    monkeypatch.setitem(cases.ENCODER_SIZES, "tiny", "tiny_size")
    monkeypatch.setitem(sys.modules, "tiny_size", types.SimpleNamespace(get_config=tiny_config))
    monkeypatch.setattr(encoders, "PEAK_SIDE", 64)
    benchmark.main(["encoders", "--size", "tiny", "--batch", "2", "--repeats", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["benchmark"] for line in lines] == ["encoders", *["attention"] * 4]
    assert {line["size"] for line in lines} == {"tiny"}
    towers, *alone = lines
    assert (towers["image_tokens"], towers["text_tokens"], towers["dtype"]) == (5, 8, "float32")
    assert towers["image_attention"] == "xla"
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
    monkeypatch.setitem(cases.ENCODER_SIZES, "shapes", "configs_that_are_not_there")
    with pytest.raises(UserError, match="run this from the top of the repository"):
        benchmark.main(["encoders", "--size", "shapes"])
