"""The retrieval benchmark's line, and the memory that the metrics take."""

import json
import os
import subprocess
import sys

import pytest

from fne_jax import benchmark
from fne_jax.benchmarks import ranking
from fne_jax.errors import UserError
from tests.support.xla_flags import xla_flags


def test_the_line_names_what_it_measured(capsys, monkeypatch):
    called = {}

    def known_seconds(functions, repeats):
        called.update({name: function() for name, function in functions.items()})
        assert repeats == 4
        return {"retrieval": 6.0, "product": 2.5}

    monkeypatch.setattr(ranking, "median_seconds", known_seconds)
    benchmark.main(["retrieval", "--images=30", "--captions=70", "--dim=8", "--repeats=4"])
    line = json.loads(capsys.readouterr().out)
    assert (line["images"], line["captions"], line["dim"]) == (30, 70, 8)
    assert (line["retrieval_s"], line["product_s"], line["ratio"]) == (6.0, 2.5, 2.4)
    # What is timed is what is named: the metrics of random embeddings, and products alone.
    assert 0 < called["retrieval"]["t2i_r10"] < 100 and called["product"] is None
    # This process has held more than 50 MiB and less than the machine has.
    assert 50 < line["peak_mib"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--dim=0", "--dim is 0"), ("--captions=4", "--captions is 4; expected one for each image")],
)
def test_numbers_that_cannot_be(argument, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["retrieval", argument])


def peak_mib(images, captions):
    """Returns the most memory that a process with one device held when it ranked a split."""
    done = subprocess.run(
        [sys.executable, "-m", "fne_jax.benchmark", "retrieval", "--repeats=1",
         f"--images={images}", f"--captions={captions}"],
        env=os.environ | {"XLA_FLAGS": xla_flags(1)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)["peak_mib"]


@pytest.mark.slow
def test_coco_is_ranked_without_the_matrix_of_its_similarities():
    # What Python, JAX and its programs take is not ours, and differs between machines.
    grown = peak_mib(5000, 25000) - peak_mib(10, 10)
    embeddings, matrix = (4 * size / 2**20 for size in (30_000 * 768, 5000 * 25000))
    assert embeddings < grown < matrix
