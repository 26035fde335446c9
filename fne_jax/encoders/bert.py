"""BERT (Devlin et al. 2019, arXiv 1810.04805), as in Hugging Face's BertModel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fne_jax.encoders.layers import layer_norm
from fne_jax.encoders.layouts import DENSE, NORM, TABLE, TEXT_SIZES, Layout
from fne_jax.encoders.sentence_modules import SentenceHead
from fne_jax.encoders.transformer import EncoderOutput, Tower


class TextTower(Tower):
    """What the text encoders share: so many token ids, and so many position embeddings."""

    vocab_size: int
    max_length: int

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text."""
        return self.max_length

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] float32 sum of word and position embeddings.

        The inputs are [batch, tokens] int32 token ids. Raises ValueError if there are more than
        `max_tokens`.
        """
        tokens = inputs.shape[1]
        if tokens > self.max_tokens:
            raise ValueError(f"input_ids: expected at most {self.max_tokens} tokens, got {tokens}")
        words = self.table("word_embedding", self.vocab_size)[inputs]
        positions = self.table("position_embedding", self.max_length)
        return words + self.place(positions, inputs)

    def place(self, positions: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Returns the [1 or batch, tokens, width] position embeddings of [batch, tokens] token ids.

        They are taken from the [max_length, width] ones of all positions.
        """
        return positions[None, : input_ids.shape[1]]

    def table(self, name: str, rows: int) -> jax.Array:
        """Returns the [rows, width] float32 embeddings that are stored under a name."""
        return self.param(name, nn.initializers.normal(0.02, jnp.float32), (rows, self.width))


class Bert(TextTower):
    """Word, position and segment embeddings, and post-norm layers.

    Attributes:
      segments: Number of segment ("token type") embeddings, of which every token gets that of
        segment 0; 0 for none.
      sentence_head: What makes an embedding of a text in a folder of sentence-transformers, if
        there is more than pooling; None for none.
    """

    segments: int = 2
    sentence_head: SentenceHead | None = None

    pre_norm = False
    after_layers = ("sentence_head",)

    layout = Layout(
        fields={**TEXT_SIZES, "segments": "type_vocab_size"},
        fixed={"position_embedding_type": "absolute", "is_decoder": False},
        weights=(
            ("word_embedding", "embeddings.word_embeddings", TABLE),
            ("position_embedding", "embeddings.position_embeddings", TABLE),
            ("segment_embedding", "embeddings.token_type_embeddings", TABLE),
            ("embedding_norm", "embeddings.LayerNorm", NORM),
        ),
        layer="encoder.layer.{}.",
        layer_weights=(
            ("attention/query", "attention.self.query", DENSE),
            ("attention/key", "attention.self.key", DENSE),
            ("attention/value", "attention.self.value", DENSE),
            ("attention/output", "attention.output.dense", DENSE),
            ("attention_norm", "attention.output.LayerNorm", NORM),
            ("mlp_in", "intermediate.dense", DENSE),
            ("mlp_out", "output.dense", DENSE),
            ("mlp_norm", "output.LayerNorm", NORM),
        ),
    )

    @property
    def pooled_dim(self) -> int:
        """The dimension of `pooled`; 0 without a head."""
        return self.sentence_head.layers[-1].features if self.sentence_head else 0

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] normalised embeddings of [batch, tokens] token ids."""
        # Normalised right away, so that only the relative scale of the embeddings matters.
        hidden = super().embed(inputs)
        if self.segments:
            hidden += self.table("segment_embedding", self.segments)[None, :1]
        return layer_norm(self.norm_epsilon, self.dtype, "embedding_norm")(hidden)

    def finish(
        self, hidden: jax.Array, inputs: jax.Array | None, mask: jax.Array | None
    ) -> EncoderOutput:
        """Returns the hidden states as they are, and `pooled` by the head if there is one."""
        del inputs
        head = self.sentence_head
        return EncoderOutput(hidden, None if head is None else head(hidden, mask))
