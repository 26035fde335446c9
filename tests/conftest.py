"""Eight virtual CPU devices, strict JAX, the golden folder, and runs that several tests share."""

import gc
import os

from tests.support.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# As the commands set it: TensorFlow tells of errors that its caller is told of too.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# There is one process of tests for each core: more threads of theirs would wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TF_NUM_INTEROP_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
# Commands under test neither read nor fill the user's own cache of compiled programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pathlib
import signal

import jax
import pytest

from tests import compiled_once
from tests.support import TOP

# Tracing makes many objects that stay, of millions that the collector would look through again and
# again: a twelfth of the suite's time with Python's own thresholds.
gc.set_threshold(100_000, 50, 100)

# A [batch] vector that meets a [batch, batch] matrix by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

compiled_once.install()

# A shell lets what it starts in the background ignore Ctrl-C, and runs under test would as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=str(TOP / "tests" / "golden"), help="folder of golden figures"
    )
    parser.addoption("--weights", help="folder of published encoders, for tests that need them")
    parser.addoption("--photographs", help="folder of photographs, for tests that need them")


@pytest.fixture(scope="session")
def golden(request):
    return pathlib.Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def weights(request):
    """A folder that holds published encoders, each in a folder of its own."""
    return _given_folder(request, "--weights")


@pytest.fixture(scope="session")
def photographs(request):
    """A folder of photographs, whose captions are no part of the repository either."""
    return _given_folder(request, "--photographs")


def _given_folder(request, option):
    folder = request.config.getoption(option)
    if folder is None:
        pytest.skip(f"needs {option} FOLDER")
    return pathlib.Path(folder)


@pytest.fixture
def hangup_is_heard():
    """Lets the signal of a closed terminal reach a test where `nohup` runs the suite."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def pytest_sessionfinish():
    # An iterator of tf.data that is left in a cycle with some test's traceback would wait half a
    # minute for the interpreter, which is gone when it is found.
    gc.collect()
