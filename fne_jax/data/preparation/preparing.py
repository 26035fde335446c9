"""Preparing what `config.data` describes: found where it was prepared before, or made by shards.

What is finished of a dataset lies in `unfinished/NAME` meanwhile, where the next call takes it up.
Shards of images that another prepared dataset has already are linked from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from fne_jax import files
from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation import storage
from fne_jax.data.preparation.image_shards import RULES, ImageShard, Outcome, plan_shards
from fne_jax.data.preparation.makers import Maker, in_threads
from fne_jax.data.preparation.storage import Prepared
from fne_jax.data.sources.image_files import Stamp, file_of, stamp_of, stamps_of
from fne_jax.data.sources.listing import ListedImage, Listing, Skipped, is_text, usable_captions
from fne_jax.data.sources.pair_tables import split_of_name
from fne_jax.data.sources.registry import Source, find_source
from fne_jax.errors import UserError
from fne_jax.progress import Progress

_FOLDER = "captioned_images"
_UNFINISHED = "unfinished"
_SHOWN = 5
_NAME_LENGTH = 60
_log = logging.getLogger(__name__)


def prepare(data: ml_collections.ConfigDict, maker: Maker = in_threads) -> Prepared:
    """Returns the prepared dataset that `config.data` describes, which `maker` makes if need be.

    Raises UserError if the source cannot be read, more of it cannot be used than
    `config.data.max_skipped` allows, or what was prepared is damaged.
    """
    root = files.local_folder(data.cache_dir, "config.data.cache_dir") / _FOLDER
    source = find_source(data.source)
    origin = _origin(source, data)
    prepared = _found(root, origin)
    if prepared is None:
        with files.as_user_error(f"config.data.cache_dir is {data.cache_dir!r}"):
            prepared = _made(root, origin, source.read(data), data, maker)
    _check_skipped(prepared.skipped(), data.max_skipped, prepared.folder / storage.SKIPPED_FILE)
    return prepared


def _origin(source: Source, data: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns what a prepared dataset must have been made of, as JSON gives it back."""
    if "dir" in source.fields and not data.dir:  # which would be the working directory
        raise UserError(f"config.data.dir is ''; {data.source} expects there {source.in_dir}")
    told = ml_collections.ConfigDict({name: data[name] for name in source.fields}).to_dict()
    if told.get("dir") and "://" not in told["dir"]:
        told["dir"] = os.path.abspath(files.expand_home(told["dir"]))
    if source.files is not None:
        told["files"] = source.files(data)
    return {
        "source": data.source,
        **told,
        "resize_to": data.resize_to,
        "rules": [storage.LAYOUT, RULES],
    }


def _found(root: pathlib.Path, origin: dict[str, Any]) -> Prepared | None:
    """Returns the dataset that was prepared of the same before, of files that have not changed."""
    for about in sorted(root.glob(f"*/{storage.ABOUT_FILE}")):
        try:
            prepared = Prepared.open(about.parent)
        except UserError:  # told where it is the one that would be made
            continue
        if prepared.origin == origin and prepared.is_current():
            return prepared
    return None


def _made(
    root: pathlib.Path,
    origin: dict[str, Any],
    listing: Listing,
    data: ml_collections.ConfigDict,
    maker: Maker,
) -> Prepared:
    # Before anything is read, so that what changes meanwhile is noticed by the next command.
    inputs = {file_of(image.path) for image in listing.images} - {""}
    inputs |= {file for one in listing.containers for file in (one.file, *one.outside())}
    inputs = sorted(inputs | set(listing.files))
    for path in inputs:
        if not is_text(path):
            raise UserError(f"{path!r}: the name is not in UTF-8; rename it (as `convmv` does)")
    noted = (inputs, stamps_of(inputs))
    known = dict(zip(*noted, strict=True))
    stamps = [known.get(file_of(one.path)) or stamp_of(one.path) for one in listing.images]
    shards = plan_shards(listing.images, stamps, listing.containers, data.resize_to)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", listing.name)[:_NAME_LENGTH]
    key = _digest([origin, listing.digest, [shard.key for shard in shards]])
    paths = _digest([origin, *(os.fspath(image.path) for image in listing.images)])
    folder, scratch = root / f"{name}-{key}", root / _UNFINISHED / f"{name}-{paths}"
    scratch.mkdir(parents=True, exist_ok=True)

    def wait(holder: str) -> None:
        _log.info("%s is being prepared by %s; waiting for it", scratch.name, holder)

    lock = scratch.with_name(f"{scratch.name}.lock")
    with files.locked(lock, wait, "prepare nothing twice at the same time"):
        scratch.mkdir(exist_ok=True)  # the process that was waited for removed it
        if folder.exists():
            return Prepared.open(folder)
        # What processes that were killed have left.
        files.remove_leftovers(folder)
        for other in sorted(path for path in scratch.parent.iterdir() if path.is_dir()):
            if other != scratch:
                _log.info("%s: of another dataset, not finished; may be deleted", other)
        missing = _missing(shards, root, scratch)
        done = len(shards) - len(missing)
        with (
            Progress("shards of images", len(shards), completed=done) as progress,
            contextlib.closing(maker(missing, scratch)) as making,
        ):
            for _ in making:
                progress.advance()
        with files.whole_folder(folder) as unnamed:
            _finish(unnamed, scratch, origin, noted, listing, shards, data.max_skipped)
        shutil.rmtree(scratch)
    return Prepared.open(folder)


