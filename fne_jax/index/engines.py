"""What finds the nearest rows: all of them compared, or an index of faiss."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Callable

import numpy as np

from fne_jax.errors import UserError, needs_extra
from fne_jax.index import exact
from fne_jax.index.kept_rows import Part
from fne_jax.progress import Progress

EXACT = "exact"
FORMS = f"{EXACT} or faiss:FACTORY (as faiss:HNSW32 or faiss:IVF256,Flat@nprobe=16)"
_ADDED_ROWS = 16_384
# Rows that faiss learns its clusters from: 0.3 GB at 768 dimensions.
_TRAINING_ROWS = 100_000
# Where in its source faiss found the fault, and the check that failed.
_FAISS_PLACE = re.compile(r"Error in .* at \S+:\d+: (Error: ('.*' failed: )?)?")
_log = logging.getLogger(__name__)

# From [queries, dim] float32 and the number of rows wanted of each, no more than there are, to the
# [queries, count] int64 rows of the highest inner products; -1 fills lists that are shorter.
Engine = Callable[[np.ndarray, int], np.ndarray]


def check_spec(spec: str) -> None:
    """Checks what an engine is called by, before anything is embedded for it.

    Raises UserError if it is none, which lists the forms.
    """
    kind, _, factory = spec.partition(":")
    if spec != EXACT and (kind != "faiss" or not factory):
        raise UserError(f"--index={spec}: expected {FORMS}")


def create_engine(spec: str, part: Part) -> Engine:
    """Returns the engine of a checked `spec` for the rows of a part.

    An index of faiss is kept in the folder of the part.

    `spec` is `exact`, `faiss:FACTORY`, or `faiss:FACTORY@PARAMETERS` as `nprobe=16`. Raises
    UserError if faiss is not installed, or cannot make such an index of these rows.
    """
    rows = part.open_rows()
    if spec == EXACT:
        return lambda queries, count: exact.nearest(rows, queries, count)[0]
    with needs_extra("faiss", f"--index={spec}"):
        import faiss
    factory, _, parameters = spec.partition(":")[2].partition("@")
    path = part.folder / f"faiss-{_digest(factory)}.index"
    query = rows[:1].astype(np.float32)  # some faults show in a search alone
    try:
        index = _kept_index(faiss, path, rows.shape)
        if index is None:
            index = _build_index(faiss, factory, rows)
            index.search(query, 1)
            scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
            faiss.write_index(index, os.fspath(scratch))
            os.replace(scratch, path)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        index.search(query, 1)
    except (RuntimeError, AssertionError) as error:
        reason = _FAISS_PLACE.sub("", str(error).splitlines()[0])
        raise UserError(f"--index={spec}: faiss cannot make it: {reason}") from error
    return lambda queries, count: index.search(np.ascontiguousarray(queries, np.float32), count)[1]


def _kept_index(faiss, path, shape):
    """Returns the index that is kept for [rows, dim] rows, or None."""
    if not path.exists():
        return None
    try:
        index = faiss.read_index(os.fspath(path))
    except RuntimeError:
        _log.warning("%s is damaged; it is built again", path)
        return None
    return index if (index.ntotal, index.d) == shape else None


def _build_index(faiss, factory, rows):
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        step = -(-len(rows) // _TRAINING_ROWS)
        index.train(rows[::step].astype(np.float32))
    with Progress("faiss", len(rows)) as progress:
        for start in range(0, len(rows), _ADDED_ROWS):
            block = rows[start : start + _ADDED_ROWS].astype(np.float32)
            index.add(block)
            progress.advance(len(block))
    return index


def recall_path(spec: str, part: Part) -> pathlib.Path:
    """Returns the file that keeps what an engine's recall was on a part."""
    return part.folder / f"recall-{_digest(spec)}.json"


def _digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
