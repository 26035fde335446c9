"""Pairs that a dataset does not label as matches but a model finds similar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.evaluation.top_k import by_blocks
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.objectives.similarity_statistics import cosine


def unlabelled_pairs(split: EmbeddedSplit, *, per_query: int, relative: bool) -> Pairs:
    """Returns the best other images of each caption and the best other captions of each image.

    Args:
      split: The split.
      per_query: Pairs kept of each caption, and of each image. A pair that both keep comes once.
      relative: Whether to score a pair by how far its similarity exceeds that of the caption to
        its own image, rather than by its similarity alone.

    Returns:
      The pairs and their similarities, those of the highest score first.

    Raises:
      ValueError: if an embedding is not finite.
    """
    image_emb, text_emb = split.image_emb, split.text_emb
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not finite")
    images, captions = len(image_emb), np.arange(len(text_emb))
    baseline = split.own_similarity if relative else np.zeros(len(captions), np.float32)
    on_device = jax.device_put(image_emb)
    # Carried on from block to block: images as queries would need all similarities once more.
    shape = images, per_query
    of_images = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)

    def best_of(part: slice):
        nonlocal of_images
        block = text_emb[part], split.caption_image[part], baseline[part], captions[part]
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
    return Pairs(caption, image, similarity=score[order] + baseline[caption])


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
