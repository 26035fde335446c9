"""MPNet (Song et al. 2020, arXiv 2004.09297), as in Hugging Face's MPNetModel."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.encoders.layouts import DENSE, NORM, TABLE, TEXT_SIZES, Layout
from fne_jax.encoders.roberta import Roberta

# Buckets of distances, half of them for tokens before the query and half for those after; and how
# many of a half hold a single distance. Hugging Face's model takes no other numbers.
_BUCKETS, _SINGLE = 32, 8
# The distance from which on all are in the last bucket of a half.
_FARTHEST = 128


class MPNet(Roberta, kw_only=True):
    """RoBERTa without segments, with a bias of relative positions that all layers share."""

    segments: int = 0
    # Whatever the config says.
    pad_token_id: int = 1

    in_all_layers = ("relative_attention_bias",)

    layout = Layout(
        fields=TEXT_SIZES,
        fixed={"relative_attention_num_buckets": _BUCKETS},
        weights=(
            ("word_embedding", "embeddings.word_embeddings", TABLE),
            ("position_embedding", "embeddings.position_embeddings", TABLE),
            ("embedding_norm", "embeddings.LayerNorm", NORM),
            ("relative_attention_bias", "encoder.relative_attention_bias", TABLE),
        ),
        layer="encoder.layer.{}.",
        layer_weights=(
            ("attention/query", "attention.attn.q", DENSE),
            ("attention/key", "attention.attn.k", DENSE),
            ("attention/value", "attention.attn.v", DENSE),
            ("attention/output", "attention.attn.o", DENSE),
            ("attention_norm", "attention.LayerNorm", NORM),
            ("mlp_in", "intermediate.dense", DENSE),
            ("mlp_out", "output.dense", DENSE),
            ("mlp_norm", "output.LayerNorm", NORM),
        ),
    )

    def attention_bias(self, tokens: int) -> jax.Array:
        """Returns the [heads, tokens, tokens] float32 bias of each query's distance to a token."""
        init = nn.initializers.normal(0.02, jnp.float32)
        table = self.param("relative_attention_bias", init, (_BUCKETS, self.heads))
        buckets = jnp.asarray(_bucket_of(self.max_tokens))[:tokens, :tokens]
        return table[buckets].transpose(2, 0, 1)


def _bucket_of(tokens: int) -> np.ndarray:
    """Returns the [tokens, tokens] int bucket of each query's (row's) distance to each token.

    Buckets of larger distances hold ever more of them: each bound is the square root of
    `_FARTHEST / _SINGLE`, to the power of 1 / 4, times the one before.
    """
    ahead = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    distance = np.abs(ahead)
    half = _BUCKETS // 2
    growing = half - _SINGLE
    log = np.log(np.maximum(distance, _SINGLE) / _SINGLE) / np.log(_FARTHEST / _SINGLE)
    far = np.minimum(_SINGLE + (log * growing).astype(int), half - 1)
    return np.where(distance < _SINGLE, distance, far) + half * (ahead > 0)
