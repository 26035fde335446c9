"""DINOv3's ViT (Siméoni et al. 2025, arXiv 2508.10104), as in Hugging Face's DINOv3ViTModel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.encoders.layouts import DENSE, IMAGE_SIZES, NORM, PATCHES, PRODUCT, VALUE, Layout
from fne_jax.encoders.vision_transformer import VisionTransformer
from fne_jax.errors import UserError

# The base of the wavelengths of rotary positions.
_ROPE_THETA = 100.0


class Dinov3(VisionTransformer, kw_only=True):
    """A ViT with so many register tokens, whose attention rotates the patches by their places.

    The random shift, jitter and scale of the places in its pretraining are left out.
    """

    registers: int
    norm_epsilon: float = 1e-5

    key_bias = False
    layer_scale = True

    layout = Layout(
        fields={**IMAGE_SIZES, "registers": "num_register_tokens"},
        fixed={
            "num_channels": 3,
            "rope_theta": _ROPE_THETA,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
            "use_gated_mlp": False,
        },
        weights=(
            ("class_token", "embeddings.cls_token", VALUE),
            ("register_tokens", "embeddings.register_tokens", VALUE),
            ("patch_embedding", "embeddings.patch_embeddings", PATCHES),
            ("final_norm", "norm", NORM),
        ),
        layer="layer.{}.",
        layer_weights=(
            ("attention_norm", "norm1", NORM),
            ("attention/query", "attention.q_proj", DENSE),
            ("attention/key", "attention.k_proj", PRODUCT),
            ("attention/value", "attention.v_proj", DENSE),
            ("attention/output", "attention.o_proj", DENSE),
            ("attention_scale", "layer_scale1.lambda1", VALUE),
            ("mlp_norm", "norm2", NORM),
            ("mlp_in", "mlp.up_proj", DENSE),
            ("mlp_out", "mlp.down_proj", DENSE),
            ("mlp_scale", "layer_scale2.lambda1", VALUE),
        ),
    )

    def attend(self) -> Callable[..., jax.Array]:
        """Returns what mixes the values of query, key, value and mask, by content and place."""
        angles = _angles(self.image_size // self.patch_size, self.width // self.heads)
        # The tokens before the patches have no place: they are turned by 0.
        angles = np.pad(angles, ((1 + self.registers, 0), (0, 0)))
        return functools.partial(_attend_in_place, super().attend(), angles)

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] embeddings of pixels: class, registers, patches."""
        hidden = self.embed_patches(inputs, class_token=True, positions=False)
        return self.insert_registers(hidden, self.registers)


def _attend_in_place(attend, angles, query, key, value, mask):
    """Computes `attend` with queries and keys rotated by [tokens, dim / 2] angles."""
    return attend(_rotate(query, angles), _rotate(key, angles), value, mask)


def _rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Returns [batch, tokens, heads, dim] vectors whose halves are rotated with each other."""
    cosine, sine = (f(angles).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _angles(side: int, dim: int) -> np.ndarray:
    """Returns the [side * side, dim / 2] angles of patches in reading order.

    The first half is for the patch's row, the second for its column. Places run from -1 to 1
    across the image, whatever its size.
    """
    if dim % 4:
        raise UserError(f"heads are {dim} wide; rotary positions need a multiple of 4")
    place = 2 * (np.arange(side) + 0.5) / side - 1
    frequencies = _ROPE_THETA ** -(np.arange(dim // 4) / (dim // 4))
    along = 2 * np.pi * place[:, None] * frequencies
    rows, columns = np.repeat(along, side, axis=0), np.tile(along, (side, 1))
    return np.concatenate([rows, columns], axis=1)
