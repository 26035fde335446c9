import dataclasses
import functools
import json
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import scipy.stats

from fne_jax import study
from fne_jax.errors import Interrupted, UserError
from fne_jax.evaluation import generality
from fne_jax.model import checkpoints
from fne_jax.model import model as model_lib
from fne_jax.model.model import load_workdir
from fne_jax.objectives import registry
from fne_jax.studies import cells, detector, execution, match_lists, schedule, summary
from fne_jax.studies.cells import Cell
from fne_jax.training.loop import train_and_evaluate
from tests.support import verdict_tables
from tests.support.runs import stored_state
from tests.support.tiny import LinearTowers

CONFIG = """
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(
        num_epochs=1.0, fne__start_epoch=0.5, data__source="shapes", data__cache_dir={cache!r},
        data__shapes__train_images=30, data__shapes__val_images=10, data__shapes__test_images=12,
        encoder__image__image_size=64, encoder__image__patch_size=32, data__augmentation="none",
        warmup__objective="clip",
    ).lock()
"""


@pytest.fixture(autouse=True, scope="module")
def linear_towers():
    """Towers that compile fast, in all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_lib, "build_module", lambda *arguments: LinearTowers())
        yield


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = folder / "configs" / "tiny_shapes.py"
    path.parent.mkdir()
    path.write_text(CONFIG.format(cache=str(folder / "cache")))
    return str(path)


@pytest.fixture(scope="module")
def finished(config_path, tmp_path_factory):
    """A study of two objectives and two seeds."""
    workdir = tmp_path_factory.mktemp("finished")
    arguments = [
        *(f"--config={config_path}", f"--workdir={workdir}", "--objectives=fne,hardest"),
        *("--seeds=2", "--config.fne.prior=0.3"),
    ]
    study.main(arguments)
    return arguments, workdir


def runs_of(config_path, objectives=("fne",), variants=(), seeds=1, overrides=()):
    return cells.study_runs(
        config_path, overrides, objectives, variants, seeds, pathlib.Path("study")
    )


def test_a_run_from_a_shared_warm_up_equals_one_trained_alone(config_path, finished, tmp_path):
    workdir = finished[1]
    runs = cells.study_runs(
        config_path, ["--config.fne.prior=0.3"], ("fne", "hardest"), (), 2, workdir
    )
    assert len(runs) == 4 and len({run.warmup for run in runs}) == 2
    run = runs[2]
    assert run.cell == Cell("fne") and run.seed == 1
    train_and_evaluate(run.config, tmp_path)
    alone, shared = stored_state(tmp_path), stored_state(run.workdir)
    assert int(alone.step) == int(shared.step) == 9
    assert checkpoints.fingerprints(alone.stored()) == checkpoints.fingerprints(shared.stored())

    def logged(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        of_machine = ("pairs_per_s", "data_wait_share")
        return [{k: v for k, v in line.items() if k not in of_machine} for line in lines]

    assert logged(tmp_path) == logged(run.workdir)
    # The warm-up ended inside of a window of three steps, and between two validations.
    assert load_workdir(run.warmup, "latest").step == 4


@pytest.mark.slow
def test_runs_that_know_of_matches_share_a_warm_up(config_path, monkeypatch, tmp_path):
    monkeypatch.setattr(match_lists, "LEAST_PROBABILITY", 0.0)
    monkeypatch.setattr(match_lists, "PER_CAPTION", 3)
    workdir = tmp_path / "study"
    objectives = "fne,fne:truth,fne:similarity,clip:fitted400,clip:similarity@fne"
    arguments = [f"--objectives={objectives}", "--seeds=1"]
    arguments += [f"--config.data.shapes.{kind}=2" for kind in ("shapes", "colours")]
    study.main([f"--config={config_path}", f"--workdir={workdir}", *arguments])
    (warmup,) = (workdir / "warmups").iterdir()
    plain, truth, similarity = (
        json.loads((workdir / name / "seed0" / "study.json").read_text())
        for name in ("fne", "fne_truth", "fne_similarity")
    )
    for kind in ("sampled", "hardest"):
        assert plain[f"{kind}_false_negative_rate"] > 0
        assert truth[f"{kind}_false_negative_rate"] == 0
    with np.load(match_lists.MatchList(warmup, "similarity").path) as found:
        assert 150 * 3 <= len(found["caption_id"]) + 150 <= 150 * 7
        assert 0 < json.loads(str(found["about"]))["precision"] < 1
    with np.load(match_lists.MatchList(warmup, "fitted400").path) as found:
        assert len(found["caption_id"]) > 100
        # Its 400 verdicts are heeded as well as learnt from.
        about = json.loads(str(found["about"]))
        assert 0 < about["confirmed"] < 400 and about["refuted"] >= 0
    with np.load(match_lists.MatchList(workdir / "fne" / "seed0", "similarity").path) as found:
        about = json.loads(str(found["about"]))
    # The run's last step, not the warm-up's.
    assert about["step"] == load_workdir(workdir / "fne" / "seed0", "latest").step > 4
    assert "| clip:similarity@fne |" in (workdir / "study.md").read_text()
    rates = [result["sampled_false_negative_rate"] for result in (plain, similarity)]
    assert rates[0] != rates[1]
    assert "| fne:truth less fne |" in (workdir / "study.md").read_text()


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        (
            "clip:oracle",
            (),
            "clip:oracle: there is no 'oracle'; expected one of truth",
        ),
        ("clap:truth", (), "--objectives: there is no 'clap'; expected some of fne"),
        ("clip:words", ("--config.fne.start_epoch=0",), "clip:words takes matches that a warm-up"),
        ("clip:truth@fne", (), "clip:truth@fne: the truth is not found by a run; leave out @fne"),
        ("clip:words@sigmoid", (), "'sigmoid' is none; add it, or name one that is"),
        ("clip:words@", (), "'' is none"),
    ],
)
def test_matches_that_no_run_can_have_are_refused(config_path, name, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        runs_of(config_path, (name,), overrides=overrides)


@pytest.mark.parametrize(
    ("default", "least", "empty"), [(0.0, 0, False), (1.1, 0, True), (1.1, 1e-9, False)]
)
def test_a_list_that_holds_nothing_is_told(
    finished, tmp_path, monkeypatch, caplog, default, least, empty
):
    warmup = tmp_path / "warmup"
    shutil.copytree(next((finished[1] / "warmups").iterdir()), warmup)
    monkeypatch.setattr(match_lists, "LEAST_PROBABILITY", default)
    wanted = match_lists.MatchList(warmup, "words", least)
    match_lists.write(wanted)
    told = "runs with it equal those without" in caplog.text
    assert told == empty and wanted.path.exists()


def test_a_list_reaches_down_to_where_negatives_begin(config_path):
    zones = "data.matches_positive=0.9,data.matches_negative=0.5"
    runs = runs_of(config_path, ("clip", "clip:words", "clip:words@clip"), (zones,))
    assert len({run.warmup for run in runs}) == 1
    lists = [run.matches and (run.matches.path.name, run.matches.least) for run in runs]
    whole, part = ("matches_words.npz", 0), ("matches_words_from0.5.npz", 0.5)
    assert lists == [None, whole, whole, part, part]
    assert runs[4].config.data.matches_positive == 0.9


@pytest.mark.slow
def test_what_verdicts_would_tell(finished):
    ranking, calibration = verdict_tables.tables(finished[1], ["hardest", "fne"], [5, 2000])
    assert ranking.startswith("Pairs of 2 systems") and "| 2,000 | " in ranking
    assert "over 2 seeds" in calibration.splitlines()[0] and "| 2,000 | " in calibration


def test_verdicts_that_nobody_can_give_are_told_before_anything_is_trained(config_path, tmp_path):
    synthetic = ["--config.data.source=synthetic"]
    runs = cells.study_runs(config_path, synthetic, ("clip:fitted50",), (), 1, tmp_path / "study")
    with pytest.raises(UserError, match="fitted50 takes verdicts by the truth"):
        schedule.train_missing(runs, lambda line: None)
    assert not (tmp_path / "study").exists()


def test_the_truth_is_for_positives_where_an_anchor_may_have_several(config_path):
    runs = runs_of(config_path, ("clip:truth", "multi_positive:truth", "fne_no_queue:truth"))
    assert [run.config.objective.oracle for run in runs] == ["drop", "positives", "drop"]
    assert [run.config.objective.queue for run in runs] == [True, True, False]


def test_a_truth_that_nobody_knows_is_told_before_anything_is_trained(config_path, tmp_path):
    runs = cells.study_runs(
        config_path,
        ["--config.data.source=synthetic"],
        ("infonce",),
        ("objective.oracle=drop",),
        1,
        tmp_path / "study",
    )
    with pytest.raises(UserError, match=r"config.objective.oracle is 'drop'.*source=synthetic"):
        schedule.train_missing(runs, lambda line: None)
    assert not (tmp_path / "study").exists()


def test_the_tables_hold_what_the_runs_measured(finished):
    workdir = finished[1]
    stored = {
        (folder.parent.name, folder.name): json.loads((folder / "study.json").read_text())
        for folder in workdir.glob("*/seed*")
    }
    assert len(stored) == 4
    ours = [stored["fne", f"seed{seed}"]["complete_t2i_r1"] for seed in (0, 1)]
    shown = f"{np.mean(ours):.1f} ± {np.std(ours, ddof=1):.1f}"
    table = (workdir / "study.md").read_text()
    assert f"| fne | 0, 1 | {shown} |" in table and "| fne less hardest |" in table
    assert len((workdir / "study_runs.csv").read_text().splitlines()) == 5
    assert (workdir / "study.png").stat().st_size > 10_000


def test_a_second_call_trains_only_what_is_missing(finished, monkeypatch, capsys):
    arguments, workdir = finished
    before = (workdir / "study.md").read_text()
    trained = []
    monkeypatch.setattr(execution, "train_and_evaluate", lambda *a, **k: trained.append(a[1]))
    study.main(arguments)
    assert not trained and "4 of them done" in capsys.readouterr().out
    shutil.move(workdir / "hardest" / "seed1" / "study.json", workdir / "moved")
    try:
        study.main(arguments)
        assert trained == [workdir / "hardest" / "seed1"]
        assert (workdir / "study.md").read_text() == before
    finally:
        shutil.move(workdir / "moved", workdir / "hardest" / "seed1" / "study.json")


def test_a_run_of_another_config_is_not_taken_for_the_study_s(finished):
    arguments, _ = finished
    with pytest.raises(UserError, match=r"holds a run of another config:\n  config.momentum"):
        study.main([*arguments, "--config.momentum=0.5"])


def test_runs_share_a_warm_up_unless_it_depends_on_what_differs(config_path):
    variants = (
        "fne.prior=0.5",
        "fne.margin=0.1",
        "objective.oracle=drop",
        "momentum=0.5",
        "queue_size=64",
        "data.prefetch=2",
    )
    runs = runs_of(config_path, ("fne", "infonce"), variants, seeds=2)
    warmups = {(run.cell.name, run.seed): run.warmup for run in runs}
    plain = warmups["fne", 0]
    for variant in ("fne.prior=0.5", "fne.margin=0.1", "objective.oracle=drop", "data.prefetch=2"):
        assert warmups["infonce", 0] == warmups[f"fne {variant}", 0] == plain
    for name in ("fne momentum=0.5", "fne queue_size=64"):
        assert warmups[name, 0] != plain
        assert warmups[name, 0] == warmups[name.replace("fne", "infonce", 1), 0]
    assert warmups["fne", 1] != plain
    # The hardest negative's warm-up has the margin.
    mined = runs_of(
        config_path, variants=variants[1:2], overrides=["--config.warmup.objective=hardest"]
    )
    assert mined[0].warmup != mined[1].warmup
    assert runs_of(config_path, overrides=["--config.fne.start_epoch=0"])[0].warmup is None


def test_classes_of_a_list_are_varied_for_objectives_with_a_list_alone(config_path):
    objectives = ("clip", "multi_positive:truth", "multi_positive:words@clip")
    classes = "data.matches_negative=0.2,data.matches_positive=0.8"
    runs = runs_of(config_path, objectives, (classes, "optimizer.learning_rate=0.1"))
    names = [run.cell.name for run in runs]
    assert names == [
        *objectives,
        f"multi_positive:words@clip {classes}",
        *(f"{name} optimizer.learning_rate=0.1" for name in objectives),
    ]
    # It is found by the run of clip that there is.
    by = {run.cell.name: run.matches.folder.parent.name for run in runs if run.matches}
    assert by == {
        objectives[2]: "clip",
        names[3]: "clip",
        names[-1]: "clip_optimizer.learning_rate=0.1",
    }
    given = runs_of(
        config_path, ("clip",), (classes,), overrides=["--config.data.matches=list.npz"]
    )
    assert [run.cell.name for run in given] == ["clip", f"clip {classes}"]


def test_objectives_change_what_they_are_named_for(config_path):
    runs = runs_of(config_path, tuple(cells.OBJECTIVES))
    chosen = {
        run.cell.objective: (
            run.config.objective.name,
            run.config.objective.queue,
            run.config.fne.elimination,
            run.config.fne.cut_down,
        )
        for run in runs
    }
    as_it_is = (True, "soft", True)
    assert chosen == {
        **{name: (name, *as_it_is) for name in registry.OBJECTIVES},
        "fne_no_queue": ("fne", False, "soft", True),
        "fne_no_elimination": ("fne", True, "none", True),
        "fne_no_cutdown": ("fne", True, "soft", False),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives=fne,softest"], "there is no 'softest'; expected some of fne, hardest"),
        (["--objectives=fne,fne"], "given twice"),
        (["--objectives=fne", "--baseline=hardest"], "--baseline=hardest is not among"),
        (["--vary=fne.prior"], "expected field=value"),
        (["--vary=fne.prio=1"], "there is no config field config.fne.prio; did you mean"),
        (["--vary=data.matches_negative=0.2"], "none of --objectives has one"),
        (["--vary=seed=3"], "give the number of --seeds"),
        (["--vary=fne.prior=0.1,objective.name=random"], "objective.name is what fne and hardest"),
        (
            ["--objectives=fne,fne_no_cutdown", "--vary=fne.cut_down=True"],
            "fne.cut_down is what fne_no_cutdown of --objectives sets itself",
        ),
        (["--config.objective.name=random"], "all of --objectives set that field themselves"),
        (["--seeds=0"], "--seeds is 0"),
        (["--report-only"], "no run has a result"),
    ],
)
def test_mistakes_are_named(config_path, tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        study.main([f"--config={config_path}", f"--workdir={tmp_path / 'new'}", *arguments])
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_run_that_fails_does_not_stop_the_others(finished, monkeypatch):
    arguments, workdir = finished
    names = [workdir / "fne" / "seed0" / "study.json", workdir / "fne" / "seed1" / "study.json"]
    kept = [name.read_text() for name in names]
    trained = []

    def train(config, folder, **_):
        trained.append(folder.name)
        if folder.name == "seed0":
            raise UserError("diverged")

    monkeypatch.setattr(execution, "train_and_evaluate", train)
    try:
        for name in names:
            name.unlink()
        with pytest.raises(UserError, match="fne, seed 0: diverged"):
            study.main(arguments)
        assert trained == ["seed0", "seed1"]
        assert names[1].exists() and not names[0].exists()
    finally:
        for name, text in zip(names, kept, strict=True):
            name.write_text(text)


def test_variants_are_compared_within_themselves():
    varied = Cell("fne", "queue_size=64")
    results = {
        Cell("fne"): {0: {"rsum": 10.0}},
        Cell("hardest"): {0: {"rsum": 7.0}},
        varied: {0: {"rsum": 5.0}},
        Cell("hardest", "queue_size=64"): {0: {"rsum": 6.0}},
        Cell("fne", "data.matches_negative=0.5"): {0: {"rsum": 9.0}},
        Cell("fne", "momentum=0.5"): {0: {"rsum": 8.0}},
    }
    table = summary.markdown(results, "hardest").splitlines()
    assert "| fne queue_size=64 less hardest queue_size=64 | 0 | -1.0 |" in table
    assert "| fne less hardest | 0 | +3.0 |" in table
    assert "| fne data.matches_negative=0.5 less hardest | 0 | +2.0 |" in table
    # One that failed is not taken for the same as without the change.
    assert not any("fne momentum=0.5 less" in line for line in table)
    assert table[-8].endswith("by the seeds that both have, single seeds: no intervals.")


def test_cells_of_other_seeds_are_compared_over_the_common_ones():
    results = {
        Cell("hardest"): {seed: {"rsum": 10.0 * seed} for seed in (0, 1, 2)},
        Cell("fne"): {seed: {"rsum": 10.0 * seed + 5 + seed / 100} for seed in (0, 2)},
        Cell("random"): {seed: {"rsum": 10.0 * seed + (-1) ** seed} for seed in range(5)},
    }
    lines = summary.markdown(results, "hardest").splitlines()
    assert "| hardest | 0 to 2 | 10.0 ± 10.0 |" in lines
    assert "| fne | 0, 2 | 15.0 ± 14.2 |" in lines
    assert "| random | 0 to 4 | 20.2 ± 15.8 |" in lines
    assert "| fne less hardest | 0, 2 | +5.0 ± 0.1 * |" in lines
    assert "| random less hardest | 0 to 2 | +0.3 ± 2.9 |" in lines
    assert "* marks the 1 of 2 that exclude 0; if nothing differed, 5 % would." in lines


def test_only_columns_that_are_there_are_explained():
    few = {Cell("infonce"): {0: {"rsum": 10.0, "i2t_r1": 1.0}}}
    assert summary.markdown(few, "infonce").splitlines()[:4] == [
        "Test metrics of the last weights, mean ± standard deviation over the seeds of a row.",
        "",
        "- rSum, R@1 i2t: by the labels",
        "",
    ]
    more = {Cell("fne"): {s: {"rsum": 1.0, "roc_auc": 0.5 + s} for s in (0, 1)}}
    text = summary.markdown(more, "fne")
    assert "- AUC: of the posterior" in text and "truth" not in text


def test_text_to_image_by_the_truth_comes_first_and_its_confound_has_a_control():
    result = {
        "rsum": 10.0,
        "complete_i2t_r1": 60.0,
        "complete_t2i_r1": 50.0,
        "complete_i2t_r1_controlled": 71.5,
        "complete_i2t_r1_weight": -0.016,
    }
    lines = summary.markdown({Cell("fne"): {0: result}}, "fne").splitlines()
    columns = ("", "seeds", "true R@1 t2i", "true R@1 i2t", "controlled R@1 i2t")
    columns = "| " + " | ".join((*columns, "weight for R@1 i2t", "rSum")) + " |"
    assert lines[lines.index(columns) + 2] == "| fne | 0 | 50.0 | 60.0 | 71.5 | -0.016 | 10.0 |"
    assert "- true R@1 t2i, true R@1 i2t: by the complete truth" in lines
    assert any(line.startswith("- controlled R@1 i2t: by the complete truth, ea") for line in lines)
    assert "- weight for R@1 i2t: these weights, each the best on the validation split" in lines


def test_the_weights_of_words_are_chosen_on_the_validation_split(
    config_path, finished, monkeypatch
):
    runs = cells.study_runs(config_path, ["--config.fne.prior=0.3"], ("fne",), (), 1, finished[1])
    weights, given = {"r1": 0.128, "map_at_r": -0.032}, []
    monkeypatch.setattr(generality, "choose_weights", lambda *split: given.append(split) or weights)
    result = execution.measured(runs[0])
    model = load_workdir(runs[0].workdir, "latest")
    val, test = model.load_split("val"), model.load_split("test")
    (chosen_by,) = given
    embedded = model.embed_split(val)
    for ours, theirs in zip(
        chosen_by, (embedded.image_emb, embedded.text_emb, embedded.truth), strict=False
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(chosen_by[3], generality.word_counts(val.captions))
    embedded, words = model.embed_split(test), generality.word_counts(test.captions)
    expected = generality.controlled_metrics(
        embedded.image_emb, embedded.text_emb, embedded.truth, words, weights
    )
    assert len(expected) == 4
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_estimates_are_those_of_a_t_test():
    ours = {0: {"m": 3.0}, 1: {"m": 5.0}, 2: {"m": 4.5, "n": 1.0}}
    theirs = {0: {"m": 2.0}, 2: {"m": 1.0}, 1: {"m": 4.5}, 3: {"m": 9.0}}
    results = {Cell("fne"): ours, Cell("hardest"): theirs}
    gap = summary.difference(results, Cell("fne"), Cell("hardest"), "m")
    expected = scipy.stats.ttest_rel([3.0, 5.0, 4.5], [2.0, 4.5, 1.0])
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(
        [gap.mean - gap.half_width, gap.mean + gap.half_width], [interval.low, interval.high]
    )
    assert gap.count == 3 and not gap.tells
    single = summary.estimate(results, Cell("fne"), "n")
    assert (single.mean, single.count) == (1.0, 1) and np.isnan(single.deviation)
    assert not single.tells
    assert summary.estimate(results, Cell("hardest"), "n") is None
    assert summary.Estimate.of([2.0, 2.1, 1.9]).tells


def test_the_judged_candidates_are_those_of_the_memory(finished):
    workdir = finished[1] / "fne" / "seed0"
    model = load_workdir(workdir, "latest")
    train = model.load_split("train")
    posterior, truth = detector.judged_candidates(model, train)
    queue = jax.device_get(model.queue)
    # 40 slots, all written by the end; every image is an anchor with its first caption.
    others = [(i, slot) for i in range(30) for slot in range(40) if queue.image_id[slot] != i]
    assert len(posterior) == len(truth) == 2 * len(others)
    first = np.array([np.flatnonzero(train.caption_image == i)[0] for i in range(30)])
    matrix = train.truth.matrix()
    of_images = [matrix[i, queue.pair_id[slot]] for i, slot in others]
    of_captions = [matrix[train.caption_image[queue.pair_id[slot]], first[i]] for i, slot in others]
    np.testing.assert_array_equal(truth, of_images + of_captions)
    assert 0 < truth.mean() < 1
    result = json.loads((workdir / "study.json").read_text())
    assert result["density"] == pytest.approx(truth.mean())
    assert result["mean_posterior"] == pytest.approx(posterior.mean(), rel=1e-5)

    empty = model.queue.replace(image_id=np.full(40, -1, np.int32))
    assert detector.measure(dataclasses.replace(model, queue=empty), train) == {}


def test_a_signal_says_how_to_go_on(finished, monkeypatch):
    arguments, workdir = finished
    (workdir / "fne" / "seed0" / "study.json").rename(workdir / "kept")
    monkeypatch.setattr(
        execution,
        "train_and_evaluate",
        functools.partial(_raise, Interrupted(signal.SIGINT, "stopped at step 5, saved")),
    )
    try:
        with pytest.raises(Interrupted, match="stopped at step 5") as stop:
            study.main(arguments)
        assert stop.value.exit_code == 130
    finally:
        (workdir / "kept").rename(workdir / "fne" / "seed0" / "study.json")


def _raise(error, *_, **__):
    raise error
