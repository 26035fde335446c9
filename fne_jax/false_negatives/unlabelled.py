"""Pairs that a dataset does not label as matches but a model finds similar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.data.pair_columns import Pairs
from fne_jax.evaluation.top_k import by_blocks
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.objectives.similarity_statistics import cosine


def unlabelled_pairs(split: EmbeddedSplit, per_query: int) -> Pairs:
    """Returns the most similar other images of each caption, and other captions of each image.

    Of each `per_query` are kept; a pair that both keep comes once.

    Returns:
      The pairs and their similarities, the most similar first.

    Raises ValueError if an embedding is not finite.
    """
    image_emb, text_emb = split.image_emb, split.text_emb
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not finite")
    images, captions = len(image_emb), np.arange(len(text_emb))
    on_device = jax.device_put(image_emb)
    # Carried on from block to block: images as queries would need all similarities once more.
    shape = images, per_query
    of_images = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)

    def best_of(part: slice):
        nonlocal of_images
        block = text_emb[part], split.caption_image[part], captions[part]
        of_captions, of_images = _best(*block, on_device, of_images)
        return of_captions

    of_caption, best_images = by_blocks(len(captions), best_of)
    of_image, best_captions = jax.device_get(of_images)
    similarity = np.concatenate([of_caption.ravel(), of_image.ravel()])
    of_captions = captions[:, None] * images + best_images
    of_images = best_captions.astype(np.int64) * images + np.arange(images)[:, None]
    pair = np.concatenate([of_captions.ravel(), of_images.ravel()])

    there = np.isfinite(similarity)  # not the fillers where there are fewer others
    pair, first = np.unique(pair[there], return_index=True)
    similarity = similarity[there][first]
    order = np.argsort(-similarity, kind="stable")
    return Pairs(*np.divmod(pair[order], images), similarity=similarity[order])


@jax.jit
def _best(text_emb, own_image, caption, image_emb, of_images):
    """Returns the best images of a block's captions, and the images' best captions so far.

    Both are similarities [queries, per_query] and the rows that they are of.
    """
    own = own_image[:, None] == jnp.arange(image_emb.shape[0])[None, :]
    similarity = jnp.where(own, -jnp.inf, cosine(text_emb, image_emb))
    so_far, captions = of_images
    per_query = so_far.shape[1]
    of_captions = tuple(jax.lax.top_k(similarity, min(per_query, image_emb.shape[0])))
    both = jnp.concatenate([so_far, similarity.T], axis=1)
    caption = jnp.broadcast_to(caption[None, :], similarity.T.shape)
    values, column = jax.lax.top_k(both, per_query)
    captions = jnp.concatenate([captions, caption], axis=1)
    return of_captions, (values, jnp.take_along_axis(captions, column, axis=1))
