"""What finds the nearest rows: all of them compared, or an index of faiss or Qdrant."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import uuid
import weakref

import numpy as np

from fne_jax import files
from fne_jax.errors import EnvironmentFailure, UserError
from fne_jax.index import exact
from fne_jax.index.kept_rows import Part
from fne_jax.progress import Progress

EXACT = "exact"
FORMS = (
    f"{EXACT}, faiss:FACTORY (as faiss:HNSW32 or faiss:IVF256,Flat@nprobe=16) or qdrant:WHERE "
    "(a server's URL, a folder, or :memory:)"
)
_ADDED_ROWS = 16_384
# Rows that faiss learns its clusters from: 0.3 GB at 768 dimensions.
_TRAINING_ROWS = 100_000
_POINTS = 256  # in a request to Qdrant
_LISTED_POINTS = 10_000
# Where in its source faiss found the fault, and the check that failed.
_FAISS_PLACE = re.compile(r"Error in .* at \S+:\d+: (Error: ('.*' failed: )?)?")
_log = logging.getLogger(__name__)


class Engine(abc.ABC):
    """Finds rows of a part by their inner products with queries.

    Attributes:
      spec: What it is called by, `exact` for example.
    """

    spec: str

    @abc.abstractmethod
    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Returns [queries, count] int64 rows; -1 fills lists that are shorter.

        Args:
          queries: [queries, dim] float32.
          count: The rows wanted of each; at most as many as there are.
        """


class Exact(Engine):
    """Compares every query with every row."""

    spec = EXACT

    def __init__(self, part: Part):
        self._rows = part.open_rows()

    def nearest(self, queries, count):
        """Returns the rows of the highest products, in their order."""
        return exact.nearest(self._rows, queries, count)[0]


class Faiss(Engine):
    """An index of faiss, made by its factory, and kept in the folder of the part.

    Args:
      spec: `faiss:FACTORY`, or `faiss:FACTORY@PARAMETERS` as `nprobe=16`.
      part: The rows.

    Raises:
      UserError: If faiss is not installed, or cannot make such an index of these rows.
    """

    def __init__(self, spec: str, part: Part):
        self.spec = spec
        try:
            import faiss  # an extra
        except ImportError as error:
            raise UserError(f"{error}: install the extra with `pip install -e .[faiss]`") from error
        self._faiss = faiss
        factory, _, parameters = spec.partition(":")[2].partition("@")
        path = part.folder / f"faiss-{_digest(factory)}.index"
        try:
            rows = part.open_rows()
            self._index = self._kept(path, rows.shape)
            query = rows[:1].astype(np.float32)  # some faults show in a search alone
            if self._index is None:
                self._index = self._built(factory, rows)
                self.nearest(query, 1)
                self._keep(path)
            if parameters:
                faiss.ParameterSpace().set_index_parameters(self._index, parameters)
            self.nearest(query, 1)
        except (RuntimeError, AssertionError) as error:
            reason = _FAISS_PLACE.sub("", str(error).splitlines()[0])
            raise UserError(f"--index={spec}: faiss cannot make it: {reason}") from error

    def nearest(self, queries, count):
        """Returns the rows that faiss finds."""
        return self._index.search(np.ascontiguousarray(queries, np.float32), count)[1]

    def _kept(self, path, shape):
        if not path.exists():
            return None
        try:
            index = self._faiss.read_index(os.fspath(path))
        except RuntimeError:
            _log.warning("%s is damaged; it is made anew", path)
            return None
        return index if (index.ntotal, index.d) == shape else None

    def _built(self, factory, rows):
        faiss = self._faiss
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

    def _keep(self, path):
        scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")
        self._faiss.write_index(self._index, os.fspath(scratch))
        os.replace(scratch, path)


