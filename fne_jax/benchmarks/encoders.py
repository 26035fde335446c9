"""How fast the encoders run, and how much of the device's peak their products reach."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.configuration import with_model_defaults
from fne_jax.encoders.attention import resolve
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.errors import UserError
from fne_jax.planning.useful import matrix_flops, plain

# Side of the square product that stands for the device's peak.
PEAK_SIDE = 4096
# The configs whose encoders are measured; configs/ is not part of the installed package.
SIZES = {"vit_b16_384": "configs.base", "shapes": "configs.shapes", "flickr8k": "configs.flickr8k"}
# Ids of BERT-base's tokenizer.
BERT_IDS = 30522


def encoder_lines(
    sizes: Sequence[str], batch: int, repeats: int, *, against_pytorch: bool
) -> Iterator[dict[str, Any]]:
    """Yields the encoders' line of each size.

    Args:
      sizes: Keys of `SIZES`.
      batch: Pairs.
      repeats: Timed calls of each.
      against_pytorch: Whether to yield the lines of the image tower and its parts beside PyTorch's
        instead.

    Raises:
      UserError: if the configs or PyTorch are not there.
    """
    for size in sizes:
        try:
            module = importlib.import_module(SIZES[size])
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error}: the sizes are those of configs/; run this from the top of the repository"
            ) from error
        config = with_model_defaults(module.get_config(), architectures={})
        encoder, data = config.encoder, config.data
        if against_pytorch:
            lines = import_pytorch().image_tower(encoder, batch, repeats)
        else:
            ids = BERT_IDS if size == "vit_b16_384" else data.vocab_size
            lines = [encoders(encoder, ids, data.text_length, batch, repeats)]
        for line in lines:
            yield {"size": size} | line


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
      of `square_product`; FLOPs are those of matrix products, without what `remat` computes again.

    Raises:
      UserError: if the towers' sizes do not fit together, or their attention cannot run here.
    """
    side = encoder.image.image_size
    rng = jax.random.key(0)
    pixels = jax.random.normal(rng, (batch, side, side, 3))
    ids = jax.random.randint(rng, (batch, text_tokens), 0, vocab_size)
    inputs = (pixels, ids, jnp.ones_like(ids))

    def passes(module):
        def forward(params, *inputs):
            return module.apply({"params": params}, *inputs)

        def train(params, *inputs):
            def mean_similarity(params):
                image, text = module.apply(
                    {"params": params}, *inputs, deterministic=False, rngs={"dropout": rng}
                )
                return (image * text).sum() / batch

            return jax.value_and_grad(mean_similarity)(params)

        return {"forward": forward, "train": train}

    module, dtype = build_dual_encoder(encoder, vocab_size), jnp.dtype(encoder.compute_dtype)
    params = jax.jit(module.init)(rng, *inputs)["params"]
    timed = {
        name: functools.partial(jax.jit(run), params, *inputs)
        for name, run in passes(module).items()
    }
    seconds = median_seconds({**timed, "peak": square_product(dtype)}, repeats)
    peak, speeds = 2 * PEAK_SIDE**3 / seconds["peak"], {}
    for name, run in passes(plain(module)).items():
        flops = matrix_flops(run, params, *inputs)
        speeds |= {
            f"{name}_pairs_per_s": batch / seconds[name],
            f"{name}_s": seconds[name],
            f"{name}_flops": flops,
            f"{name}_flops_per_s": flops / seconds[name],
            f"{name}_share_of_peak": flops / seconds[name] / peak,
        }
    tokens = image_tokens(encoder)
    chosen = functools.partial(resolve, encoder.attention, dtype=dtype)
    return {
        "benchmark": "encoders",
        "batch": batch,
        "image_tokens": tokens,
        "text_tokens": text_tokens,
        "dtype": encoder.compute_dtype,
        "image_attention": chosen(queries=tokens),
        "text_attention": chosen(queries=text_tokens),
        "measured_peak_flops": peak,
        **speeds,
        **machine(),
    }


def square_product(dtype: Any) -> Callable[[], jax.Array]:
    """Returns a function that multiplies two square matrices of side `PEAK_SIDE`."""
    matrix = jax.random.normal(jax.random.key(0), (PEAK_SIDE, PEAK_SIDE), dtype)
    return functools.partial(jax.jit(jnp.matmul), matrix, matrix)


def image_tokens(encoder):
    """Returns the number of patches and the class token."""
    return 1 + (encoder.image.image_size // encoder.image.patch_size) ** 2


def import_pytorch():
    """Returns the benchmarks of PyTorch, which is not among what the package installs."""
    try:
        from fne_jax.benchmarks import pytorch
    except ImportError as error:
        raise UserError(f"{error}: install the extra with `pip install -e .[convert]`") from error
    return pytorch
