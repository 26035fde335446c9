"""Compares objectives and settings over several seeds, in one table and one figure.

python -m fne_jax.study --config=configs/shapes.py --objectives=fne,hardest,infonce --seeds=3
python -m fne_jax.study --config=configs/shapes.py --objectives=fne --vary=fne.prior=0.2
"""

from __future__ import annotations

import pathlib

from fne_jax import command_line
from fne_jax.errors import UserError, needs_extra
from fne_jax.files import as_user_error, local_folder, write_atomically
from fne_jax.objectives import registry


def main(arguments: list[str]) -> None:
    """Parses the command line, trains what is missing, and writes the tables."""
    options, overrides = _parse(arguments)
    with needs_extra("study", "a study"):
        from fne_jax.studies import cells, execution, figure, schedule, summary
    workdir = options.workdir
    runs = cells.study_runs(
        options.config, overrides, options.objectives, options.vary, options.seeds, workdir
    )
    failures = []
    if not options.report_only:
        failures = schedule.train_missing(runs, lambda line: print(line, flush=True))
    results = execution.read_results(runs)
    if not results:
        raise UserError("no run has a result:\n  " + "\n  ".join(failures or ["none was trained"]))
    tables = summary.markdown(results, options.baseline)
    for end, content in {
        ".md": tables,
        "_runs.csv": summary.runs_csv(results),
        ".png": figure.study_figure(results),
    }.items():
        path = workdir / f"study{end}"
        with as_user_error(f"{path}: cannot be written"):
            write_atomically(path, content)
    print(f"\n{tables}")
    print(f"written to {workdir / 'study'}.md, _runs.csv and .png")
    if failures:
        raise UserError("these could not be trained:\n  " + "\n  ".join(failures))


def _parse(arguments):
    parser = command_line.parser("Compares objectives and settings over seeds.", "study")
    parser.add_argument("--config", required=True, help="config file; --config.x=y for all runs")
    parser.add_argument("--workdir", help="folder of the study; runs/study_<config> by default")
    parser.add_argument(
        "--objectives",
        default="fne,hardest",
        help=f"some of {', '.join((*registry.OBJECTIVES, *registry.FNE_VARIANTS))}, separated "
        "by commas. A colon gives it matches beyond the labels: multi_positive:truth, or those of "
        "a detector, after the warm-up, as in multi_positive:similarity, or by another's finished "
        "run, as in multi_positive:fitted5000@clip",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        help="field=value[,field=value...]: adds each objective with that change; repeatable",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, ...")
    parser.add_argument(
        "--baseline",
        help="objective to compare with; by default hardest if it is in the list, else the first",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; tabulate the finished runs"
    )
    options, overrides = parser.parse_known_args(arguments)
    command_line.expand_home(options, "config")
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; expected at least 1")
    objectives = options.objectives.split(",")
    if options.baseline is None:
        options.baseline = "hardest" if "hardest" in objectives else objectives[0]
    if options.baseline not in objectives:
        raise UserError(
            f"--baseline={options.baseline} is not among --objectives={options.objectives}"
        )
    options.objectives = objectives
    if options.workdir is None:
        options.workdir = f"runs/study_{pathlib.Path(options.config).stem}"
    options.workdir = local_folder(options.workdir, "--workdir")
    return options, overrides


if __name__ == "__main__":
    command_line.run(main)
