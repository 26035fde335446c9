"""BERT (Devlin et al. 2019, arXiv 1810.04805), as in Hugging Face's BertModel."""

from __future__ import annotations

import flax.linen as nn
import jax

from fne_jax.encoders.transformer import EncoderOutput, TextTower, layer_norm


class Bert(TextTower):
    """Word, position and segment embeddings, and post-norm layers.

    Attributes:
      segments: Number of segment ("token type") embeddings; every token gets that of segment 0.
    """

    segments: int = 2

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> EncoderOutput:
        """Encodes [batch, tokens] token ids; the mask, of the same shape, is 0 at padding.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        # Normalised right away, so that only the relative scale of the embeddings matters.
        hidden = self.embed_tokens(input_ids)
        hidden += self.table("segment_embedding", self.segments)[None, :1]
        hidden = layer_norm(self.norm_epsilon, self.dtype, "embedding_norm")(hidden)
        mask = attention_mask.astype(bool)
        return EncoderOutput(self.run_layers(hidden, mask, deterministic, pre_norm=False))
