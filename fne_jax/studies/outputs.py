"""The files that a study leaves in its folder."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

from fne_jax.errors import UserError
from fne_jax.files import as_user_error, write_atomically
from fne_jax.studies import calibration_curves, summary, verdict_curves
from fne_jax.studies.cells import Cell, Run
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


def write_verdict_tables(
    folder: pathlib.Path,
    name: str,
    runs: Sequence[Run],
    baseline: str,
    budgets: Sequence[int],
) -> str:
    """Writes `_verdicts.md`, and returns what it says.

    That is how well verdicts order the systems, and what they tell of the baseline's unlabelled
    pairs.

    Args:
      folder: The study's folder.
      name: How the file's name begins.
      runs: The runs that have ended.
      baseline: The objective whose runs are calibrated.
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
    tables = [verdict_curves.markdown(systems, budgets)]
    of_baseline = [run for run in runs if run.cell == Cell(baseline)]
    if of_baseline:
        tables.append(calibration_curves.markdown(calibration_curves.of_runs(of_baseline, budgets)))
    written = "\n".join(tables)
    _write(folder / f"{name}_verdicts.md", written.encode())
    return written


def _write(path, content):
    with as_user_error(f"{path}: cannot be written"):
        write_atomically(path, content)
