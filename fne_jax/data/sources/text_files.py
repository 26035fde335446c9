"""`text_files`: images with a text of the same name beside each, as img2dataset writes `files`."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata

from etils import epath

from fne_jax.data.sources import listing, many_files
from fne_jax.data.sources.image_files import stamps_of
from fne_jax.data.sources.listing import ListedImage, Listing
from fne_jax.data.sources.pair_tables import parted
from fne_jax.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".txt")
_log = logging.getLogger(__name__)


def read_listing(data_dir: str) -> Listing:
    """Returns the images of a folder and those below it, each with the lines of its text.

    The names of folders tell splits (`train`, `val`, `test`), or hashes of the images' paths do. An
    image without a text counts as one without captions. Raises UserError if there is no image, only
    some lie in a folder of a split, or a text is not UTF-8.
    """
    folder = listing.existing_folder(data_dir, "images, and a .txt file beside each")
    there = many_files.named_by(os.fspath(folder), ENDINGS)
    texts = {_stem(path): path for path in there if path.lower().endswith(".txt")}
    paths = [path for path in there if not path.lower().endswith(".txt")]
    if not any(_stem(path) in texts for path in paths):
        raise UserError(f"config.data.dir is {data_dir!r}: no image has a .txt file beside it")
    if unused := texts.keys() - set(map(_stem, paths)):
        told = "%d .txt files have no image beside them (%s), such as %s"
        _log.warning(told, len(unused), ", ".join(ENDINGS[:-1]), texts[min(unused)])
    # Of names of images, which may be of trains, nothing is read.
    splits = many_files.splits_of([f"{os.path.dirname(path)}/" for path in paths])
    rows = []
    for path in paths:
        text = texts.get(_stem(path))
        captions = (text and listing.filled_lines(listing.read_text(epath.Path(text)))) or []
        rows.append(
            ListedImage(
                split=splits[f"{os.path.dirname(path)}/"],
                path=epath.Path(path),
                where=path,
                image_id=None,
                source_id=os.path.relpath(path, folder),
                captions=captions,
            )
        )
    files = list(texts.values())
    digest = hashlib.sha256(repr(stamps_of(files)).encode()).hexdigest()[:12]
    checked = listing.checked_listing(
        folder.name, str(folder), [], parted(listing.images_of_rows(rows))
    )
    return Listing(checked.name, digest, checked.images, files)


def _stem(path: str) -> str:
    """Returns what an image and its text share, in whatever Unicode form either is spelt."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])
