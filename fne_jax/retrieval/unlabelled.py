"""Pairs that a dataset does not label as matches but a model finds similar."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import cosine

# Captions whose similarities to all images are held at once.
_BLOCK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class UnlabelledPairs:
    """Pairs of a caption and an image that is not its own, the most similar first.

    Attributes:
      caption: [pairs] int64 index.
      image: [pairs] int64 index.
      similarity: [pairs] float32.
    """

    caption: np.ndarray
    image: np.ndarray
    similarity: np.ndarray

    def first(self, count: int) -> UnlabelledPairs:
        """Returns the first so many."""
        return UnlabelledPairs(self.caption[:count], self.image[:count], self.similarity[:count])


def most_similar_unlabelled(
    image_emb: np.ndarray, text_emb: np.ndarray, caption_image: np.ndarray, per_query: int
) -> UnlabelledPairs:
    """Returns each caption's most similar other images and each image's most similar captions.

    The similarities of a block of captions are held at a time, never all.

    Args:
      image_emb: [images, dim] L2-normalised.
      text_emb: [captions, dim] L2-normalised.
      caption_image: [captions] index of each caption's own image.
      per_query: pairs kept of each caption, and of each image. A pair that both keep comes once.

    Raises:
      ValueError: if an embedding is not finite.
    """
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not finite")
    images = len(image_emb)
    of_image = jnp.full((images, per_query), -jnp.inf), jnp.zeros((images, per_query), jnp.int32)
    image_emb = jnp.asarray(image_emb)
    similarity, pair = [], []
    for start in range(0, len(text_emb), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(text_emb)))
        of_caption, of_image = _block(
            text_emb[rows],
            caption_image[rows],
            rows.astype(np.int32),
            image_emb,
            of_image,
            per_query=per_query,
        )
        values, candidates = jax.device_get(of_caption)
        similarity.append(values.ravel())
        pair.append((rows[:, None] * images + candidates).ravel())
    values, captions = jax.device_get(of_image)
    similarity = np.concatenate([*similarity, values.ravel()])
    pair = np.concatenate(
        [*pair, (captions.astype(np.int64) * images + np.arange(images)[:, None]).ravel()]
    )

    there = np.isfinite(similarity)  # not the fillers where there are fewer others
    pair, first = np.unique(pair[there], return_index=True)
    similarity = similarity[there][first]
    order = np.argsort(-similarity, kind="stable")
    caption, image = np.divmod(pair[order], images)
    return UnlabelledPairs(caption, image, similarity[order])


@functools.partial(jax.jit, static_argnames="per_query")
def _block(text_emb, own_image, caption, image_emb, of_image, *, per_query):
    """Returns the best of a block's captions, and of the images over all blocks so far."""
    similarity = cosine(text_emb, image_emb)
    own = own_image[:, None] == jnp.arange(image_emb.shape[0])[None, :]
    similarity = jnp.where(own, -jnp.inf, similarity)
    of_caption = jax.lax.top_k(similarity, min(per_query, image_emb.shape[0]))
    so_far, captions = of_image
    both = jnp.concatenate([so_far, similarity.T], axis=1)
    captions = jnp.concatenate(
        [captions, jnp.broadcast_to(caption[None, :], similarity.T.shape)], axis=1
    )
    values, column = jax.lax.top_k(both, per_query)
    return of_caption, (values, jnp.take_along_axis(captions, column, axis=1))
