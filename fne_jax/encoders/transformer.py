"""What all encoders share: the transformer layer, stacks of layers, sizes and options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from fne_jax.encoders.attention import AUTO, attend
from fne_jax.encoders.layers import Attention, layer_norm, mlp
from fne_jax.encoders.layouts import Layout
from fne_jax.encoders.rematerialization import NONE, rematerialized

# Name of a tower's stack of layers.
STACK = "encoder"
# Names in a scanned stack of its layers' parameters, and of those that are frozen at the bottom.
LAYERS, FROZEN_LAYERS = "layers", "frozen_layers"
# `Tower.frozen_layers` of a tower that is frozen as a whole.
ALL = "all"


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder computes.

    Attributes:
      last_hidden_state: [batch, tokens, pooled_layers * width] hidden states in the compute dtype.
      pooled: [batch, dim] float32 embedding that the encoder was trained to give, not normalised;
        None for encoders that have none of their own (ViT and BERT).
    """

    last_hidden_state: jax.Array
    pooled: jax.Array | None = None


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals, normalised before (ViT) or after (BERT) each.

    Its attributes are as those of `Tower`, but for two.

    Attributes:
      attend: What mixes the values: `attend`, with its options set.
      returned: Whether the hidden states are returned a second time, for a scan to collect.
    """

    heads: int
    mlp_width: int
    pre_norm: bool
    norm_epsilon: float
    activation: str = "gelu"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend
    key_bias: bool = True
    layer_scale: bool = False
    lora_rank: int = 0
    returned: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the next [batch, tokens, width] hidden states twice, or with None, for `nn.scan`.

        The mask and the bias are as of `attend`; `deterministic` says whether dropout is off.
        """

        attention = Attention(
            self.heads, self.dtype, self.attend, self.key_bias, self.lora_rank, name="attention"
        )

        def mix(x):
            return attention(x, mask, bias=bias)

        def transform(x):
            return mlp(x, self.mlp_width, self.activation, self.dtype, self.lora_rank)

        for part, name in ((mix, "attention"), (transform, "mlp")):
            norm = layer_norm(self.norm_epsilon, self.dtype, f"{name}_norm")
            out = part(norm(hidden) if self.pre_norm else hidden)
            if self.layer_scale:
                ones, width = nn.initializers.ones, hidden.shape[-1]
                scale = self.param(f"{name}_scale", ones, (width,), jnp.float32)
                out *= scale.astype(self.dtype)[None, None]
            out = nn.Dropout(self.dropout)(out, deterministic=deterministic)
            hidden = hidden + out if self.pre_norm else norm(hidden + out)
        return hidden, hidden if self.returned else None


