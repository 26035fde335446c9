"""The search benchmark's line."""

import json

from fne_jax import benchmark
from fne_jax.benchmarks import ranking


def test_the_line_names_what_it_measured(capsys, monkeypatch):
    found = []

    def known_seconds(functions, repeats):
        found.append(functions["query"]())
        assert repeats == 3
        return {"query": 0.25}

    monkeypatch.setattr(ranking, "median_seconds", known_seconds)
    benchmark.main(["search", "--rows=300", "--dim=12", "--repeats=3"])
    line = json.loads(capsys.readouterr().out)
    assert (line["rows"], line["dim"], line["query_s"]) == (300, 12, 0.25)
    assert line["cores"] >= 1 and 0 < line["memory_mib"] < 10
    # What is timed is what is named: the first ten of a row that is there, itself the first.
    rows, scores = found[0]
    assert rows.shape == (1, 10) and rows[0, 0] == 0 and 0.99 < scores[0, 0] < 1.01
