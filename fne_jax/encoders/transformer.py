"""What all encoders share: the transformer layer, stacks of layers, sizes and options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.encoders.attention import AUTO, attend, precision_of
from fne_jax.encoders.rematerialization import NONE, rematerialized
from fne_jax.errors import UserError

# Random initialisation follows the original ViT's code rather than BERT's fixed deviation of 0.02,
# which suits a width of 768 but leaves narrow towers nearly silent for their first hundred steps.
KERNEL_INIT = nn.initializers.xavier_uniform()
# Name of a tower's stack of layers.
STACK = "encoder"


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


# By the names that Hugging Face's configs give them.
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": _quick_gelu,
}


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder computes.

    Attributes:
      last_hidden_state: [batch, tokens, width] hidden states in the compute dtype.
      pooled: [batch, dim] float32 embedding that the encoder was trained to give, not normalised;
        None for encoders that have none of their own (ViT and BERT).
    """

    last_hidden_state: jax.Array
    pooled: jax.Array | None = None


class Attention(nn.Module):
    """Multi-head attention with biases on all four projections.

    Attributes:
      heads: Number of heads; it must divide the width.
      dtype: Compute dtype. The softmax is float32 in any case.
      attend: What mixes the values: `attend`, with its options set.
    """

    heads: int
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(
        self, hidden: jax.Array, mask: jax.Array | None, queries: jax.Array | None = None
    ) -> jax.Array:
        """Returns the mixture of tokens that each query attends to.

        Args:
          hidden: [batch, tokens, width] hidden states.
          mask: [batch, tokens] bool, False where no query must look; or None.
          queries: [batch, queries, width] hidden states that ask; None for the tokens themselves.

        Returns:
          A [batch, queries, width] array in the compute dtype.

        Raises:
          UserError: if there is no such implementation, or it cannot run here.
        """
        width = hidden.shape[-1]
        queries = hidden if queries is None else queries

        def heads_of(x, name):
            out = dense(width, self.dtype, name)(x)
            return out.reshape(*x.shape[:2], self.heads, width // self.heads)

        query = heads_of(queries, "query")
        key, value = heads_of(hidden, "key"), heads_of(hidden, "value")
        mixed = self.attend(query, key, value, mask).reshape(queries.shape)
        return dense(width, self.dtype, "output")(mixed)


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals, normalised before (ViT) or after (BERT) each.

    Attributes:
      heads: Number of attention heads.
      mlp_width: Width of the MLP's hidden layer.
      pre_norm: Whether the input of each part is normalised, rather than the sum after it.
      norm_epsilon: Epsilon of the LayerNorms.
      activation: Activation of the MLP, a key of `ACTIVATIONS`.
      dropout: Dropout rate on the output of each part.
      dtype: Compute dtype.
      attend: What mixes the values: `attend`, with its options set.
    """

    heads: int
    mlp_width: int
    pre_norm: bool
    norm_epsilon: float
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend

    @nn.compact
    def __call__(
        self, hidden: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Returns the next hidden states and None, the pair that `nn.scan` asks for.

        Args:
          hidden: [batch, tokens, width] hidden states.
          mask: [batch, tokens] bool, False where no token must look; or None.
          deterministic: whether dropout is off.
        """

        def mix(x):
            return Attention(self.heads, self.dtype, self.attend, name="attention")(x, mask)

        def transform(x):
            return mlp(x, self.mlp_width, self.activation, self.dtype)

        for part, name in ((mix, "attention_norm"), (transform, "mlp_norm")):
            norm = layer_norm(self.norm_epsilon, self.dtype, name)
            out = part(norm(hidden) if self.pre_norm else hidden)
            out = nn.Dropout(self.dropout)(out, deterministic=deterministic)
            hidden = hidden + out if self.pre_norm else norm(hidden + out)
        return hidden, None


class TransformerStack(nn.Module):
    """A sequence of layers, optionally scanned (compiled once) and rematerialised.

    Attributes:
      layers: Number of layers.
      heads: Number of attention heads.
      mlp_width: Width of the MLPs' hidden layers.
      pre_norm: Whether the input of each part is normalised, rather than the sum after it.
      norm_epsilon: Epsilon of the LayerNorms.
      activation: Activation of the MLPs, a key of `ACTIVATIONS`.
      dropout: Dropout rate on the output of each part.
      dtype: Compute dtype.
      attend: What mixes the values: `attend`, with its options set.
      scan_layers: Whether the layers' parameters are stacked along a leading axis, under one name,
        so that one layer is compiled and looped over.
      remat: What a layer keeps for its backward pass, a key of `REMATS`.
    """

    layers: int
    heads: int
    mlp_width: int
    pre_norm: bool
    norm_epsilon: float
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend
    scan_layers: bool = False
    remat: str | bool = NONE

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Returns the [batch, tokens, width] hidden states after all layers.

        Args:
          hidden: [batch, tokens, width] hidden states.
          mask: [batch, tokens] bool, False where no token must look; or None.
          deterministic: whether dropout is off.
        """
        layer = rematerialized(TransformerLayer, self.remat, scanned=self.scan_layers)
        sizes = (
            self.heads,
            self.mlp_width,
            self.pre_norm,
            self.norm_epsilon,
            self.activation,
            self.dropout,
            self.dtype,
            self.attend,
        )
        if self.scan_layers:
            scanned = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.layers,
            )
            return scanned(*sizes, name="layers")(hidden, mask, deterministic)[0]
        for index in range(self.layers):
            hidden, _ = layer(*sizes, name=f"layer_{index}")(hidden, mask, deterministic)
        return hidden


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Returns parameters of which the layers' kernels have the compute dtype.

    It changes no bit of what the towers compute, for these kernels are cast before anything else is
    done with them. Embeddings, biases, norms and projections, which are used in float32 in part,
    stay as they are.

    Args:
      params: The parameters of towers, by any names above the towers' own.
      dtype: The towers' compute dtype.
    """

    def cast(path, leaf):
        names = [part.key for part in path]
        return leaf.astype(dtype) if STACK in names and names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


class Tower(nn.Module, kw_only=True):
    """Sizes and options that every encoder has.

    Attributes:
      width: Dimension of a token's hidden state.
      layers: Number of transformer layers.
      heads: Number of attention heads.
      mlp_width: Width of the MLPs' hidden layers.
      activation: Activation of the MLPs, a key of `ACTIVATIONS`.
      norm_epsilon: Epsilon of the LayerNorms; 1e-12 in Google's ViT and BERT.
      dropout: Dropout rate after the embeddings and in the layers.
      dtype: Compute dtype; parameters stay float32.
      attention: How attention is computed, a key of `ATTENTIONS`, or "auto".
      mesh: The devices that programs are for, over which batches are split; None for the default
        device alone.
      scan_layers: Whether the layers' parameters are stacked along a leading axis, under one name,
        so that one layer is compiled and looped over.
      remat: What a layer keeps for its backward pass, a key of `REMATS`.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention: str = AUTO
    mesh: jax.sharding.Mesh | None = None
    scan_layers: bool = False
    remat: str | bool = NONE

    @property
    def pooled_dim(self) -> int:
        """The dimension of the encoder's own `pooled`; 0 where it has none."""
        return 0

    def attend(self, *, causal: bool = False) -> Callable[..., jax.Array]:
        """Returns what mixes the values of query, key, value and mask, as the tower computes it."""
        return functools.partial(
            attend, causal=causal, implementation=self.attention, mesh=self.mesh
        )

    def run_layers(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
        *,
        pre_norm: bool,
        causal: bool = False,
    ) -> jax.Array:
        """Returns the [batch, tokens, width] hidden states after dropout and all layers.

        Args:
          hidden: [batch, tokens, width] embeddings.
          mask: [batch, tokens] bool, False where no token must look; or None.
          deterministic: whether dropout is off.
          pre_norm: whether the input of each part is normalised, rather than the sum after it.
          causal: whether tokens must not look at later ones.
        """
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        return TransformerStack(
            layers=self.layers,
            heads=self.heads,
            mlp_width=self.mlp_width,
            pre_norm=pre_norm,
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            dropout=self.dropout,
            dtype=self.dtype,
            attend=self.attend(causal=causal),
            scan_layers=self.scan_layers,
            remat=self.remat,
            name=STACK,
        )(hidden, mask, deterministic)


class TextTower(Tower):
    """What the text encoders share.

    Attributes:
      vocab_size: Number of token ids.
      max_length: Number of tokens that have position embeddings.
    """

    vocab_size: int
    max_length: int

    def embed_tokens(self, input_ids: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] float32 sum of word and position embeddings.

        Args:
          input_ids: [batch, tokens] int32 token ids.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        tokens = input_ids.shape[1]
        if tokens > self.max_length:
            raise ValueError(f"input_ids: expected at most {self.max_length} tokens, got {tokens}")
        words = self.table("word_embedding", self.vocab_size)[input_ids]
        return words + self.table("position_embedding", self.max_length)[None, :tokens]

    def table(self, name: str, rows: int) -> jax.Array:
        """Returns the [rows, width] float32 embeddings that are stored under a name."""
        return self.param(name, nn.initializers.normal(0.02), (rows, self.width))


def mlp(x: jax.Array, hidden_width: int, activation: str, dtype: Any) -> jax.Array:
    """Applies the two dense layers `mlp_in` and `mlp_out` of the module that calls this.

    Args:
      x: [..., width] hidden states.
      hidden_width: Number of outputs of the first layer.
      activation: A key of `ACTIVATIONS`.
      dtype: Compute dtype.

    Returns:
      A [..., width] array in the compute dtype.

    Raises:
      UserError: if there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    hidden = ACTIVATIONS[activation](dense(hidden_width, dtype, "mlp_in")(x))
    return dense(x.shape[-1], dtype, "mlp_out")(hidden)


def layer_norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm whose variance is computed exactly (two passes), as PyTorch's is."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def dense(width: int, dtype: Any, name: str | None = None, *, use_bias: bool = True) -> nn.Dense:
    """Returns a dense layer whose products have all bits of the dtype that they compute in."""
    return nn.Dense(
        width,
        use_bias=use_bias,
        dtype=dtype,
        precision=precision_of(dtype),
        kernel_init=KERNEL_INIT,
        name=name,
    )
