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

    The similarities of a block of captions are held at a time, never all.

    Args:
      image_emb: [images, dim] L2-normalised.
      text_emb: [captions, dim] L2-normalised.
      caption_image: [captions] index of each caption's own image.
      per_query: pairs kept of each caption, and of each image. A pair that both keep comes once.
      relative: score a pair by how far its similarity exceeds that of the caption to its own
        image, rather than by its similarity alone.

    Raises:
      ValueError: if an embedding is not finite.
    """
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: not finite")
    images = len(image_emb)
    own = (text_emb * image_emb[caption_image]).sum(axis=1)
    baseline = own if relative else np.zeros_like(own)
    of_image = jnp.full((images, per_query), -jnp.inf), jnp.zeros((images, per_query), jnp.int32)
    image_emb = jnp.asarray(image_emb)
    score, pair = [], []
    for start in range(0, len(text_emb), _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, len(text_emb)))
        block = text_emb[rows], caption_image[rows], baseline[rows], rows.astype(np.int32)
        of_caption, of_image = _block(*block, image_emb, of_image, per_query=per_query)
        values, candidates = jax.device_get(of_caption)
        score.append(values.ravel())
        pair.append((rows[:, None] * images + candidates).ravel())
    values, captions = jax.device_get(of_image)
    score = np.concatenate([*score, values.ravel()])
    of_images = captions.astype(np.int64) * images + np.arange(images)[:, None]
    pair = np.concatenate([*pair, of_images.ravel()])

    there = np.isfinite(score)  # not the fillers where there are fewer others
    pair, first = np.unique(pair[there], return_index=True)
    score = score[there][first]
    order = np.argsort(-score, kind="stable")
    caption, image = np.divmod(pair[order], images)
    return UnlabelledPairs(caption, image, score[order] + baseline[caption], own[caption])


@functools.partial(jax.jit, static_argnames="per_query")
def _block(text_emb, own_image, baseline, caption, image_emb, of_image, *, per_query):
    """Returns the best of a block's captions, and of the images over all blocks so far."""
    own = own_image[:, None] == jnp.arange(image_emb.shape[0])[None, :]
    score = jnp.where(own, -jnp.inf, cosine(text_emb, image_emb) - baseline[:, None])
    of_caption = jax.lax.top_k(score, min(per_query, image_emb.shape[0]))
    so_far, captions = of_image
    both = jnp.concatenate([so_far, score.T], axis=1)
    captions = jnp.concatenate(
        [captions, jnp.broadcast_to(caption[None, :], score.T.shape)], axis=1
    )
    values, column = jax.lax.top_k(both, per_query)
    return of_caption, (values, jnp.take_along_axis(captions, column, axis=1))
