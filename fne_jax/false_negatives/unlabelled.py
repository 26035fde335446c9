"""Pairs that a dataset does not label as matches but a model finds similar."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.evaluation.blocks import by_blocks
from fne_jax.objectives.similarity_statistics import cosine


@dataclasses.dataclass(frozen=True)
class UnlabelledPairs:
    """Pairs of a caption and an image that is not its own, those of the highest score first.

    Attributes:
      caption: [pairs] int64 index.
      image: [pairs] int64 index.
      similarity: [pairs] float32 of the two.
      own_similarity: [pairs] float32, the caption's to its own image.
    """

    caption: np.ndarray
    image: np.ndarray
    similarity: np.ndarray
    own_similarity: np.ndarray

    def __getitem__(self, index: slice | np.ndarray) -> UnlabelledPairs:
        """Returns the pairs of a slice or of a mask, in order."""
        return UnlabelledPairs(
            self.caption[index],
            self.image[index],
            self.similarity[index],
            self.own_similarity[index],
        )


def unlabelled_pairs(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    caption_image: np.ndarray,
    *,
    per_query: int,
    relative: bool,
) -> UnlabelledPairs:
    """Returns the best other images of each caption and the best other captions of each image.

    Args:
      image_emb: [images, dim] L2-normalised embeddings.
      text_emb: [captions, dim] L2-normalised embeddings.
      caption_image: [captions] index of each caption's own image.
      per_query: Pairs kept of each caption, and of each image. A pair that both keep comes once.
      relative: Whether to score a pair by how far its similarity exceeds that of the caption to
        its own image, rather than by its similarity alone.

    Raises:
      ValueError: if an embedding is not finite.
    """
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not finite")
    images, captions = image_emb.shape[0], np.arange(len(text_emb))
    own = (text_emb * image_emb[caption_image]).sum(axis=1)
    baseline = own if relative else np.zeros_like(own)
    on_device = jax.device_put(image_emb)
    # Carried on from block to block: images as queries would need all similarities once more.
    of_images = jnp.full((images, per_query), -jnp.inf), jnp.zeros((images, per_query), jnp.int32)

    def best_of(part: slice):
        nonlocal of_images
        block = text_emb[part], caption_image[part], baseline[part], captions[part]
        of_captions, of_images = _best(*block, on_device, of_images)
        return of_captions

    caption_score, best_images = by_blocks(len(captions), best_of)
    image_score, best_captions = jax.device_get(of_images)
    score = np.concatenate([caption_score.ravel(), image_score.ravel()])
    of_captions = captions[:, None] * images + best_images
    of_images = best_captions.astype(np.int64) * images + np.arange(images)[:, None]
    pair = np.concatenate([of_captions.ravel(), of_images.ravel()])

    there = np.isfinite(score)  # not the fillers where there are fewer others
    pair, first = np.unique(pair[there], return_index=True)
    score = score[there][first]
    order = np.argsort(-score, kind="stable")
    caption, image = np.divmod(pair[order], images)
    return UnlabelledPairs(caption, image, score[order] + baseline[caption], own[caption])


def hardest_candidates(
    query_emb: np.ndarray,
    item_emb: np.ndarray,
    query_image: np.ndarray,
    item_image: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the most similar items of each query that are not of its own image.

    Args:
      query_emb: [queries, dim] L2-normalised embeddings.
      item_emb: [items, dim] L2-normalised embeddings.
      query_image: [queries] image of each query.
      item_image: [items] image of each item.
      count: How many items of each query.

    Returns:
      [queries, count] int32 rows of the items and [queries, count] float32 similarities, the most
      similar first; of the length `items` where there are fewer, and of similarity -inf where
      nothing but items of the own image is left.
    """
    count = min(count, len(item_emb))
    items = jax.device_put(item_emb), jax.device_put(item_image)
    similarity, rows = by_blocks(
        len(query_emb), lambda part: _hardest(query_emb[part], query_image[part], *items, count)
    )
    return rows, similarity


@functools.partial(jax.jit, static_argnames="count")
def _hardest(query_emb, query_image, item_emb, item_image, count):
    own = query_image[:, None] == item_image[None, :]
    similarity = jnp.where(own, -jnp.inf, cosine(query_emb, item_emb))
    return tuple(jax.lax.top_k(similarity, count))


@jax.jit
def _best(text_emb, own_image, baseline, caption, image_emb, of_images):
    """Returns the best images of a block's captions, and the images' best captions so far.

    Both are scores [queries, per_query] and the rows that they are of.
    """
    own = own_image[:, None] == jnp.arange(image_emb.shape[0])[None, :]
    score = jnp.where(own, -jnp.inf, cosine(text_emb, image_emb) - baseline[:, None])
    so_far, captions = of_images
    per_query = so_far.shape[1]
    of_captions = tuple(jax.lax.top_k(score, min(per_query, image_emb.shape[0])))
    both = jnp.concatenate([so_far, score.T], axis=1)
    caption = jnp.broadcast_to(caption[None, :], score.T.shape)
    values, column = jax.lax.top_k(both, per_query)
    captions = jnp.concatenate([captions, caption], axis=1)
    return of_captions, (values, jnp.take_along_axis(captions, column, axis=1))
