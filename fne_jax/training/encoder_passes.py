"""How a batch goes through the encoders: all rows at once, or micro-batch by micro-batch.

Either way the loss sees the embeddings of the whole batch, so that its negatives, statistics and
gradients are those of the whole batch. In micro-batches the rows are embedded first, without
keeping anything for a backward pass; the loss gives the gradient of each embedding; each
micro-batch is then embedded again, and its part of that gradient taken back to the parameters
(gradient caching; Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fne_jax.objectives.learned_scalars import LEARNED

# Of parameters, the batch's inputs and a dropout key (None for no dropout) to the [batch, dim]
# embeddings of images and of captions.
Encode = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, jax.Array]]
# Of both embeddings, and of what the objective learns (empty for nothing), to the [] loss and
# whatever else is wanted of it.
LossOfEmbeddings = Callable[[jax.Array, jax.Array, dict[str, jax.Array]], tuple[jax.Array, Any]]


class EncoderPasses(Protocol):
    """What a train step asks of the encoders."""

    def embed(self, encode: Encode, params: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the [batch, dim] embeddings without dropout."""

    def loss_and_gradients(
        self, encode: Encode, params: Any, inputs: Any, rng: jax.Array, loss_fn: LossOfEmbeddings
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """Returns loss_fn's result and the loss's gradients with respect to the parameters."""


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """All rows at once."""

    def embed(self, encode, params, inputs):
        """See `EncoderPasses`."""
        return encode(params, inputs, None)

    def loss_and_gradients(self, encode, params, inputs, rng, loss_fn):
        """See `EncoderPasses`."""

        def loss_of(params):
            return loss_fn(*encode(params, inputs, rng), params.get(LEARNED, {}))

        return jax.value_and_grad(loss_of, has_aux=True)(params)


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """A loop over parts of the batch, each spread over all devices.

    Attributes:
      count: number of parts; it must divide the batch.
      rows: sharding of [part, row, ...], which divides each part's rows over the devices.
    """

    count: int
    rows: jax.sharding.Sharding

    def embed(self, encode, params, inputs):
        """See `EncoderPasses`."""

        def embed_part(_, part):
            return None, encode(params, part, None)

        return self._join(jax.lax.scan(embed_part, None, self._split(inputs))[1])

    def loss_and_gradients(self, encode, params, inputs, rng, loss_fn):
        """See `EncoderPasses`; each part has dropout of its own, the same in both of its passes."""
        parts = self._split(inputs), jax.random.split(rng, self.count)

        def embed_part(_, part):
            return None, encode(params, *part)

        def add_gradients(total, part):
            (part_inputs, part_rng), cotangents = part
            _, pullback = jax.vjp(lambda params: encode(params, part_inputs, part_rng), params)
            return jax.tree.map(jnp.add, total, *pullback(cotangents)), None

        embeddings = self._join(jax.lax.scan(embed_part, None, parts)[1])
        learned = params.get(LEARNED, {})
        differentiate = jax.value_and_grad(loss_fn, (0, 1, 2), has_aux=True)
        result, (*cotangents, of_learned) = differentiate(*embeddings, learned)
        start = jax.tree.map(jnp.zeros_like, params)
        gradients, _ = jax.lax.scan(add_gradients, start, (parts, self._split(tuple(cotangents))))
        # The encoders do not use these.
        return result, gradients | ({LEARNED: of_learned} if learned else {})

    def _split(self, tree):
        # Part k has rows k, k + count, ...: so that a device's own rows make up its share of each
        # part, and none of them moves.
        def split(array):
            parts = array.reshape(-1, self.count, *array.shape[1:]).swapaxes(0, 1)
            return (
                parts if self.rows is None else jax.lax.with_sharding_constraint(parts, self.rows)
            )

        return jax.tree.map(split, tree)

    def _join(self, tree):
        return jax.tree.map(lambda parts: parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]), tree)
