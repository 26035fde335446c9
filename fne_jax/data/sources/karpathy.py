"""`karpathy`, `flickr8k`, `flickr30k` and `coco`: datasets in Karpathy's JSON layout.

A file `dataset_<name>.json` holds `images`, each with `filename`, optionally `filepath` (a folder),
`split`, and `sentences` with a `raw` caption each (Karpathy and Fei-Fei, CVPR 2015).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging

from etils import epath

from fne_jax.data.sources import listing
from fne_jax.data.sources.listing import SPLIT_OF, ListedImage, Listing
from fne_jax.errors import UserError

_SPLITS_FROM = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Where the images of the datasets with a name of their own come from.
IMAGES_FROM = {
    "flickr8k": "Flickr8K's images (request form at "
    "https://forms.illinois.edu/sec/1713398) as images/*.jpg",
    "flickr30k": "Flickr30K's images (licence form at "
    "https://shannon.cs.illinois.edu/DenotationGraph/) as images/*.jpg",
    "coco": "COCO's images (http://images.cocodataset.org/zips/train2014.zip and val2014.zip) "
    "as images/train2014/*.jpg and images/val2014/*.jpg",
}
ANY = "karpathy"  # the dataset of any name
_log = logging.getLogger(__name__)


def read_listing(data_dir: str, name: str = ANY) -> Listing:
    """Returns the dataset of a folder, `restval` counted as train, in the file's order.

    COCO's images and captions keep its own numbers (`cocoid` and `sentid`, its annotations' ids),
    by which ECCV Caption and CxC name them. Where some have none, or one that does not fit the
    records, all are numbered, with a word in the log.

    Args:
      data_dir: The folder.
      name: A key of `IMAGES_FROM` for `dataset_<name>.json`, or "karpathy" for the one
        `dataset*.json` that is there.

    Raises:
      UserError: If the file or a folder of images is missing; for a dataset with a name it says
        what to download and where to put it. If the file is not JSON, a key is missing, a split is
        unknown or empty, or an image or an id appears twice; it names the file and the entry.
    """
    path = _find_json(data_dir, name)
    content = listing.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path}: the key 'images' is missing (Karpathy's layout)")
    folder = listing.image_folder(path.parent)
    images = [
        _read_entry(f"{path}: images[{index}]", entry, folder)
        for index, entry in enumerate(content["images"])
    ]
    images = _with_image_ids(path, content["images"], images)
    caption_ids = [number for image in images for number in image.caption_ids]
    if not _fit(path, "sentid", caption_ids, listing.MAX_CAPTION_ID):
        images = _with_caption_ids(images)
    dataset = path.stem.removeprefix("dataset_")
    checked = listing.checked_listing(dataset, str(path), [path], images)
    missing = [folder for folder in {image.path.parent for image in images} if not folder.is_dir()]
    if missing:
        raise UserError(f"{path}: its image folder {min(missing)} does not exist{_advice(name)}")
    return checked


def _find_json(data_dir, name):
    if name == ANY:
        folder = listing.existing_folder(data_dir, "dataset_<name>.json and images/")
        return listing.one_file(folder, ["dataset*.json"], "Karpathy's layout")
    folder = epath.Path(data_dir).expanduser()
    path = folder / f"dataset_{name}.json"
    if not data_dir or not path.exists():
        raise UserError(
            f"config.data.dir is {data_dir!r}: {path.name} does not exist{_advice(name)}"
        )
    return path


def _with_image_ids(path, entries, images):
    """Returns the images with the first of the ids that all have, or their numbers in the file."""
    for key in ("cocoid", "imgid"):
        ids = [entry.get(key) for entry in entries]
        if _fit(path, key, ids, listing.MAX_IMAGE_ID):
            break
    else:
        ids = range(len(images))
    return [dataclasses.replace(image, image_id=i) for image, i in zip(images, ids, strict=True)]


def _fit(path, key, ids, most):
    """Returns whether all have an id that records can hold; tells of it where only some have."""
    bad = [
        number for number in ids if number is None or (isinstance(number, int) and number > most)
    ]
    if bad and any(number is not None for number in ids):
        _log.warning(
            "%s: %d of %d have no %s or one above %d, as %s: they are numbered in the file's order",
            path, len(bad), len(ids), key, most, bad[0],
        )  # fmt: skip
    return not bad


def _with_caption_ids(images):
    """Returns the images with captions numbered, split by split as they come first in the file."""
    splits = list(dict.fromkeys(image.split for image in images))
    count = itertools.count()
    return [
        dataclasses.replace(image, caption_ids=[next(count) for _ in image.captions])
        for image in sorted(images, key=lambda image: splits.index(image.split))
    ]


def _advice(name):
    if name == ANY:
        return ""
    return (
        f". {name} has to be downloaded by hand; put into config.data.dir dataset_{name}.json "
        f"(from {_SPLITS_FROM}) and {IMAGES_FROM[name]}"
    )


def _read_entry(where, entry, folder):
    for key, kind in (("filename", str), ("split", str), ("sentences", list)):
        if not isinstance(entry, dict) or key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing (Karpathy's layout)")
        if not isinstance(entry[key], kind):
            raise UserError(
                f"{where}: {key!r} is {entry[key]!r:.60}; expected a {kind.__name__} "
                "(Karpathy's layout)"
            )
    if entry["split"] not in SPLIT_OF:
        raise UserError(
            f"{where}: split is {entry['split']!r}; expected one of {', '.join(SPLIT_OF)}"
        )
    name = listing.checked_name(where, "filename", entry["filename"])
    if entry.get("filepath"):
        name = f"{listing.checked_name(where, 'filepath', entry['filepath'])}/{name}"
    sentences = [s if isinstance(s, dict) else {"raw": s} for s in entry["sentences"]]
    return ListedImage(
        split=SPLIT_OF[entry["split"]],
        path=folder / name,
        where=where,
        image_id=None,
        source_id=name,
        captions=[sentence.get("raw") for sentence in sentences],
        caption_ids=[sentence.get("sentid") for sentence in sentences],
    )
