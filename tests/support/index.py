"""A model and a folder of images for tests of indexes: cheap, and known to whoever looks on."""

import hashlib
import multiprocessing
import signal

import numpy as np
from PIL import Image

from fne_jax.data.images.usable_images import evaluation_pixels
from fne_jax.index.search_index import build_index
from tests.support.faults import KILL, Operations

DIM = 16


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Model:
    """Stands for a model; it writes down what it embeds.

    Attributes:
      embedded: The number of items of each call.
    """

    def __init__(self, step=1, batch_size=4):
        self.embedded = []
        self._projection = np.random.default_rng(step).standard_normal((8 * 8 * 3, DIM))
        self._step, self.batch_size = step, batch_size

        self.params, self.embedder = None, self

    def identity(self):
        return {"step": self._step}

    def read_image(self, image, name):
        return evaluation_pixels(image, 8, name=name)

    def pixels(self, params, parts):
        return np.concatenate([self.images(part) for part in parts])

    def images(self, pixels):
        self.embedded.append(len(pixels))
        return unit(pixels.reshape(len(pixels), -1) / 255 @ self._projection)

    def embed_texts(self, texts):
        self.embedded.append(len(texts))
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        return unit(np.stack([np.random.default_rng(s).standard_normal(DIM) for s in seeds]))

    def unread(self, texts):
        return ""

    def load_split(self, name):
        return no_split(name)


def pixels_of(number):
    """Returns the [8, 8, 3] uint8 pixels of an image: coarse, so that a JPEG keeps them apart."""
    coarse = np.random.default_rng(number).integers(0, 255, (2, 2, 3))
    return np.kron(coarse, np.ones((4, 4, 1))).astype(np.uint8)


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(number)).save(path)


def no_split(name):
    raise AssertionError(f"the split {name} was asked for")


def build(photos, folder, model=None, **more):
    """Returns the index of a folder of images."""
    model = Model() if model is None else model
    return build_index(model, photos, folder=folder, **more)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Dies:
    """Stands, as a context, for a process that is killed: so many of its file operations are done.

    What it does to files that are open is done, too; `build_and_die` leaves nothing to a stand-in.

    Args:
      folder: The folder whose operations count.
      after: The number of operations that are done.
    """

    def __init__(self, folder, after):
        self._operations, self._after = Operations(folder), after

    def __enter__(self):
        self._operations.__enter__()
        self._operations.done = _Ending(self._after)  # an operation is noted before it is done

    def __exit__(self, *exception):
        self._operations.__exit__(*exception)


class _Ending(list):
    """A list that takes so many entries."""

    def __init__(self, most):
        super().__init__()
        self._most = most

    def append(self, entry):
        if len(self) == self._most:
            raise Killed
        super().append(entry)


def build_and_die(photos, folder, operation):
    """Builds an index in a process that is killed at a file operation; returns whether it was."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_build_killed, args=(photos, folder, operation))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
    return process.exitcode != 0


def _build_killed(photos, folder, operation):
    with Operations(folder, operation, KILL):
        build(photos, folder)
