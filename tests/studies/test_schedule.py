"""The order of a study's work, and what becomes of work whose needs failed."""

from fne_jax.errors import UserError
from fne_jax.studies import cells, execution, schedule
from fne_jax.studies.schedule import Task

CONFIG = """
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(num_epochs=1.0, fne__start_epoch=0.5, warmup__objective="clip").lock()
"""


def planned(tmp_path, objectives, seeds=1):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    runs = cells.study_runs(str(path), (), objectives, (), seeds, tmp_path / "study")
    return runs, schedule.plan(runs)


def task(work, path, *needs):
    return Task(path.name, work, path, path, frozenset(needs))


def test_a_seed_comes_before_the_next_with_its_warm_up_and_lists(tmp_path):
    objectives = ("clip:words", "multi_positive:words@fne", "fne", "clip:words@fne")
    runs, tasks = planned(tmp_path, objectives, seeds=2)
    assert [task.name for task in tasks[:7]] == [
        "warm-up of clip:words, seed 0",
        "matches of clip:words, seed 0",
        "clip:words, seed 0",
        "matches of multi_positive:words@fne, seed 0",  # clip:words@fne takes it too
        "multi_positive:words@fne, seed 0",
        "fne, seed 0",
        "clip:words@fne, seed 0",
    ]
    assert [task.run.seed for task in tasks] == [0] * 7 + [1] * 7
    by_name = {task.name: task for task in tasks[:7]}
    of_run = by_name["fne, seed 0"]
    listed = by_name["matches of multi_positive:words@fne, seed 0"]
    assert of_run.makes == runs[2].workdir and listed.needs == {of_run.makes}
    assert listed.makes.parent == of_run.makes and listed.work is execution.find_matches
    for name in ("multi_positive:words@fne, seed 0", "clip:words@fne, seed 0"):
        assert by_name[name].needs == {runs[0].warmup, listed.makes}
        assert by_name[name].run.config.data.matches == str(listed.makes)
    assert by_name["clip:words, seed 0"].needs == {runs[0].warmup, runs[0].matches.path}


def test_what_is_there_is_not_made_again(tmp_path):
    runs, _ = planned(tmp_path, ("clip:words", "fne"))
    (run, other), warmup = runs, runs[0].warmup
    for folder in (warmup, other.workdir):
        folder.mkdir(parents=True)
    (other.workdir / "config.json").touch()  # begun: it has taken what it needs of the warm-up
    names = ["clip:words, seed 0", "fne, seed 0"]

    def planned_now(*runs):
        return [task.name for task in schedule.plan(runs)]

    assert planned_now(other) == names[1:]
    assert planned_now(run, other)[0] == "warm-up of clip:words, seed 0"
    (warmup / "warmup.json").touch()
    assert planned_now(run, other) == ["matches of clip:words, seed 0", *names]
    run.matches.path.touch()
    assert planned_now(run, other) == names
    # A begun run whose list was deleted with its warm-up needs both again.
    run.workdir.mkdir(parents=True)
    (run.workdir / "config.json").touch()
    run.matches.path.unlink()
    (warmup / "warmup.json").unlink()
    assert planned_now(run) == [
        "warm-up of clip:words, seed 0",
        "matches of clip:words, seed 0",
        "clip:words, seed 0",
    ]


def test_a_list_by_a_finished_run_takes_no_warm_up_again(tmp_path):
    (run, of_list), _ = planned(tmp_path, ("clip:words@fne", "fne"))
    run.workdir.mkdir(parents=True)
    (run.workdir / "config.json").touch()  # begun, and its list was deleted with the warm-up
    assert [task.name for task in schedule.plan([run])] == [
        "matches of clip:words@fne, seed 0",
        "clip:words@fne, seed 0",
    ]
    assert run.matches.folder == of_list.workdir


def _touch(path):
    """Makes a file unless the name forbids it."""
    if path.name == "wrong":
        raise UserError(f"{path} is wrong")
    path.touch()


def _touch_after(path):
    """Makes a file if there is the one that it is named after."""
    needed = path.parent / path.name.removeprefix("after_")
    if not needed.exists():
        raise UserError(f"{needed} does not exist")
    path.touch()


def test_work_waits_for_what_it_needs_and_is_left_out_if_that_failed(tmp_path):
    well, wrong = tmp_path / "well", tmp_path / "wrong"
    lost, lost_too = tmp_path / "lost", tmp_path / "lost_too"
    tasks = [
        task(_touch_after, tmp_path / "after_after_well", tmp_path / "after_well"),
        task(_touch_after, tmp_path / "after_well", well, tmp_path / "there_before"),
        task(_touch, tmp_path / "lost_with_it", lost_too),
        task(_touch, lost, wrong),
        task(_touch, lost_too, well, lost),
        task(_touch, wrong),
        task(_touch, well),
    ]
    outcomes = {task.name: outcome.error for task, outcome in schedule.work_through(tasks)}
    assert outcomes == {
        "wrong": f"{wrong} is wrong",
        "lost": "needs what failed: wrong",
        "lost_too": "needs what failed: wrong",
        "lost_with_it": "needs what failed: wrong",
        "well": None,
        "after_well": None,
        "after_after_well": None,
    }
    order = list(outcomes)
    assert order.index("well") < order.index("after_well") < order.index("after_after_well")
    names = {"well", "after_well", "after_after_well"}
    assert {path.name for path in tmp_path.iterdir()} == names