def _missing(
    shards: Sequence[ImageShard], root: pathlib.Path, scratch: pathlib.Path
) -> list[ImageShard]:
    """Returns the shards to be made, having linked those that other prepared datasets have."""
    wanted = {shard.key: shard for shard in shards if not shard.is_made(scratch)}
    for about in root.glob(f"*/{storage.ABOUT_FILE}"):
        with contextlib.suppress(UserError):
            other = Prepared.open(about.parent)
            for file, key in other.shards.items():
                shard = wanted.get(key)
                if shard and shard.is_made(other.folder, other.folder / file):
                    _link(other.folder / file, shard.records_in(scratch))
                    _link(shard.outcomes_in(other.folder), shard.outcomes_in(scratch))
                    del wanted[key]
    return list(wanted.values())


def _link(file: pathlib.Path, name: pathlib.Path, otherwise: Any = shutil.copyfile) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except OSError:  # file systems without links, or another one's
        otherwise(file, name)


def _finish(
    folder: pathlib.Path,
    scratch: pathlib.Path,
    origin: dict[str, Any],
    inputs: tuple[Sequence[str], Sequence[Stamp]],
    listing: Listing,
    shards: Sequence[ImageShard],
    max_skipped: int,
) -> None:
    """Writes tables and notes of a dataset into its folder, and moves its shards there."""
    writers = {split: storage.TableWriter(folder / storage.table_name(split)) for split in SPLITS}
    skipped_of: dict[str, list[Skipped]] = {}
    repeated: list[str] = []
    lengths = {shard.key: 0 for shard in shards}
    for record, image, outcome in _outcomes(listing.images, shards, scratch, lengths):
        skipped = skipped_of.setdefault(image.split, [])
        reason = outcome.reason
        if not reason:
            captions, ids, bad = usable_captions(image)
            skipped += bad
            if not captions:
                reason = "no caption is left" if bad else "the list of captions is empty"
        if reason:
            skipped.append(Skipped(image.where, os.fspath(image.path), reason))
            continue
        counts = Counter(captions).items()
        repeated += [f"{image.where}: {text!r:.60}" for text, n in counts for _ in range(n - 1)]
        writers[image.split].add(
            {
                "record": record,
                "image_id": image.image_id,
                "source_id": image.source_id,
                "file": file_of(image.path),
                "digest": bytes.fromhex(outcome.digest),
                "captions": captions,
                "caption_ids": ids,
                **image.truth,
            }
        )
    if repeated:
        example = repeated[0]
        _log.warning("%d captions repeat one of their image, such as %s", len(repeated), example)
    summaries = {split: writer.close() for split, writer in writers.items()}
    left_out = [one for part in skipped_of.values() for one in part]
    text = json.dumps([dataclasses.asdict(one) for one in left_out], indent=2) + "\n"
    listed = scratch / storage.SKIPPED_FILE
    files.write_atomically(listed, text)
    _check_skipped(left_out, max_skipped, listed)
    for split, summary in summaries.items():
        if split in skipped_of and not summary.images:
            raise UserError(
                f"no image of the split {split!r} can be used:{_shown(skipped_of[split])}\n"
                f"All are listed in {listed}."
            )
    kept = [shard for shard in shards if lengths[shard.key]]
    named = {}
    for number, shard in enumerate(kept):
        name = f"{storage.RECORDS}.array_record-{number:05}-of-{len(kept):05}"
        # Linked, for the folder goes if the rest fails, as on a full disk.
        _link(shard.records_in(scratch), folder / name, os.replace)
        _link(shard.outcomes_in(scratch), shard.outcomes_in(folder), os.replace)
        named[name] = (shard.key, lengths[shard.key])
    storage.write_notes(folder, origin, inputs, summaries, named, text)


def _outcomes(
    images: Sequence[ListedImage],
    shards: Sequence[ImageShard],
    scratch: pathlib.Path,
    lengths: dict[str, int],
) -> Iterator[tuple[int, ListedImage, Outcome]]:
    """Yields the number of the record, the image and the outcome of each; counts the records.

    Images and captions of containers are numbered as they come.
    """
    rest = iter(images)
    record = image_id = caption_id = 0
    for shard in shards:
        for outcome in shard.outcomes(scratch):
            if outcome.listed is None:
                image = next(rest)
            else:
                source_id, where, captions = outcome.listed
                split = shard.contents.split or split_of_name(source_id)
                ids = range(caption_id, caption_id + len(captions))
                image = ListedImage(split, where, where, image_id, source_id, captions, ids)
                image_id, caption_id = image_id + 1, ids.stop
            yield record, image, outcome
            if not outcome.reason:
                record += 1
                lengths[shard.key] += 1


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _check_skipped(skipped: list[Skipped], allowed: int, listing: pathlib.Path) -> None:
    """Raises UserError, which shows the first few and their number, if too much is left out."""
    if len(skipped) <= allowed:
        return
    raise UserError(
        f"{len(skipped)} images or captions cannot be used, more than config.data.max_skipped, "
        f"{allowed}:{_shown(skipped)}\nAll are listed in {listing}. Fix them, or allow that many "
        "to be left out."
    )


def _shown(skipped):
    """Returns the first few reasons, a line each, and the number of the others."""
    more = len(skipped) - _SHOWN
    lines = [f"\n  {one.where}: {one.reason}" for one in skipped[:_SHOWN]]
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")
