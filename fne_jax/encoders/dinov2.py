"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), as in Hugging Face's Dinov2Model."""

from __future__ import annotations

import jax

from fne_jax.encoders.layouts import DENSE, IMAGE_SIZES, NORM, VALUE
from fne_jax.encoders.vision_transformer import VisionTransformer


class Dinov2(VisionTransformer, kw_only=True):
    """A ViT whose layers scale the output of each part by a learned vector."""

    norm_epsilon: float = 1e-6

    layer_scale = True

    layout = VisionTransformer.layout._replace(
        fields={**IMAGE_SIZES, "mlp_width": "mlp_ratio"},
        ratios=("mlp_width",),
        fixed={"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False},
        layer_weights=(
            ("attention_norm", "norm1", NORM),
            ("attention/query", "attention.attention.query", DENSE),
            ("attention/key", "attention.attention.key", DENSE),
            ("attention/value", "attention.attention.value", DENSE),
            ("attention/output", "attention.output.dense", DENSE),
            ("attention_scale", "layer_scale1.lambda1", VALUE),
            ("mlp_norm", "norm2", NORM),
            ("mlp_in", "mlp.fc1", DENSE),
            ("mlp_out", "mlp.fc2", DENSE),
            ("mlp_scale", "layer_scale2.lambda1", VALUE),
        ),
    )


class Dinov2WithRegisters(Dinov2, kw_only=True):
    """A DINOv2 with so many register tokens, which have no positions, after the class token."""

    registers: int

    antialias = True

    layout = Dinov2.layout._replace(
        fields={**Dinov2.layout.fields, "registers": "num_register_tokens"},
        weights=(*Dinov2.layout.weights, ("register_tokens", "embeddings.register_tokens", VALUE)),
    )

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] embeddings of pixels: class, registers, patches."""
        return self.insert_registers(super().embed(inputs), self.registers)
