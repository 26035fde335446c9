"""How fast the encoders run, and how much of the device's peak their products reach."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.encoders.attention import ATTENTIONS, attend, resolve
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.errors import UserError

# Side of the square product that stands for the device's peak.
PEAK_SIDE = 4096


def encoders(
    encoder: ml_collections.ConfigDict, vocab_size: int, text_tokens: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Times both towers on one device, forward alone and with the gradient of all weights.

    Args:
      encoder: `config.encoder`.
      vocab_size: The number of the tokenizer's ids.
      text_tokens: The tokens of a caption, none of them padding.
      batch: Pairs at a time.
      repeats: Timed calls of each.

    Returns:
      One benchmark line: medians in seconds, pairs and FLOPs a second, and the share of the peak
      of `square_product`; FLOPs as `forward_flops` and `training_flops` count them.

    Raises:
      UserError: if the towers' sizes do not fit together, or their attention cannot run here.
    """
    module = build_dual_encoder(encoder, vocab_size)
    side = encoder.image.image_size
    rng = jax.random.key(0)
    pixels = jax.random.normal(rng, (batch, side, side, 3))
    ids = jax.random.randint(rng, (batch, text_tokens), 0, vocab_size)
    inputs = (pixels, ids, jnp.ones_like(ids))
    params = jax.jit(module.init)(rng, *inputs)["params"]

    @jax.jit
    def forward(params, *inputs):
        return module.apply({"params": params}, *inputs)

    @jax.jit
    def train(params, *inputs):
        def mean_similarity(params):
            image, text = module.apply(
                {"params": params}, *inputs, deterministic=False, rngs={"dropout": rng}
            )
            return (image * text).sum() / batch

        return jax.value_and_grad(mean_similarity)(params)

    seconds, peak = _seconds_and_peak(
        {
            "forward": functools.partial(forward, params, *inputs),
            "train": functools.partial(train, params, *inputs),
        },
        jnp.dtype(encoder.compute_dtype),
        repeats,
    )
    flops = {
        "forward": batch * forward_flops(encoder, text_tokens),
        "train": batch * training_flops(encoder, text_tokens),
    }
    tokens = image_tokens(encoder)
    chosen = functools.partial(resolve, encoder.attention, dtype=jnp.dtype(encoder.compute_dtype))
    return {
        "benchmark": "encoders",
        "batch": batch,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
        "dtype": encoder.compute_dtype,
        "image_attention": chosen(queries=tokens),
        "text_attention": chosen(queries=text_tokens),
        "forward_pairs_per_s": batch / seconds["forward"],
        "train_pairs_per_s": batch / seconds["train"],
        **_speeds(flops, seconds, peak),
        **machine(),
    }


def attention(
    encoder: ml_collections.ConfigDict, batch: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times attention without its projections, of the image tower's size, on one device.

    Args:
      encoder: `config.encoder`.
      batch: Images at a time.
      repeats: Timed calls of each.

    Yields:
      For each of `ATTENTIONS`, timed in turns, a benchmark line as `encoders` gives; for one that
      cannot run here, `error` says why in place of its figures. FLOPs are those of two products
      forward and twice as many backward, also where more are computed to save memory.
    """
    tokens, heads = image_tokens(encoder), encoder.image.heads
    dtype = jnp.dtype(encoder.compute_dtype)
    shape = (batch, tokens, heads, encoder.image.width // heads)
    keys = jax.random.split(jax.random.key(0), 4)
    *arrays, grad = (jax.random.normal(key, shape, dtype) for key in keys)

    def train(run, grad, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(grad)

    functions, errors = {}, {}
    for name in ATTENTIONS:
        run = functools.partial(attend, mask=None, implementation=name)
        try:
            jax.eval_shape(run, *arrays)
        except UserError as error:
            errors[name] = str(error)
            continue
        functions[f"{name} forward"] = functools.partial(jax.jit(run), *arrays)
        compiled = jax.jit(functools.partial(train, run))
        functions[f"{name} train"] = functools.partial(compiled, grad, *arrays)
    seconds, peak = _seconds_and_peak(functions, dtype, repeats)
    products = batch * _attention_flops(tokens, encoder.image.width)
    flops = {"forward": products, "train": 3 * products}
    for name in ATTENTIONS:
        if name in errors:
            figures = {"error": errors[name]}
        else:
            figures = _speeds(flops, {kind: seconds[f"{name} {kind}"] for kind in flops}, peak)
        yield {
            "benchmark": "attention",
            "implementation": name,
            "batch": batch,
            "tokens": tokens,
            "heads": heads,
            "dim": shape[-1],
            "dtype": encoder.compute_dtype,
            **figures,
            **machine(),
        }


def forward_flops(encoder: ml_collections.ConfigDict, text_tokens: int) -> int:
    """Returns the FLOPs of the products that embed one pair, 2 for each multiplication.

    With w the width and m that of the MLP, a layer takes for each of its t tokens 8 w^2 for the
    four projections, 4 t w for scores and mixture of attention, and 4 w m for the MLP. The image
    tower also takes 6 p^2 w for each of its patches of p pixels a side, and either tower 2 w d for
    a projection to d dimensions. Softmax, norms and activations are left out.

    Args:
      encoder: `config.encoder`.
      text_tokens: The tokens of a caption.
    """
    layers = 0
    for tower, tokens in ((encoder.image, image_tokens(encoder)), (encoder.text, text_tokens)):
        projections = 8 * tokens * tower.width**2
        mlps = 4 * tokens * tower.width * tower.mlp_width
        layers += tower.layers * (projections + _attention_flops(tokens, tower.width) + mlps)
    heads = 2 * encoder.projection_dim * (encoder.image.width + encoder.text.width)
    return layers + heads + _patch_flops(encoder)


def training_flops(encoder: ml_collections.ConfigDict, text_tokens: int) -> int:
    """Returns the FLOPs of one pair's forward and backward pass.

    The gradient of a product takes two of its size; only pixels need none. Activations that are
    computed again (`remat`) do not count.

    Args:
      encoder: `config.encoder`.
      text_tokens: The tokens of a caption.
    """
    return 3 * forward_flops(encoder, text_tokens) - _patch_flops(encoder)


def square_product(dtype: Any) -> Callable[[], jax.Array]:
    """Returns a function that multiplies two square matrices of side `PEAK_SIDE`."""
    matrix = jax.random.normal(jax.random.key(0), (PEAK_SIDE, PEAK_SIDE), dtype)
    return functools.partial(jax.jit(jnp.matmul), matrix, matrix)


def _seconds_and_peak(functions, dtype, repeats):
    """Times functions in turns with the square product, whose FLOPs a second come second."""
    seconds = median_seconds({**functions, "peak": square_product(dtype)}, repeats)
    return seconds, 2 * PEAK_SIDE**3 / seconds["peak"]


def _speeds(flops, seconds, peak):
    speeds = {"measured_peak_flops": peak}
    for name, total in flops.items():
        speeds |= {
            f"{name}_s": seconds[name],
            f"{name}_flops": total,
            f"{name}_flops_per_s": total / seconds[name],
            f"{name}_share_of_peak": total / seconds[name] / peak,
        }
    return speeds


def _attention_flops(tokens, width):
    return 4 * tokens**2 * width


def _patch_flops(encoder):
    image = encoder.image
    return 6 * (image_tokens(encoder) - 1) * image.patch_size**2 * image.width


def image_tokens(encoder):
    """Returns the number of patches and the class token."""
    return 1 + (encoder.image.image_size // encoder.image.patch_size) ** 2
