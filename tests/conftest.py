"""Eight virtual CPU devices, strict JAX, the golden folder, and runs that several tests share."""

import os

# Small programs, run a few times each: the suite's time is that of compiling them, which halves
# without LLVM's optimisations. `.ci/run` also trains with the default ones.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands under test neither read nor fill the user's own cache of compiled programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pathlib

import jax
import pytest

from tests import compiled_once

# A [batch] vector that meets a [batch, batch] matrix by accident is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

compiled_once.install()

TOP = pathlib.Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--golden", default=str(TOP / "tests" / "golden"), help="folder of golden figures"
    )


@pytest.fixture(scope="session")
def golden(request):
    return pathlib.Path(request.config.getoption("--golden"))
