"""Compares objectives and settings over several seeds, in one table and one picture.

python -m fne_jax.study --config=configs/shapes.py --objectives=fne,hardest,infonce --seeds=3
python -m fne_jax.study --config=configs/shapes.py --objectives=fne --vary=fne.prior=0.2
"""

from __future__ import annotations

import os
import pathlib

from fne_jax import command_line
from fne_jax.errors import UserError


def main(arguments: list[str]) -> None:
    """Parses the command line, trains what is missing, and writes the tables."""
    options, overrides = _parse(arguments)

    try:
        from fne_jax.studies import cells, execution, schedule, summary
    except ImportError as error:
        raise UserError(f"{error}: install the extra with `pip install -e .[study]`") from error
    workdir = pathlib.Path(options.workdir)
    objectives = options.objectives.split(",")
    baseline = options.baseline
    if baseline is None:
        baseline = "hardest" if "hardest" in objectives else objectives[0]
    if baseline not in objectives:
        raise UserError(f"--baseline={baseline} is none of --objectives={options.objectives}")
    runs = cells.study_runs(
        options.config, overrides, objectives, options.vary, options.seeds, workdir
    )
    failures = []
    if not options.report_only:
        failures = schedule.work_through(runs, options.jobs, lambda line: print(line, flush=True))
    results = {}
    for run in runs:
        result = execution.read_result(run)
        of_cell = results.setdefault(run.cell, {})
        if result is not None:
            of_cell[run.seed] = result
    results = {cell: of_cell for cell, of_cell in results.items() if of_cell}
    if not results:
        raise UserError("no run has a result:\n  " + "\n  ".join(failures or ["none was trained"]))
    table = summary.markdown(results, baseline)
    _write(workdir, options.name, table, results, baseline)
    print(f"\n{table}\nwritten to {workdir / options.name}.md, .csv, _runs.csv and .png")
    if failures:
        raise UserError("these could not be trained:\n  " + "\n  ".join(failures))


def _parse(arguments):
    parser = command_line.parser("Compares objectives and settings over seeds.", "study")
    parser.add_argument("--config", required=True, help="config file; --config.x=y for all runs")
    parser.add_argument("--workdir", help="folder of the study; runs/study_<config> by default")
    parser.add_argument(
        "--objectives",
        default="fne,hardest",
        help="some of fne, hardest, semi_hard, random, infonce, sigmoid, fne_no_memory, "
        "fne_no_elimination, fne_no_cutdown, with commas between",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        help="field=value[,field=value...]: each objective once more with that; repeatable",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, ...")
    parser.add_argument(
        "--baseline", help="objective to compare with: hardest if it is there, else the first"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, on a CPU; each gets its share of cores"
    )
    parser.add_argument("--name", default="study", help="of the files with the tables")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; table what there is"
    )
    options, overrides = parser.parse_known_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.jobs > (os.cpu_count() or 1):
        raise UserError(f"--jobs is {options.jobs}, more than the {os.cpu_count()} cores")
    if options.workdir is None:
        options.workdir = f"runs/study_{pathlib.Path(options.config).stem}"
    return options, overrides


def _write(workdir, name, table, results, baseline):
    from fne_jax.report import html
    from fne_jax.studies import summary
    from fne_jax.studies.figure import study_figure

    html.write_text(workdir / f"{name}.md", table)
    html.write_text(workdir / f"{name}.csv", summary.summary_csv(results, baseline))
    html.write_text(workdir / f"{name}_runs.csv", summary.runs_csv(results))
    study_figure(results).savefig(workdir / f"{name}.png")


if __name__ == "__main__":
    command_line.run(main)
