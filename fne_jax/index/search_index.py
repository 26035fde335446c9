"""An index: items of a gallery embedded by a model, to be searched by text, image or embedding."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence

import numpy as np

from fne_jax.data.images.usable_images import AnyImage, read_ahead
from fne_jax.data.sources import listing
from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home, write_atomically
from fne_jax.index import engines, exact
from fne_jax.index.engines import Engine
from fne_jax.index.gallery import AnyPath, Gallery, images_of, texts_of
from fne_jax.index.kept_rows import KeptRows, Part, held
from fne_jax.index.names import Names
from fne_jax.logs import warn_once
from fne_jax.model.model import Model
from fne_jax.progress import Progress

# What is embedded is kept after so many rows or seconds; a process that is killed loses less.
_KEPT_ROWS = 16_384
_KEPT_SECONDS = 30.0
# Queries of each kind that an engine's recall is measured with, and the length of the lists.
_RECALL_QUERIES = 200
RECALL_AT = 10
_SHOWN = 20
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Hit:
    """An item that was found.

    Attributes:
      rank: Its place, from 1.
      score: The cosine of the query and the item, as it is kept in float16; at most 1.
      name: What it is known by; of a text, the text itself.
      path: The file of an image; "" where there is none.
      captions: The captions of an image, where they are known.
    """

    rank: int
    score: float
    name: str
    path: str
    captions: tuple[str, ...]


class SearchIndex:
    """Items of a gallery, embedded by a model; `build_index` makes one.

    Args:
      gallery: The items.
      items: Which of them could be used, in the gallery's order.
      part: The embeddings of these.
      model: The model.
      engine: What finds the nearest.

    Attributes:
      names: The name of each row.
      rows: [items, dim] float16, memory-mapped.
      recall: Of an engine that is not exact, the share of the exact first ten that it finds, as
        `{"text_to_image": 0.93, "image_to_image": 0.99}`; {} for the exact one.
    """

    def __init__(
        self, gallery: Gallery, items: Sequence[int], part: Part, model: Model, engine: Engine
    ):
        self.names, self.rows = part.open_names(), part.open_rows()
        self.recall: dict[str, float] = {}
        self._gallery, self._model, self._engine = gallery, model, engine
        self._items = items

    def __len__(self) -> int:
        return len(self.rows)

    def search(
        self, text: str | None = None, *, image: AnyImage | None = None, top: int = 10
    ) -> list[Hit]:
        """Returns the items that are nearest to a sentence or to an image, the best first.

        A warning tells if the model reads nothing of the sentence, or only its beginning.

        Args:
          text: The sentence.
          image: The image instead: a path, the content of a file, an image of PIL or pixels.
          top: How many.

        Raises UserError if not one of them is given, the text is none, or the image cannot be read.
        """
        if (text is None) == (image is None):
            raise UserError("search by either a text or an image")
        if image is not None:
            query = _embedded(self._model, [self._model.read_image(image, "the image")])
        elif not isinstance(text, str) or not text.strip():
            raise UserError(f"the text to search by is {text!r:.60}; expected a sentence")
        else:
            listing.check_text("the text to search by", text)
            if unread := self._model.unread([text]):
                _log.warning("%s: %s", f"{text!r:.60}", unread)
            query = self._model.embed_texts([text])
        rows, scores = self.nearest(query, top)
        return [
            self._hit(rank, row, score)
            for rank, (row, score) in enumerate(zip(rows[0], scores[0], strict=True), 1)
            if row >= 0
        ]

    def nearest(self, embeddings: np.ndarray, top: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows that are nearest to embeddings of the same model.

        Args:
          embeddings: [queries, dim] floats of length 1.
          top: How many of each; fewer where there are fewer items.

        Returns:
          [queries, top] int64 indices into `names` and `rows`, -1 where an engine found fewer, and
          their [queries, top] float32 cosines, at most 1, computed from the rows for any engine.

        Raises UserError if `top` is below 1, or the embeddings have another shape or are not
        finite.
        """
        queries = np.asarray(embeddings)
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[1]:
            raise UserError(
                f"embeddings: expected [queries, {self.rows.shape[1]}], got {list(queries.shape)}"
            )
        if top < 1:
            raise UserError(f"top is {top}; expected at least 1")
        if not np.isfinite(queries).all():
            raise UserError("the embedding of the query is not finite; did its training diverge?")
        queries = queries.astype(np.float32)
        return _ordered(self.rows, queries, self._engine(queries, min(top, len(self))))

    def _hit(self, rank, row, score):
        item = self._items[row]
        captions = tuple(self._gallery.captions(item))
        return Hit(rank, float(score), self.names[row], self._gallery.path(item), captions)


