"""The retrieval benchmark's line, and the memory that the metrics take."""

import json
import subprocess
import sys

import pytest

from fne_jax import benchmark
from fne_jax.errors import UserError


def test_the_line_names_what_it_measured(capsys):
    benchmark.main(["retrieval", "--images=30", "--captions=70", "--dim=8", "--repeats=1"])
    line = json.loads(capsys.readouterr().out)
    assert (line["images"], line["captions"], line["dim"]) == (30, 70, 8)
    assert line["ratio"] == pytest.approx(line["retrieval_s"] / line["product_s"])
    assert line["peak_mib"] > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--dim=0", "--dim is 0"), ("--captions=4", "--captions is 4; expected one for each image")],
)
def test_numbers_that_cannot_be(argument, message):
    with pytest.raises(UserError, match=message):
        benchmark.main(["retrieval", argument])


@pytest.mark.slow
def test_coco_size_stays_under_a_gigabyte():
    done = subprocess.run(
        [sys.executable, "-m", "fne_jax.benchmark", "retrieval", "--repeats=1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["peak_mib"] < 1000
