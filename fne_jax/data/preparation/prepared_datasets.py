"""Datasets that TFDS has written, or writes now, into ArrayRecord files."""

from __future__ import annotations

import functools

import ml_collections
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from fne_jax.data.pairs import PairDataset
from fne_jax.data.preparation import captioned_images, pair_builder
from fne_jax.data.preparation.pair_builder import PairBuilder
from fne_jax.data.preparation.records import RecordSource
from fne_jax.data.sources.registry import Listed, find_source
from fne_jax.errors import UserError


def prepared_builder(data: ml_collections.ConfigDict) -> PairBuilder:
    """Returns the TFDS builder of the dataset that `config.data` describes, prepared.

    Args:
      data: The group `config.data`, whose source is listed or rendered.

    Raises:
      UserError: If the source cannot be read, or more of it cannot be used than
        `config.data.max_skipped` allows.
    """
    # TensorFlow reads data on the host alone; the accelerator's memory is JAX's.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    cache = epath.Path(data.cache_dir).expanduser()
    source = find_source(data.source)
    if isinstance(source, Listed):
        config = captioned_images.CaptionedImagesConfig(
            listing=source.read(data.dir), resize_to=data.resize_to, max_skipped=data.max_skipped
        )
        builder = captioned_images.CaptionedImages(data_dir=cache, config=config)
    else:
        builder = source.builder(data, cache)
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
      UserError: If a record is damaged; it names the record.
    """
    source = record_source(builder, split)
    captions, caption_ids, counts, image_ids, source_ids, extras = [], [], [], [], [], []
    for record in source:
        texts = [text.decode() for text in record["captions"]]
        captions += texts
        counts.append(len(texts))
        caption_ids.append(record["caption_ids"])
        image_ids.append(record["image_id"])
        named = record["source_id"].decode() if "source_id" in record else record["image_id"]
        source_ids.append(str(named))
        extras.append({name: record[name] for name in builder.extra_features()})
    return PairDataset(
        captions=captions,
        caption_image=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        image_id=np.array(image_ids, np.int32),
        images=source,
        caption_id=np.concatenate(caption_ids),
        source_image_id=source_ids,
        truth=builder.known_truth(extras),
    )


def record_source(builder: PairBuilder, split: str) -> RecordSource:
    """Returns the records of a split of a prepared dataset, their images as JPEGs."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    summaries = pair_builder.stored_summaries(builder)
    return RecordSource(
        source,
        f"the split {split} in {builder.data_dir}",
        functools.partial(builder.source_file, split),
        summaries[split].checksum if summaries else "",
    )