def _ordered(rows, queries, found):
    """Returns what an engine found in the order of exact products, and these; -1 comes last."""
    scores = np.full(found.shape, -np.inf, np.float32)
    ordered = np.full(found.shape, -1, np.int64)
    for number, chosen in enumerate(found):
        chosen = chosen[chosen >= 0]
        products = exact.exact_products(rows, chosen, queries[number].astype(np.float64))
        order = np.lexsort((chosen, -products))
        ordered[number, : len(chosen)] = chosen[order]
        # In float16 a row is up to a thousandth longer than 1.
        scores[number, : len(chosen)] = np.clip(products[order], -1, 1)
    return ordered, scores


def build_index(
    model: Model,
    images: AnyPath | Sequence[AnyPath] | None = None,
    *,
    texts: AnyPath | Sequence[str] | None = None,
    folder: str | os.PathLike | None = None,
    engine: str = engines.EXACT,
) -> SearchIndex:
    """Returns an index of images or texts, which is searched by texts, images or embeddings.

    Images that cannot be read are left out and named in the log. What was embedded before an error
    or Ctrl-C is kept.

    Args:
      model: What `load_workdir` returns.
      images: What `gallery.images_of` takes: a folder, a table (.csv, .tsv, .jsonl), a split
        ("train", "val", "test"), or a list of files.
      texts: Instead of images, what `gallery.texts_of` takes: the captions of a table or a split, a
        file with a sentence a line, or a list of sentences.
      folder: Where embeddings are kept, so that a later call embeds only what is new or changed;
        None for a temporary folder, which goes with the index.
      engine: `exact` or `faiss:FACTORY`; docs/search.md has more.

    Raises:
      UserError: If not one of both is given, nothing of it can be used, the folder cannot be
        written to, or there is no such engine.
    """
    if (images is None) == (texts is None):
        raise UserError("build_index: give either images or texts")
    engines.check_spec(engine)
    if images is not None:
        items = images_of(images, model.load_split)
    else:
        items = texts_of(texts, model.load_split)
    with contextlib.ExitStack() as removal:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="fne_jax_index_")
            removal.callback(shutil.rmtree, folder, ignore_errors=True)
        place = pathlib.Path(expand_home(folder))
        advice = "keep it elsewhere by --index-dir, or in Python by folder="
        with as_user_error(f"{place}: the index cannot be kept", advice), held(place):
            used, part = _update(place, items, model)
            nearest = engines.create_engine(engine, part)
            index = SearchIndex(items, used, part, model, nearest)
            if engine != engines.EXACT:
                path = engines.recall_path(engine, part)
                index.recall = _kept_recall(path, nearest, index.rows, items, model)
        weakref.finalize(index, removal.pop_all().close)
    return index


def _update(folder, gallery, model):
    """Embeds what a folder lacks; returns which items can be used, and the part of them."""
    kept = KeptRows(folder, model.identity())
    if kept.is_complete(gallery.names, gallery.stamps):
        count = len(gallery.names)
        _log.info("%d %s of %s: 0 embedded now, all kept", count, gallery.kind, gallery.where)
        return range(count), kept.parts[0]
    places = kept.places()
    missing = [
        n
        for n, (name, stamp) in enumerate(zip(gallery.names, gallery.stamps.tolist(), strict=True))
        if name not in places or places[name][0] != stamp
    ]
    skipped = _embed(kept, gallery, missing, model) if missing else {}
    used = [n for n in range(len(gallery.names)) if n not in skipped]
    if not used:
        raise UserError(
            f"{gallery.where}: none of {len(gallery.names)} {gallery.kind} can be used: "
            f"{next(iter(skipped.values()))}"
        )
    gone = len(places.keys() - set(gallery.names))
    part = kept.complete(Names.of(gallery.names[n] for n in used), gallery.stamps[used])
    _log.info(
        "%d %s of %s: %d embedded now, %d kept%s",
        len(used), gallery.kind, gallery.where, len(missing) - len(skipped),
        len(used) - len(missing) + len(skipped), f", {gone} gone" if gone else "",
    )  # fmt: skip
    if skipped:
        lines = [f"\n  {reason}" for reason in itertools.islice(skipped.values(), _SHOWN)]
        if len(skipped) > _SHOWN:
            lines.append(f"\n  and {len(skipped) - _SHOWN} more")
        _log.warning(
            "%d of %d images cannot be used:%s", len(skipped), len(gallery.names), "".join(lines)
        )
    return used, part


