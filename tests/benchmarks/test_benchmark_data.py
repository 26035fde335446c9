"""How a dataset's size is paid for, measured."""

import json

import pytest

from fne_jax import benchmark


@pytest.mark.slow
def test_a_line_for_each_size(capsys):
    benchmark.main(["data", "--pairs", "300", "400", "--batches", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["pairs"] for line in lines] == [300, 400]
    for line in lines:
        for name in ("prepare_1", "prepare_2", "first_start", "start"):
            assert line[f"{name}_s"] > 0 and line[f"{name}_mib"] > 10
        assert line["start_images_per_s"] > 0