class Qdrant(Engine):
    """A collection of a Qdrant server, or of the client's local mode, kept equal to a part.

    Its points are named by the rows' names, stamps and model, so that only those that are new are
    sent.

    Args:
      spec: `qdrant:URL`, `qdrant:FOLDER` or `qdrant::memory:`. A server's key is read from the
        environment variable QDRANT_API_KEY.
      part: The rows.

    Attributes:
      sent: The number of points that the collection lacked.

    Raises:
      UserError: If qdrant-client is not installed, or the server or folder cannot be used.
    """

    def __init__(self, spec: str, part: Part):
        self.spec = spec
        try:
            import qdrant_client  # an extra
        except ImportError as error:
            raise UserError(
                f"{error}: install the extra with `pip install -e .[qdrant]`"
            ) from error
        self._models = qdrant_client.models
        where = spec.partition(":")[2]
        self._collection = f"fne_jax_{_digest(os.fspath(part.folder.parent.resolve()))}"
        model = json.dumps(part.model, sort_keys=True)
        self._rows = {
            str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([name, stamp, model]))): row
            for row, (name, stamp) in enumerate(zip(part.names, part.stamps, strict=True))
        }
        with self._told():
            if "://" in where:
                key = os.environ.get("QDRANT_API_KEY")
                self._client = qdrant_client.QdrantClient(
                    url=where, api_key=key, timeout=60, check_compatibility=False
                )
            elif where == ":memory:":
                self._client = qdrant_client.QdrantClient(where)
            else:
                # Whichever thread happens to collect the index closes its database.
                self._client = qdrant_client.QdrantClient(
                    path=files.expand_home(where), force_disable_check_same_thread=True
                )
            # An index has no end that its users must tell: its folder is free, and its database
            # closed, when it is no longer used or could not be filled.
            weakref.finalize(self, self._client.close)
            self._fill(part)

    def nearest(self, queries, count):
        """Returns the rows that Qdrant finds."""
        found = np.full((len(queries), count), -1, np.int64)
        for number, query in enumerate(queries):
            with self._told():
                answer = self._client.query_points(
                    self._collection, query=query.tolist(), limit=count, with_payload=False
                )
            rows = [self._rows[str(point.id)] for point in answer.points]
            found[number, : len(rows)] = rows
        return found

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except Exception as error:  # whatever the client's transports and its local mode raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"--index={self.spec}: Qdrant cannot be used: {reason}"
            raise EnvironmentFailure(message) from error

    def _fill(self, part):
        models, client, name = self._models, self._client, self._collection
        rows, vectors = part.open_rows(), None
        if client.collection_exists(name):
            vectors = client.get_collection(name).config.params.vectors
        if vectors is None or vectors.size != part.dim:
            client.delete_collection(name)
            vectors = models.VectorParams(size=part.dim, distance=models.Distance.DOT, on_disk=True)
            client.create_collection(name, vectors_config=vectors)
        there = set(self._points())
        gone = sorted(there - self._rows.keys())
        for start in range(0, len(gone), _LISTED_POINTS):
            chosen = models.PointIdsList(points=gone[start : start + _LISTED_POINTS])
            client.delete(name, points_selector=chosen)
        new = [(point, row) for point, row in self._rows.items() if point not in there]
        self.sent = len(new)
        with Progress("qdrant", len(new), enabled=bool(new)) as progress:
            for start in range(0, len(new), _POINTS):
                points = [
                    models.PointStruct(
                        id=point,
                        vector=rows[row].astype(np.float32).tolist(),
                        payload={"name": part.names[row]},
                    )
                    for point, row in new[start : start + _POINTS]
                ]
                client.upsert(name, points=points, wait=True)
                progress.advance(len(points))

    def _points(self):
        """Yields the ids of all points of the collection."""
        offset = None
        while True:
            points, offset = self._client.scroll(
                self._collection,
                limit=_LISTED_POINTS,
                offset=offset,
                with_payload=False,
                with_vectors=False,
            )
            yield from (str(point.id) for point in points)
            if offset is None:
                return


_ENGINES = {"faiss": Faiss, "qdrant": Qdrant}


def check_spec(spec: str) -> None:
    """Checks what an engine is called by, before anything is embedded for it.

    Raises:
      UserError: If it is none, which lists the forms, or names the home folder of nobody.
    """
    kind, _, rest = spec.partition(":")
    if spec != EXACT and (kind not in _ENGINES or not rest):
        raise UserError(f"--index={spec}: expected {FORMS}")
    if kind == "qdrant":
        files.expand_home(rest)


def create_engine(spec: str, part: Part) -> Engine:
    """Returns the engine of a checked `spec` for the rows of a part.

    Raises:
      UserError: If it cannot be made.
    """
    if spec == EXACT:
        return Exact(part)
    return _ENGINES[spec.partition(":")[0]](spec, part)


def recall_path(spec: str, part: Part) -> pathlib.Path:
    """Returns the file that keeps what an engine's recall was on a part."""
    return part.folder / f"recall-{_digest(spec)}.json"


def _digest(text):
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