class TransformerStack(nn.Module):
    """A sequence of layers, optionally scanned (compiled once) and rematerialised.

    Attributes:
      layers: Number of layers.
      layer_options: The attributes of each `TransformerLayer`.
      scan_layers: As of `Tower`.
      remat: As of `Tower`.
      frozen: How many of the layers, from the bottom, are frozen. They have no dropout and no
        low-rank changes, and their stacked parameters a name of their own.
      returned: How many of the last layers have their hidden states returned, joined along the
        tokens.
    """

    layers: int
    layer_options: Mapping[str, Any]
    scan_layers: bool = False
    remat: str = NONE
    frozen: int = 0
    returned: int = 1

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        deterministic: bool,
        bias: jax.Array | None = None,
        *,
        lower: bool = True,
        upper: bool = True,
    ) -> jax.Array:
        """Returns the [batch, returned * tokens, width] hidden states after the last layers.

        It takes what a `TransformerLayer` does. `lower` says whether the frozen layers run, and
        `upper` whether the others do; without these, what the frozen ones give is returned,
        [batch, tokens, width].
        """
        states, several = [], self.returned > 1 and upper
        kind = rematerialized(TransformerLayer, self.remat, scanned=self.scan_layers)
        all_options = {**self.layer_options, "returned": several}
        frozen_options = {**all_options, "lora_rank": 0}
        frozen, others = range(self.frozen if lower else 0), range(self.frozen, self.layers)
        for name, indices, options, off in (
            (FROZEN_LAYERS, frozen, frozen_options, True),
            (LAYERS, others if upper else (), all_options, deterministic),
        ):
            if not self.scan_layers:
                for index in indices:
                    layer = kind(**options, name=f"layer_{index}")
                    hidden, state = layer(hidden, mask, off, bias)
                    states.append(state)
            elif indices:
                scanned = nn.scan(
                    kind,
                    variable_axes={"params": 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
                    length=len(indices),
                )
                hidden, every = scanned(**options, name=name)(hidden, mask, off, bias)
                states += [] if every is None else list(every)
        return jnp.concatenate(states[-self.returned :], axis=1) if several else hidden


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Returns parameters of towers of which the layers' kernels have the compute dtype.

    It changes no bit of what the towers compute, for these kernels are cast before anything else is
    done with them. Embeddings, biases, norms and projections, which are used in float32 in part,
    stay as they are. Names above the towers' own may be any.
    """

    def cast(path, leaf):
        names = [getattr(part, "key", None) for part in path]
        return leaf.astype(dtype) if STACK in names and names[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


# The attributes of `TransformerLayer` that a `Tower` has under the same names.
_OF_LAYERS = (
    *("heads", "mlp_width", "pre_norm", "norm_epsilon", "activation", "dropout", "dtype"),
    *("key_bias", "layer_scale", "lora_rank"),
)


class Tower(nn.Module, kw_only=True):
    """An encoder: `embed`, a stack of layers, and `finish`, of which its kind has its own.

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
      frozen_layers: How many layers are frozen, from the bottom, the embeddings with them; "all"
        for all parameters, None for none. What is frozen has no dropout.
      lora_rank: Rank of the learned changes of the layers' kernels, all else being frozen; 0 for
        none.
      pooled_layers: How many of the last layers are pooled: `last_hidden_state` has their hidden
        states beside each other. More than 1 suits towers without a `pooled` of their own.
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
    remat: str = NONE
    frozen_layers: int | str | None = None
    lora_rank: int = 0
    pooled_layers: int = 1

    # Whether the input of each part of a layer is normalised, rather than the sum after it.
    pre_norm: ClassVar[bool] = True
    # Whether tokens must not look at later ones.
    causal: ClassVar[bool] = False
    # Whether a bias is added to the keys of the attention.
    key_bias: ClassVar[bool] = True
    # Whether a learned vector scales the output of each part of a layer (Touvron et al. 2021, arXiv
    # 2103.17239).
    layer_scale: ClassVar[bool] = False
    # What Hugging Face calls its sizes and weights.
    layout: ClassVar[Layout]
    # The names of parameters that all layers use.
    in_all_layers: ClassVar[tuple[str, ...]] = ()
    # The names of the parameters that `finish` uses.
    after_layers: ClassVar[tuple[str, ...]] = ("final_norm",)
    # The name of the attribute that is the dimension of `pooled`; "" where there is none.
    pooled_as: ClassVar[str] = ""

    @property
    def pooled_dim(self) -> int:
        """The dimension of the encoder's own `pooled`; 0 where it has none."""
        return getattr(self, self.pooled_as) if self.pooled_as else 0

    @property
    def frozen_depth(self) -> int:
        """How many layers are frozen, from the bottom."""
        return self.layers if self.frozen_layers == ALL else self.frozen_layers or 0

    def attend(self) -> Callable[..., jax.Array]:
        """Returns what mixes the values of query, key, value and mask, as the tower computes it."""
        return functools.partial(
            attend, causal=self.causal, implementation=self.attention, mesh=self.mesh
        )

    def attention_bias(self, tokens: int) -> jax.Array | None:
        """Returns what all layers add to their scores, [heads, tokens, tokens] float32; or None."""
        del tokens
        return None

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Returns the [batch, tokens, width] embeddings of pixels or token ids."""
        raise NotImplementedError

    def finish(
        self, hidden: jax.Array, inputs: jax.Array | None, mask: jax.Array | None
    ) -> EncoderOutput:
        """Returns what the encoder makes of the [batch, tokens, width] hidden states."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array | None,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        hidden: jax.Array | None = None,
        lower: bool = False,
    ) -> Any:
        """Encodes normalised pixels or token ids, or goes on from the frozen layers' hidden states.

        Args:
          inputs: [batch, height, width, 3] pixels, or [batch, tokens] int32 ids. An image tower
            needs none with `hidden`.
          mask: [batch, tokens], 0 at padding; None where there is none.
          deterministic: whether dropout is off.
          hidden: What this returned with `lower`; None to begin with the inputs.
          lower: whether to stop after the frozen layers.

        Returns:
          An `EncoderOutput`; with `lower` the [batch, tokens, width] hidden states after the frozen
          layers, in the compute dtype.

        Raises:
          ValueError: if the pixels are not `image_size` square, or there are more ids than
            `max_tokens`.
        """
        mask = None if mask is None else mask.astype(bool)
        begun = hidden is not None
        if not begun:
            off = deterministic or self.frozen_layers is not None
            hidden = self.embed(inputs).astype(self.dtype)
            hidden = nn.Dropout(self.dropout)(hidden, deterministic=off)
        stack = TransformerStack(
            layers=self.layers,
            layer_options={name: getattr(self, name) for name in _OF_LAYERS}
            | {"attend": self.attend()},
            scan_layers=self.scan_layers,
            remat=self.remat,
            frozen=self.frozen_depth,
            returned=self.pooled_layers,
            name=STACK,
        )
        bias = self.attention_bias(hidden.shape[1])
        hidden = stack(hidden, mask, deterministic, bias, lower=not begun, upper=not lower)
        if lower:
            return hidden
        out = self.finish(hidden, inputs, mask)
        if self.pooled_layers > 1:
            layers = jnp.split(out.last_hidden_state, self.pooled_layers, axis=1)
            out = out.replace(last_hidden_state=jnp.concatenate(layers, axis=-1))
        return out
