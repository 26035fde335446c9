"""`tfds`: any dataset of TensorFlow Datasets with an image and captions among its features."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from fne_jax.data.sources import many_files
from fne_jax.data.sources.listing import ContainedImage, Container, Listing
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home


def read_listing(data: ml_collections.ConfigDict) -> Listing:
    """Returns the shards of the dataset that `config.data.dir` names.

    It is the folder of a prepared dataset (that of a version), or a name such as `coco_captions` of
    one in TFDS's own folder; `image_key` and `caption_key` are features, `/` leading to those
    within others, as in `captions/text`. Raises UserError if there is no such dataset or feature.
    """
    where = f"config.data.dir is {data.dir!r}"
    with as_user_error(where, errors=Exception):  # TFDS's own are of many kinds
        infos = _builder(data.dir).info
        for field in ("image_key", "caption_key"):
            for key in data[field].split(","):
                _find(infos.features, key, f"config.data.{field} is {key!r}")
        paths = {name: list(map(os.fspath, s.filepaths)) for name, s in infos.splits.items()}
    if not any(paths.values()):
        raise UserError(f"{where}: it has no files; download and prepare it with tfds")
    splits = many_files.splits_of([f"/{name}" for name in paths])
    shards = [
        Shard(path, splits[f"/{name}"], data.dir, name, index, data.image_key, data.caption_key)
        for name, files in paths.items()
        for index, path in enumerate(files)
    ]
    return Listing("tfds", "", [], containers=shards)


@dataclasses.dataclass(frozen=True)
class Shard(Container):
    """A shard of a dataset of TFDS.

    Attributes:
      name: The name or the folder of the dataset.
      tfds_split: The name of the split that TFDS has the shard in, by its number, `index`.
      image_key: The feature of the image.
      caption_key: The features of captions, with commas between.
    """

    name: str
    tfds_split: str
    index: int
    image_key: str
    caption_key: str

    def images(self) -> Iterator[tuple[ContainedImage, bytes | None]]:
        """Yields the images with their bytes."""
        import tensorflow_datasets as tfds

        with as_user_error(f"{self.file}: is damaged", errors=Exception):
            part = tfds.core.ReadInstruction(
                self.tfds_split, from_=self.index, to=self.index + 1, unit="shard"
            )
            image: Any = tfds.decode.SkipDecoding()
            for key in reversed(self.image_key.split("/")):
                image = {key: image}
            records = _builder(self.name).as_dataset(
                split=part, decoders=image, shuffle_files=False
            )
            for row, record in enumerate(tfds.as_numpy(records)):
                name = f"{self.tfds_split}/{self.index}/{row}"
                captions = [
                    text.decode(errors="backslashreplace")
                    for key in self.caption_key.split(",")
                    for text in np.ravel(_find(record, key, self.file)).tolist()
                ]
                where = f"{self.file}: record {row}"
                content = _find(record, self.image_key, self.file)
                image_bytes = content if isinstance(content, bytes) else None
                yield ContainedImage(name, where, captions), image_bytes


def _builder(name: str) -> Any:
    # Kept out of the module's imports: TensorFlow takes seconds to import.
    import tensorflow_datasets as tfds

    folder = expand_home(name)
    return tfds.builder_from_directory(folder) if os.path.isdir(folder) else tfds.builder(name)


def _find(features: Any, key: str, where: str) -> Any:
    for part in key.split("/"):
        if part not in features:
            raise UserError(f"{where}; expected one of {', '.join(features)}")
        features = features[part]
    return features
