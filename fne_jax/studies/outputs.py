"""The files that a study leaves in its folder."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.studies import summary, verdict_curves
from fne_jax.studies.cells import Run
from fne_jax.studies.figure import study_figure


def write_tables(folder: pathlib.Path, name: str, results: summary.Results, baseline: str) -> None:
    """Writes `.md`, both tables, `.csv`, `_runs.csv`, every run's metrics, and the figure, `.png`.

    Args:
      folder: The study's folder.
      name: How the files' names begin.
      results: The result of each seed, of each cell.
      baseline: The objective that the others are compared with.

    Raises:
      UserError: if a file cannot be written.
    """
    figure = io.BytesIO()
    study_figure(results).savefig(figure, format="png")
    contents = {
        f"{name}.md": summary.markdown(results, baseline).encode(),
        f"{name}.csv": summary.summary_csv(results, baseline).encode(),
        f"{name}_runs.csv": summary.runs_csv(results).encode(),
        f"{name}.png": figure.getvalue(),
    }
    for file_name, content in contents.items():
        _write(folder / file_name, content)


def write_verdict_table(
    folder: pathlib.Path, name: str, runs: Sequence[Run], budgets: Sequence[int]
) -> str:
    """Writes `_verdicts.md`: how well verdicts order the systems; returns what it says.

    Args:
      folder: The study's folder.
      name: How the file's name begins.
      runs: The runs that have ended.
      budgets: Numbers of verdicts.

    Raises:
      UserError: if the truth is not known, there are not two systems to compare, or the file cannot
        be written.
    """
    systems = verdict_curves.systems_of(runs)
    splits = next(iter(systems.values()), [])
    if len(splits) < 2 or splits[0].truth is None:
        raise UserError(
            "--verdicts: expected at least two systems that have ended, on data whose matches are "
            "all known, such as shapes"
        )
    table = verdict_curves.markdown(systems, budgets)
    _write(folder / f"{name}_verdicts.md", table.encode())
    return table


def _write(path, content):
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