def _embed(kept, gallery, missing, model):
    """Embeds and keeps items; returns the reasons why some could not be used, by their index."""
    skipped: dict[int, str] = {}
    waiting: list[tuple[list[int], np.ndarray]] = []
    total, kept_at = 0, time.monotonic()

    def keep():
        if waiting:
            items = [item for batch, _ in waiting for item in batch]
            rows = np.concatenate([rows for _, rows in waiting])
            kept.add([gallery.names[n] for n in items], gallery.stamps[items], rows)
            waiting.clear()

    embedded = _images if gallery.kind == "images" else _texts
    with (
        Progress(f"embedding {gallery.kind}", len(missing)) as progress,
        contextlib.closing(embedded(gallery, missing, model, skipped)) as batches,
    ):
        try:
            for items, rows in batches:
                if not np.isfinite(rows).all():
                    bad = items[int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])]
                    raise UserError(
                        f"the model's embedding of {gallery.names[bad]!r} is not finite; its "
                        "training diverged"
                    )
                waiting.append((items, rows.astype(np.float16)))
                total += len(items)
                progress.update(total + len(skipped))
                enough = sum(len(batch) for batch, _ in waiting) >= _KEPT_ROWS
                if enough or time.monotonic() - kept_at >= _KEPT_SECONDS:
                    keep()
                    kept_at = time.monotonic()
        finally:  # after an error or Ctrl-C, too
            keep()
    return skipped


def _texts(gallery, missing, model, skipped):
    """Yields some items at a time and their [items, dim] rows."""
    del skipped
    size, texts = model.embedder.batch_size, [gallery.content(n) for n in missing]
    warn_once(_log, model.unread(texts))
    for start in range(0, len(missing), size):
        yield missing[start : start + size], model.embed_texts(texts[start : start + size])


def _images(gallery, missing, model, skipped):
    """Yields some items at a time and their rows; those of a next batch are read meanwhile."""

    def read(item):
        return model.read_image(gallery.content(item), gallery.names[item])

    with contextlib.closing(read_ahead(read, missing, model.embedder.batch_size)) as batches:
        for batch in batches:
            usable = {item: found for item, found in batch if not isinstance(found, UserError)}
            skipped |= {item: str(found) for item, found in batch if item not in usable}
            if usable:
                yield list(usable), _embedded(model, list(usable.values()))


def _embedded(model, pixels):
    return model.embedder.pixels(model.params, [np.stack(pixels)])


def _kept_recall(path, engine, rows, gallery, model):
    """Returns the recall of an engine among rows, measured once and kept in a file."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {name: float(share) for name, share in {**json.loads(path.read_text())}.items()}
    one, other = ("image", "text") if gallery.kind == "images" else ("text", "image")
    recall = {f"{one}_to_{one}": _recall_of_own(engine, rows)}
    queries = _other_queries(gallery, model)
    if queries is not None and len(queries):
        recall = {f"{other}_to_{one}": recall_at(engine, rows, queries)} | recall
    write_atomically(path, json.dumps(recall) + "\n")
    return recall


def _other_queries(gallery, model):
    """Returns embeddings of the other kind, texts for images; None where none are known."""
    try:
        if gallery.kind == "images":
            texts = gallery.some_captions(_RECALL_QUERIES)
            return model.embed_texts(texts or model.load_split("val").captions[:_RECALL_QUERIES])
        images = images_of("val", model.load_split)
        count = min(_RECALL_QUERIES, len(images.names))
        return model.embed_images(images.content(n) for n in range(count))
    except UserError as error:
        _log.warning("recall across images and texts is not measured: %s", error)
        return None


def recall_at(engine: Engine, rows: np.ndarray, queries: np.ndarray) -> float:
    """Returns the share of the exact first `RECALL_AT` rows that an engine finds among its own.

    A row that is as near as the last of the exact ones counts as one of them.

    Rows are [rows, dim] float16, queries [queries, dim] float32.
    """
    count = min(RECALL_AT, len(rows))
    wanted = exact.nearest(rows, queries, count)[0]
    return _share(rows, queries, wanted, engine(queries, count))


def _recall_of_own(engine, rows):
    """Returns the recall for rows as queries, each leaving itself out."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, _RECALL_QUERIES).astype(int))
    queries, count = rows[chosen].astype(np.float32), min(RECALL_AT + 1, len(rows))
    lists = (exact.nearest(rows, queries, count)[0], engine(queries, count))
    without = []
    for found in lists:
        itself = found == chosen[:, None]
        # Equal rows may push it out of its own list: then the last goes.
        itself[~itself.any(axis=1), -1] = True
        without.append(found[~itself].reshape(len(chosen), count - 1))
    return _share(rows, queries, *without)


def _share(rows, queries, wanted, found):
    """Returns the share of [queries, count] rows found that are as near as the last one wanted."""
    if not wanted.size:
        return 1.0
    hits = 0
    for query, exact_list, own_list in zip(queries, wanted, found, strict=True):
        last = exact.exact_products(rows, exact_list[-1:], query)
        hits += int((exact.exact_products(rows, own_list[own_list >= 0], query) >= last).sum())
    return hits / wanted.size
