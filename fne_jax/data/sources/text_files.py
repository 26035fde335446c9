"""`text_files`: images with a text of the same name beside each, as img2dataset writes `files`."""

from __future__ import annotations

import hashlib
import os

from etils import epath

from fne_jax.data.sources import listing, many_files
from fne_jax.data.sources.image_files import stamps_of
from fne_jax.data.sources.listing import ListedImage, Listing
from fne_jax.data.sources.pair_tables import parted
from fne_jax.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_listing(data_dir: str) -> Listing:
    """Returns the images of a folder and those below it, each with the lines of its text.

    The names of folders tell splits (`train`, `val`, `test`), or hashes of the images' paths do. An
    image without a text counts as one without captions.

    Args:
      data_dir: The folder.

    Raises:
      UserError: If there is no image, only some lie in a folder of a split, or a text is not UTF-8.
    """
    folder = listing.existing_folder(data_dir, "images, and a .txt file beside each")
    paths = many_files.named_by(os.fspath(folder), _IMAGES)
    splits = many_files.splits_of(paths)
    texts = [epath.Path(os.path.splitext(path)[0] + ".txt") for path in paths]
    images, number = [], 0
    for row, (path, text) in enumerate(zip(paths, texts, strict=True)):
        name = os.path.relpath(path, folder)
        captions = []
        if text.exists():
            captions = [line for line in listing.read_lines(text) if line.strip()]
        images.append(
            ListedImage(
                split=splits[path],
                path=epath.Path(path),
                where=path,
                image_id=row,
                source_id=name,
                captions=captions,
                caption_ids=range(number, number + len(captions)),
            )
        )
        number += len(captions)
    there = [text for text in texts if text.exists()]
    if not there:
        raise UserError(f"config.data.dir is {data_dir!r}: no image has a .txt file beside it")
    digest = hashlib.sha256(repr(stamps_of(there)).encode()).hexdigest()[:12]
    checked = listing.checked_listing(folder.name, str(folder), [], parted(images))
    return Listing(checked.name, digest, checked.images, [os.fspath(text) for text in there])
