"""BERT (Devlin et al. 2019, arXiv 1810.04805), as in Hugging Face's BertModel."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.transformer import TransformerStack, layer_norm
from fne_jax.encoders.vision_transformer import EncoderOutput


class Bert(nn.Module):
    """Word, position and segment embeddings, and post-norm layers.

    Attributes:
      vocab_size: number of token ids.
      max_length: longest sequence that has position embeddings.
      width: dimension of a token.
      layers: number of transformer layers.
      heads: number of attention heads.
      mlp_width: width of the MLPs.
      segments: number of segment ("token type") embeddings; every token is in segment 0.
      norm_epsilon: of the LayerNorms; 1e-12 in Google's checkpoints.
      dropout: rate after the embeddings and in the layers.
      dtype: compute dtype; parameters stay float32.
      scan_layers: see `TransformerStack`.
      remat: see `TransformerStack`.
    """

    vocab_size: int
    max_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    segments: int = 2
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> EncoderOutput:
        """Encodes [batch, tokens] token ids; the mask, of the same shape, is 0 at padding.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        tokens = input_ids.shape[1]
        if tokens > self.max_length:
            raise ValueError(f"input_ids: expected at most {self.max_length} tokens, got {tokens}")

        def table(rows, name):
            # Normalised right away, so that only the tables' relative scale matters.
            return self.param(name, nn.initializers.normal(0.02), (rows, self.width))

        hidden = table(self.vocab_size, "word_embedding")[input_ids]
        hidden += table(self.max_length, "position_embedding")[None, :tokens]
        hidden += table(self.segments, "segment_embedding")[None, :1]
        hidden = layer_norm(self.norm_epsilon, self.dtype, "embedding_norm")(hidden)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        hidden = TransformerStack(
            layers=self.layers,
            heads=self.heads,
            mlp_width=self.mlp_width,
            pre_norm=False,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="encoder",
        )(hidden, attention_mask.astype(bool), deterministic)
        return EncoderOutput(hidden)
