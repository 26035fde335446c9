"""RoBERTa (Liu et al. 2019, arXiv 1907.11692), as in Hugging Face's RobertaModel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fne_jax.encoders.bert import Bert


class Roberta(Bert, kw_only=True):
    """BERT whose positions begin behind the id of padding, and count tokens that are no padding.

    That id is also the row of padding in the position embeddings.
    """

    pad_token_id: int

    layout = Bert.layout._replace(fields={**Bert.layout.fields, "pad_token_id": "pad_token_id"})

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text: those for which there are positions behind padding's."""
        return self.max_length - self.pad_token_id - 1

    def place(self, positions: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] position embeddings of token ids."""
        real = input_ids != self.pad_token_id
        return positions[jnp.cumsum(real, axis=1) * real + self.pad_token_id]


class XlmRoberta(Roberta, kw_only=True):
    """RoBERTa for many languages (Conneau et al. 2019, arXiv 1911.02116)."""
