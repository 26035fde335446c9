"""What a model finds for a few captions of the validation split, as one image for TensorBoard."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fne_jax.data.images.preprocessing import small_jpeg
from fne_jax.evaluation.top_k import top_k
from fne_jax.model.embedded_split import EmbeddedSplit

_QUERIES, _RESULTS = 6, 5
# Pixels: of a side of a result's square, of its frame, and of the line above for the caption.
_SIDE, _FRAME, _LINE = 112, 4, 22
_LABELLED, _TRUE, _OTHER = (47, 158, 98), (59, 130, 196), (225, 226, 230)
_PAPER, _INK = (255, 255, 255), (31, 35, 41)


def retrieved_images(split: EmbeddedSplit) -> np.ndarray:
    """Returns captions, evenly from all of them, each above the images most similar to it.

    The caption's own image has a green frame; where the truth is known, any other match a blue one.

    Args:
      split: The split, with its dataset.

    Returns:
      [1, height, width, 3] uint8.
    """
    dataset = split.dataset
    captions = np.unique(np.linspace(0, len(dataset.captions) - 1, _QUERIES).astype(int))
    found, _ = top_k(split.text_emb[captions], split.image_emb, _RESULTS)
    row = _LINE + _SIDE + 2 * _FRAME
    page = Image.new("RGB", (_RESULTS * (_SIDE + 2 * _FRAME), len(captions) * row), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, (caption, images) in enumerate(zip(captions, found, strict=True)):
        top = number * row
        draw.text((_FRAME, top + 2), " ".join(dataset.captions[caption].split()), _INK, font)
        for place, image in enumerate(images):
            left = place * (_SIDE + 2 * _FRAME)
            corner = left + _SIDE + 2 * _FRAME - 1, top + row - 1
            draw.rectangle((left, top + _LINE, *corner), _colour(split, caption, image))
            small = Image.open(io.BytesIO(small_jpeg(dataset.image(int(image)), _SIDE)))
            small = small.resize((_SIDE, _SIDE))
            page.paste(small, (left + _FRAME, top + _LINE + _FRAME))
    return np.asarray(page)[None]


def _colour(split, caption, image):
    if split.caption_image[caption] == image:
        return _LABELLED
    return _TRUE if split.truth is not None and split.truth[image, caption] else _OTHER
