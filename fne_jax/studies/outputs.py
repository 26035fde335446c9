"""The files that a study leaves in its folder."""

from __future__ import annotations

import io
import pathlib

from fne_jax.errors import UserError
from fne_jax.files import write_atomically
from fne_jax.studies import summary
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
        try:
            write_atomically(folder / file_name, content)
        except OSError as error:
            raise UserError(f"{folder / file_name}: cannot be written: {error}") from error
