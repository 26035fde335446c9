"""The image tower against PyTorch's of the same size, whole and part by part, in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax.benchmarks.timing import machine, median_seconds
from fne_jax.encoders.attention import attend
from fne_jax.encoders.layers import ACTIVATIONS
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError

# A function of one framework that computes, and keeps nothing from call to call.
_Call = Callable[[], Any]


def image_tower(
    encoder: ml_collections.ConfigDict, batch: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times forward and backward passes in both frameworks, in turns, on the CPU.

    Args:
      encoder: `config.encoder`; its compute dtype is not looked at.
      batch: Images at a time.
      repeats: Timed calls of each.

    Yields:
      A benchmark line for the whole tower and for each kind of its parts: seconds in JAX and in
      PyTorch, and their ratio. A `dense_product` is a layer's widest, of which it has two forward
      and four backward; of `activation` and `attention` a layer has one.

    Raises:
      UserError: if PyTorch is not installed, or JAX does not run on a CPU.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{error}: install the extra with `pip install -e .[convert]`") from error
    if jax.default_backend() != "cpu":
        raise UserError(f"the peer runs on CPUs, and JAX runs on {jax.default_backend()}")
    size = encoder.image
    tokens = 1 + (size.image_size // size.patch_size) ** 2
    parts = {
        "image_tower": _towers,
        "dense_product": _dense_products,
        "activation": _activations,
        "attention": _attentions,
    }
    for part, build in parts.items():
        ours, theirs = build(encoder, batch, tokens)
        seconds = median_seconds({"jax": ours, "pytorch": theirs}, repeats)
        yield {
            "benchmark": "against_pytorch",
            "part": part,
            "batch": batch,
            "tokens": tokens,
            "jax_s": seconds["jax"],
            "pytorch_s": seconds["pytorch"],
            "ratio": seconds["jax"] / seconds["pytorch"],
            "pytorch": torch.__version__,
            "threads": torch.get_num_threads(),
            **machine(),
        }


def _towers(encoder, batch, tokens) -> tuple[_Call, _Call]:
    import transformers

    del tokens
    size = encoder.image
    module = VisionTransformer(
        image_size=size.image_size,
        patch_size=size.patch_size,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        mlp_width=size.mlp_width,
        attention=encoder.attention,
    )
    pixels = _normal(batch, size.image_size, size.image_size, 3)
    images = _tensor(pixels.transpose(0, 3, 1, 2))
    params = jax.jit(module.init)(jax.random.key(0), pixels)["params"]

    @jax.jit
    def train(params, pixels):
        def mean(params):
            return module.apply({"params": params}, pixels).last_hidden_state.mean()

        return jax.value_and_grad(mean)(params)

    peer = transformers.ViTModel(
        transformers.ViTConfig(
            image_size=size.image_size,
            patch_size=size.patch_size,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.mlp_width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )

    def train_peer():
        peer.zero_grad()
        peer(images).last_hidden_state.mean().backward()

    return functools.partial(train, params, jnp.asarray(pixels)), train_peer


def _dense_products(encoder, batch, tokens) -> tuple[_Call, _Call]:
    import torch

    size = encoder.image
    rows, kernel = _normal(batch * tokens, size.width), _normal(size.width, size.mlp_width)
    ours = functools.partial(jax.jit(jnp.matmul), jnp.asarray(rows), jnp.asarray(kernel))
    theirs = functools.partial(torch.matmul, _tensor(rows), _tensor(kernel))
    return ours, theirs


def _activations(encoder, batch, tokens) -> tuple[_Call, _Call]:
    import torch

    hidden = _normal(batch, tokens, encoder.image.mlp_width)
    return _with_gradient(
        ACTIVATIONS["gelu"], torch.nn.functional.gelu, (hidden,), (_tensor(hidden),)
    )


def _attentions(encoder, batch, tokens) -> tuple[_Call, _Call]:
    import torch

    heads = encoder.image.heads
    shape = (batch, tokens, heads, encoder.image.width // heads)
    arrays = [_normal(*shape, seed=seed) for seed in range(3)]

    def ours(query, key, value):
        return attend(query, key, value, None, implementation=encoder.attention)

    return _with_gradient(
        ours,
        torch.nn.functional.scaled_dot_product_attention,
        arrays,
        [_tensor(array.swapaxes(1, 2)) for array in arrays],
    )


def _with_gradient(ours, theirs, arrays, tensors) -> tuple[_Call, _Call]:
    """Returns both functions with the gradient of all arguments, the result's being ones."""
    import torch

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(ours, *arrays)
        return pull(jnp.ones_like(out))

    for tensor in tensors:
        tensor.requires_grad_()

    def run_peer():
        out = theirs(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return functools.partial(run, *map(jnp.asarray, arrays)), run_peer


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _tensor(array):
    import torch

    return torch.tensor(array)
