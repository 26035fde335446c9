"""How a batch goes through the encoders: all rows at once, or micro-batch by micro-batch.

Either way the loss sees the embeddings of the whole batch, so that its negatives, statistics and
gradients are those of the whole batch. In micro-batches the rows are embedded first, without
keeping anything for a backward pass; the loss gives the gradient of each embedding; each
micro-batch is then embedded again, and its part of that gradient taken back to the parameters
(gradient caching; Gao et al. 2021, arXiv 2101.06983).

Either way each encoder's parameters are gathered once and their gradients are summed over the
devices once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fne_jax.objectives.learned_scalars import LEARNED
from fne_jax.parallel.sharding import StepLayout

# Of whole parameters, a device's rows of the inputs and a dropout key (None for no dropout) to the
# [rows, dim] embeddings of images and of captions, or to what else there is one of for each row.
Encode = Callable[[Any, Any, jax.Array | None], Any]
# Of both embeddings, and of what the objective learns (empty for nothing), to the [] loss and
# whatever else is wanted of it.
LossOfEmbeddings = Callable[[jax.Array, jax.Array, dict[str, jax.Array]], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """All rows at once; the layout says how rows and parameters lie on the devices."""

    layout: StepLayout

    def embed(self, encode: Encode, params: Any, inputs: Any) -> Any:
        """Returns what `encode` makes of all rows without dropout."""
        return self.layout.on_rows(encode, params, inputs, None)

    def loss_and_gradients(
        self,
        encode: Encode,
        params: Any,
        frozen: Any,
        inputs: Any,
        rng: jax.Array,
        loss_fn: LossOfEmbeddings,
    ) -> tuple[tuple[jax.Array, Any], Any]:
        """Returns loss_fn's result and the loss's gradients with respect to `params`.

        `encode` is given both trees of parameters as a pair.
        """

        def loss_of(params):
            embeddings = self.layout.on_rows(encode, (params, frozen), inputs, rng)
            return loss_fn(*embeddings, params.get(LEARNED, {}))

        return jax.value_and_grad(loss_of, has_aux=True)(params)


@dataclasses.dataclass(frozen=True)
class MicroBatches(WholeBatch):
    """A loop over `count` parts of the batch, each spread over all devices.

    The count must divide each device's rows. Each part has dropout of its own, the same in both of
    its passes. The gradients of all parts are summed in float32.
    """

    count: int

    def embed(self, encode, params, inputs):  # noqa: D102 as above
        return self._embed(encode, params, inputs, None)

    def loss_and_gradients(self, encode, params, frozen, inputs, rng, loss_fn):  # noqa: D102

        def gradients_of_rows(params, frozen, rows, rng):
            def add(total, part):
                (inputs, cotangents), rng = part
                _, pullback = jax.vjp(lambda params: encode((params, frozen), inputs, rng), params)
                return jax.tree.map(jnp.add, total, *pullback(cotangents)), None

            start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
            return jax.lax.scan(add, start, (self._split(rows), self._keys(rng)))[0]

        embeddings = self._embed(encode, (params, frozen), inputs, rng)
        learned = params.get(LEARNED, {})
        differentiate = jax.value_and_grad(loss_fn, (0, 1, 2), has_aux=True)
        result, (*cotangents, of_learned) = differentiate(*embeddings, learned)
        rows = inputs, tuple(cotangents)
        gradients = self.layout.sum_on_rows(gradients_of_rows, params, frozen, rows, rng)
        # The encoders do not use these.
        return result, gradients | ({LEARNED: of_learned} if learned else {})

    def _embed(self, encode, params, inputs, rng):
        def embed_rows(params, rows, rng):
            def embed_part(_, part):
                return None, encode(params, *part)

            parts = self._split(rows), self._keys(rng)
            return self._join(jax.lax.scan(embed_part, None, parts)[1])

        return self.layout.on_rows(embed_rows, params, inputs, rng)

    def _keys(self, rng):
        return None if rng is None else jax.random.split(rng, self.count)

    def _split(self, tree):
        # Part k has rows k, k + count, ..., of each device as of the whole batch.
        return jax.tree.map(
            lambda rows: rows.reshape(-1, self.count, *rows.shape[1:]).swapaxes(0, 1), tree
        )

    def _join(self, tree):
        return jax.tree.map(lambda parts: parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]), tree)
