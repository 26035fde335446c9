"""Ranks of labelled matches in cross-modal retrieval.

Ties count against the model: an item that does not match but is exactly as similar as the match
ranks before it. A collapsed model, all of whose embeddings are equal, so scores 0.

Similarities are walked over in tiles here, and not in `top_k.by_blocks`: each of them serves both
directions, and the shape of a tile is what the speed depends on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.objectives.similarity_statistics import cosine

# Tiles of the similarity matrix: of a shape whose products a CPU computes fast (1.1 s for 5,000 x
# 25,000, against 1.75 s in tiles of 256 x 2,560), all of one, so that one program serves every size
# of split and equal embeddings get equal similarities everywhere.
_TILE_IMAGES = 512
_TILE_TEXTS = 5120


class Ranks(NamedTuple):
    """0-based ranks: how many items that do not match come before the (best) match.

    Attributes:
      i2t: [images] int, of each image's best-ranked caption among all captions.
      t2i: [texts] int, of each caption's image among all images.
    """

    i2t: np.ndarray
    t2i: np.ndarray


def match_ranks(image_emb: np.ndarray, text_emb: np.ndarray, text_image_index: np.ndarray) -> Ranks:
    """Returns the rank of every query's match, by counting; nothing is sorted.

    Each similarity is computed once and serves both directions, a tile of the matrix at a time.
    The tiles that hold a caption with its own image are computed first and kept, about
    `images / 512 + texts / 5120` tiles of 10 MB, since they give what the others are compared
    with.

    Args:
      image_emb: [images, dim] L2-normalised embeddings.
      text_emb: [texts, dim] L2-normalised embeddings.
      text_image_index: [texts] integer row of `image_emb` that each caption describes. Every
        image needs a caption.

    Raises ValueError on shapes that do not fit, an index out of range, an image without captions,
    or an embedding that is not finite.
    """
    image_emb, text_emb = np.asarray(image_emb), np.asarray(text_emb)
    owner = np.asarray(text_image_index)
    check_embeddings(image_emb, text_emb)
    _check_owner(owner, len(image_emb), len(text_emb))
    # Captions in the order of their images: those of a tile of images lie in few tiles of texts.
    order = np.argsort(owner, kind="stable")
    owner = owner[order].astype(np.int32)
    images = _tiles(image_emb, _TILE_IMAGES)
    texts = _tiles(text_emb if (order[1:] > order[:-1]).all() else text_emb[order], _TILE_TEXTS)
    image_row = _tiles(np.arange(len(image_emb), dtype=np.int32), _TILE_IMAGES, padding=-1)
    text_owner = _tiles(owner, _TILE_TEXTS, padding=-2)

    best = np.full((len(images), _TILE_IMAGES), -np.inf, np.float32)
    own = np.full((len(texts), _TILE_TEXTS), -np.inf, np.float32)
    kept = {}
    text_tile = np.arange(len(owner)) // _TILE_TEXTS
    for i, j in np.unique(np.stack([owner // _TILE_IMAGES, text_tile]), axis=1).T:
        kept[i, j] = _similarities(images[i], texts[j])
        of_image, of_text = _own_similarities(kept[i, j], image_row[i], text_owner[j])
        best[i] = np.maximum(best[i], of_image)
        own[j] = np.maximum(own[j], of_text)

    i2t, t2i = np.zeros(best.shape, int), np.zeros(own.shape, int)
    own = [jnp.asarray(tile) for tile in own]
    for i in range(len(images)):
        counts = []
        for j in range(len(texts)):
            similarity = kept.pop((i, j), None)
            if similarity is None:
                similarity = _similarities(images[i], texts[j])
            counts.append(_ahead(similarity, best[i], own[j], image_row[i], text_owner[j]))
        for j, (of_image, of_text) in enumerate(jax.device_get(counts)):
            i2t[i] += of_image
            t2i[j] += of_text
    in_order = np.empty(len(owner), int)
    in_order[order] = t2i.ravel()[: len(owner)]
    return Ranks(i2t.ravel()[: len(image_emb)], in_order)


def check_embeddings(image_emb: np.ndarray, text_emb: np.ndarray) -> None:
    """Raises ValueError unless both are [rows, dim] of one dim, and finite."""
    if image_emb.ndim != 2 or text_emb.ndim != 2 or image_emb.shape[1] != text_emb.shape[1]:
        raise ValueError(
            "image_emb and text_emb: expected [images, dim] and [texts, dim], "
            f"got {image_emb.shape} and {text_emb.shape}"
        )
    for name, array in (("image_emb", image_emb), ("text_emb", text_emb)):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise ValueError(f"{name}: not finite in {len(bad)} rows, first {bad[:10].tolist()}")


def _check_owner(owner, images, texts):
    if owner.shape != (texts,):
        raise ValueError(f"text_image_index: expected shape ({texts},), got {owner.shape}")
    if not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(f"text_image_index: expected integers, got {owner.dtype}")
    if texts and (owner.min() < 0 or owner.max() >= images):
        raise ValueError(
            f"text_image_index: expected rows 0 to {images - 1}, got {owner.min()} to {owner.max()}"
        )
    lonely = np.setdiff1d(np.arange(images), owner)
    if len(lonely):
        raise ValueError(f"images without a caption cannot be ranked: rows {lonely[:10].tolist()}")
    if not images:
        raise ValueError("image_emb: there are no images to rank")


def _tiles(array, size, padding=0):
    """Returns the rows as arrays of `size` rows on the device, the last one padded."""
    tiles = [array[start : start + size] for start in range(0, len(array), size)]
    missing = size - len(tiles[-1])
    widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    tiles[-1] = np.pad(tiles[-1], widths, constant_values=padding)
    return [jnp.asarray(tile) for tile in tiles]


_similarities = jax.jit(cosine)


@jax.jit
def _own_similarities(similarity, image_row, text_owner):
    """Returns the highest similarity to an own caption, [images], and to the image, [texts]."""
    own = image_row[:, None] == text_owner[None, :]
    similarity = jnp.where(own, similarity, -jnp.inf)
    return similarity.max(axis=1), similarity.max(axis=0)


@jax.jit
def _ahead(similarity, best, own, image_row, text_owner):
    """Returns how many captions come before each image's best, and images before each own."""
    other = image_row[:, None] != text_owner[None, :]
    other &= (image_row >= 0)[:, None] & (text_owner >= 0)[None, :]
    i2t = other & (similarity >= best[:, None])
    t2i = other & (similarity >= own[None, :])
    return _row_counts(i2t), _column_counts(t2i)


def _row_counts(mask):
    """Returns the true values of each row, [images, texts] bool -> [images] int32.

    Counted in bytes first, four to the lane of an int32, in a third of the time; a byte holds the
    40 groups of a tile's columns, and the 128 rows of `_column_counts`.
    """
    group = math.gcd(mask.shape[1], 128)
    parts = mask.reshape(mask.shape[0], -1, group).astype(jnp.uint8)
    return parts.sum(axis=1, dtype=jnp.uint8).sum(axis=1, dtype=jnp.int32)


def _column_counts(mask):
    """Returns the true values of each column, [images, texts] bool -> [texts] int32."""
    group = math.gcd(mask.shape[0], 128)
    parts = mask.reshape(-1, group, mask.shape[1]).astype(jnp.uint8)
    return parts.sum(axis=1, dtype=jnp.uint8).sum(axis=0, dtype=jnp.int32)
