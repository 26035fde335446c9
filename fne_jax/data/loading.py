"""Datasets that TFDS has written, or writes now, into ArrayRecord files."""

from __future__ import annotations

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from fne_jax.data import tensorflow_host
from fne_jax.data.pairs import KnownTruth, PairDataset
from fne_jax.data.preparation import captioned_images, pair_builder
from fne_jax.data.preparation.pair_builder import PairBuilder
from fne_jax.data.preparation.records import RecordSource
from fne_jax.data.sources import json_lists, karpathy, pair_tables, shapes, shapes_scenes
from fne_jax.data.sources.listing import Source
from fne_jax.errors import UserError


def prepared_builder(data: ml_collections.ConfigDict) -> PairBuilder:
    """Returns the TFDS builder of the dataset on disk that `config.data` describes, prepared.

    Raises:
      UserError: if the source cannot be read, or has more that cannot be used than
        `config.data.max_skipped`.
    """
    tensorflow_host.hide_accelerators()
    cache = epath.Path(data.cache_dir).expanduser()
    builder = _shapes(data, cache) if data.source == "shapes" else _captioned(data, cache)
    try:
        pair_builder.prepare(builder)
        if isinstance(builder, captioned_images.CaptionedImages):
            builder.remove_scratch()
            captioned_images.check_skipped(
                builder.skipped(), data.max_skipped, builder.skipped_path()
            )
    except OSError as error:
        raise UserError(f"config.data.cache_dir is {data.cache_dir!r}: {error}") from error
    return builder


def prepared_split(builder: PairBuilder, split: str) -> PairDataset:
    """Returns a split of a prepared dataset; its captions are read now, its images when asked for.

    Raises:
      UserError: naming the record, if one is damaged.
    """
    source = record_source(builder, split)
    captions, caption_ids, counts, image_ids, source_ids = [], [], [], [], []
    scenes, facts = [], []
    for record in source:
        texts = [text.decode() for text in record["captions"]]
        captions += texts
        counts.append(len(texts))
        caption_ids.append(record["caption_ids"])
        image_ids.append(record["image_id"])
        named = record["source_id"].decode() if "source_id" in record else record["image_id"]
        source_ids.append(str(named))
        if "scene" in record:
            scenes.append(record["scene"])
            facts.append(record["facts"])
    truth = KnownTruth(np.stack(scenes), np.concatenate(facts)) if scenes else None
    return PairDataset(
        captions=captions,
        caption_image=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        image_id=np.array(image_ids, np.int32),
        images=source,
        caption_id=np.concatenate(caption_ids),
        source_image_id=source_ids,
        truth=truth,
    )


def record_source(builder: PairBuilder, split: str) -> RecordSource:
    """Returns the records of a split of a prepared dataset, their images as JPEGs."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return RecordSource(source, f"the split {split} in {builder.data_dir}")


def _shapes(data, cache):
    settings = data.shapes
    try:
        vocabulary = shapes_scenes.Vocabulary(
            shapes=settings.shapes,
            colours=settings.colours,
            max_objects=settings.max_objects,
        )
    except ValueError as error:
        raise UserError(f"config.data.shapes.{error}") from error
    sizes = (settings.train_images, settings.val_images, settings.test_images)
    if min(sizes) < 1:
        raise UserError(f"config.data.shapes: the split sizes {sizes} must be at least 1")
    config = shapes.ShapesConfig(seed=settings.seed, sizes=sizes, vocabulary=vocabulary)
    return shapes.Shapes(data_dir=cache, config=config)


def _captioned(data, cache):
    config = captioned_images.CaptionedImagesConfig(
        source=_listed(data), resize_to=data.resize_to, max_skipped=data.max_skipped
    )
    return captioned_images.CaptionedImages(data_dir=cache, config=config)


def _listed(data) -> Source:
    if data.source in karpathy.SOURCES:
        return karpathy.karpathy_source(data.dir, data.source)
    if data.source == "json_lists":
        return json_lists.json_lists_source(data.dir)
    return pair_tables.pair_table_source(data.dir, data.source)
