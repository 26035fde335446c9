"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108), as in Hugging Face's DistilBertModel."""

from __future__ import annotations

from fne_jax.encoders.bert import Bert
from fne_jax.encoders.layouts import DENSE, NORM, TABLE, Layout


class DistilBert(Bert, kw_only=True):
    """BERT without segments, under other names."""

    segments: int = 0

    layout = Layout(
        fields={
            "width": "dim",
            "layers": "n_layers",
            "heads": "n_heads",
            "mlp_width": "hidden_dim",
            "activation": "activation",
            "vocab_size": "vocab_size",
            "max_length": "max_position_embeddings",
        },
        fixed={},
        weights=(
            ("word_embedding", "embeddings.word_embeddings", TABLE),
            ("position_embedding", "embeddings.position_embeddings", TABLE),
            ("embedding_norm", "embeddings.LayerNorm", NORM),
        ),
        layer="transformer.layer.{}.",
        layer_weights=(
            ("attention/query", "attention.q_lin", DENSE),
            ("attention/key", "attention.k_lin", DENSE),
            ("attention/value", "attention.v_lin", DENSE),
            ("attention/output", "attention.out_lin", DENSE),
            ("attention_norm", "sa_layer_norm", NORM),
            ("mlp_in", "ffn.lin1", DENSE),
            ("mlp_out", "ffn.lin2", DENSE),
            ("mlp_norm", "output_layer_norm", NORM),
        ),
    )
