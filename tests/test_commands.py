"""The commands as a user calls them: the whole path, and one clear error for each mistake."""

import dataclasses
import importlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request

import numpy as np
import pytest

from fne_jax import audit, evaluate, prepare, review, search, train
from fne_jax.configuration import read_config
from fne_jax.data.verdicts import Verdict, read_verdicts, write_verdicts
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import read_embeddings_of
from fne_jax.evaluation.results import read_values
from fne_jax.false_negatives import audit_pages
from fne_jax.false_negatives.judged_evaluation import EvaluationSample
from fne_jax.false_negatives.review_app.question_sources import questions_for_evaluation
from fne_jax.false_negatives.review_app.questions import Question
from fne_jax.false_negatives.verdict_store import VerdictStore, store_path
from fne_jax.model.model import load_evaluation_split
from tests.support import TOP
from tests.support.embeddings import statistics
from tests.support.tiny import write_karpathy
from tests.support.xla_flags import xla_flags


def call(command, *arguments, devices=1, **environment):
    environment = os.environ | environment
    environment |= {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, "-m", f"fne_jax.{command}", *map(str, arguments)], cwd=TOP,
            env=environment | {"TMPDIR": folder}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not os.listdir(folder), "nothing stays in the folder for temporary files"
    return ended


def refused(command, *arguments):
    """Returns the error of a command that is called in this process, of eight devices."""
    main = importlib.import_module(f"fne_jax.{command}").main
    with pytest.raises(UserError) as error:
        main([str(argument) for argument in arguments])
    return str(error.value)


def assert_all_in(text, *parts):
    for part in parts:
        assert str(part) in text


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    """A few steps on a few drawn scenes, warm-up and FNE, through the real commands."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 32}
    arguments = [
        f"--config={TOP / 'configs' / 'shapes.py'}",
        f"--config.data.cache_dir={folder / 'cache'}",
        "--config.data.shapes.train_images=40",
        "--config.data.shapes.val_images=9",
        "--config.data.shapes.test_images=11",
        "--config.global_batch_size=48",
        "--config.queue_size=70",
        "--config.num_epochs=1.5",
        "--config.fne.start_epoch=0.5",
        "--config.evaluation.batch_size=16",
        "--config.logging.every_steps=2",
        *(f"--config.encoder.image.{name}={size}" for name, size in sizes.items()),
        *(f"--config.encoder.text.{name}={size}" for name, size in sizes.items()),
    ]
    done = call("train", *arguments, f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run", arguments, done


def test_training_then_evaluating(shapes_run, caplog, monkeypatch):
    workdir, arguments, trained = shapes_run
    assert ": warm-up, filling the queue" in trained.stderr and ": fne\n" in trained.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert 0 <= last["sampled_false_negative_rate"] <= 1
    assert 0 <= last["hardest_false_negative_rate"] <= 1
    assert {"hinge_active", "fallback_fraction", "sampled_posterior", "queue_filled"} <= last.keys()

    done = call("evaluate", f"--workdir={workdir}", "--split=test")
    assert done.returncode == 0, done.stderr
    report = json.loads((workdir / "eval_test.json").read_text())
    assert (report["images"], report["captions"]) == (11, 55)
    assert f"rSum {report['metrics']['rsum']['value']:.1f}" in done.stdout
    assert read_values(report)["complete_t2i_r1"] >= read_values(report)["t2i_r1"]
    assert "in truth" in (workdir / "report.html").read_text()

    # And here, where there are eight devices.
    monkeypatch.chdir(workdir.parent)  # from another folder, told where the data lie
    evaluate.main(["--workdir=run", "--split=test", "--config.data.cache_dir=cache"])
    assert report["data"] == json.loads((workdir / "data.json").read_text())["test"]
    again = json.loads((workdir / "eval_test.json").read_text())
    assert read_values(again) == pytest.approx(read_values(report), abs=1e-3)
    with caplog.at_level(logging.INFO, logger="fne_jax"):
        train.main([*arguments, f"--workdir={workdir}"])
    assert "the run is complete" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "json_name", "page_name"),
    [
        ([], "eval_test.json", "report.html"),
        (["--checkpoint=best", "--split=test"], "eval_test.json", "report.html"),
        (["--split=val"], "eval_val.json", "report_val.html"),
        (["--checkpoint=latest"], "eval_test_latest.json", "report_test_latest.html"),
        (["--checkpoint=40", "--split=val"], "eval_val_step40.json", "report_val_step40.html"),
        (["--weights=momentum"], "eval_test_momentum.json", None),
        (["--protocol=all"], "eval_test.json", "report.html"),
        (["--out=my.json", "--split=val"], "../my.json", "../my.html"),
        (["--report=my.html"], "eval_test.json", "../my.html"),
    ],
)
def test_every_evaluation_has_files_of_its_own(
    tmp_path, monkeypatch, arguments, json_name, page_name
):
    monkeypatch.chdir(tmp_path)
    options, _ = evaluate._parse(["--workdir=run", *arguments])
    found = [path and str(path) for path in evaluate._paths(options)]
    expected = [name and os.path.normpath(f"run/{name}") for name in (json_name, page_name)]
    assert found == expected


def test_files_that_cannot_be_written_are_named_first(tmp_path):
    for option in ("out", "report"):
        path = f"--{option}={tmp_path / 'no' / 'file'}"
        assert_all_in(refused("evaluate", "--workdir=run", path), path, "is not a folder")
        path = f"--{option}={tmp_path}"
        assert "is a folder; expected a file" in refused("evaluate", "--workdir=run", path)
        path = f"--{option}={tmp_path / 'config.json'}"
        assert "that the evaluation reads" in refused("evaluate", f"--workdir={tmp_path}", path)
    paths = f"--out={tmp_path / 'page'}", f"--report={tmp_path}/../{tmp_path.name}/page"
    assert "cannot hold both" in refused("evaluate", "--workdir=run", *paths)


def test_anyone_s_embeddings_get_a_page(shapes_run, tmp_path):
    workdir, arguments, _ = shapes_run
    evaluate.main([f"--workdir={workdir}", f"--dump={tmp_path / 'theirs'}"])
    page = tmp_path / "theirs.html"
    ours = [f"--embeddings={tmp_path / 'theirs'}", f"--report={page}"]
    evaluate.main(ours)
    assert "theirs" in page.read_text() and "Best and worst" not in page.read_text()
    evaluate.main([*ours, *arguments, "--split=test"])
    assert "theirs: test" in page.read_text() and "Best and worst" in page.read_text()
    wrong = refused("evaluate", *ours, *arguments, "--split=val")
    assert_all_in(wrong, "image_id.npy", "of another dataset or split")


def test_momentum_encoders_are_scored_beside_the_run(shapes_run, tmp_path):
    workdir, _, _ = shapes_run
    scores = {}
    for weights in ("online", "momentum"):
        dump = tmp_path / weights
        arguments = ["--split=val", f"--weights={weights}", f"--dump={dump}"]
        evaluate.main([f"--workdir={workdir}", *arguments])
        suffix = {"online": "", "momentum": "_momentum"}[weights]
        report = json.loads((workdir / f"eval_val{suffix}.json").read_text())
        assert report["weights"] == weights
        scores[weights] = read_values(report)
        evaluate.main([f"--embeddings={dump}", f"--out={tmp_path / 'again.json'}"])
        again = json.loads((tmp_path / "again.json").read_text())
        assert again["metrics"] == report["metrics"] and "complete_i2t_r1" in again["metrics"]
    image_emb = [np.load(tmp_path / w / "image_embeddings.npy") for w in ("online", "momentum")]
    assert not np.allclose(*image_emb)
    assert scores["online"] != scores["momentum"]


def test_the_images_of_a_prepared_split_are_searched(shapes_run, capsys):
    workdir, _, _ = shapes_run
    dataset = load_evaluation_split(read_config(workdir), "test")
    (workdir / "query.jpg").write_bytes(dataset.images[4]["image"])
    query = (f"--image={workdir / 'query.jpg'}", "--top=11", "--json")
    search.main([f"--workdir={workdir}", "--images=test", *query])
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len({hit["name"] for hit in hits}) == 11
    # It finds itself, and nothing is nearer; after so few steps others may be as near.
    own = next(hit for hit in hits if hit["name"] == dataset.source_image_id[4])
    assert own["score"] == pytest.approx(1, abs=1e-3)
    assert own["score"] == pytest.approx(hits[0]["score"], abs=1e-3)
    of_image = np.flatnonzero(dataset.caption_image == 4)
    assert own["captions"] == [dataset.captions[row] for row in of_image] and own["path"] == ""


def test_a_kept_index_is_searched_without_tensorflow(shapes_run, tmp_path):
    workdir, _, _ = shapes_run
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow is imported')")
    search.main([f"--workdir={workdir}", "--images=val", "a red circle"])
    found = call(
        "search", f"--workdir={workdir}", "--images=val", "a red circle", PYTHONPATH=str(tmp_path)
    )
    assert found.returncode == 0, found.stderr


def lines_of(folder):
    return (folder / audit_pages.JSONL_NAME).read_text().splitlines()


def test_audit_lists_likely_false_negatives(shapes_run, capsys, tmp_path, monkeypatch):
    workdir, _, _ = shapes_run
    arguments = (f"--workdir={workdir}", "--split=val", "--checkpoint=latest")
    # In so short a run, hardly any pair is each other's first choice.
    assert "nothing is suspected before" in refused("audit", *arguments, "--detector=gaussians")
    load_workdir = audit.load_workdir

    def restore_with_statistics(*arguments, **options):
        return dataclasses.replace(load_workdir(*arguments, **options), stats=statistics())

    monkeypatch.setattr(audit, "load_workdir", restore_with_statistics)
    listed = (*arguments, "--min-probability=0", "--limit=70", f"--out={tmp_path}")
    audit.main([*listed, "--detector=gaussians"])
    assert_all_in(capsys.readouterr().out, "45 captions, 9 images", "precision at 100: ")
    rows = [json.loads(line) for line in lines_of(tmp_path)]
    assert len(rows) == 70
    assert {row["detector"] for row in rows} == {"gaussians"}
    found = [row["probability"] for row in rows]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    assert all(row["image_id"] != row["labelled_image_id"] for row in rows)
    assert (tmp_path / "page_2.html").exists()

    audit.main(listed)
    printed = capsys.readouterr().out
    assert_all_in(printed, "detector words: ", "captions, t2i, hardest 20 of a query, ")
    quality = json.loads((tmp_path / audit_pages.QUALITY_NAME).read_text())
    assert set(quality) == {"similarity", "gaussians", "captions", "words", "identical"}
    assert 0 <= quality["words"]["i2t_hardest_1"]["density"] <= 1
    rows = [json.loads(line) for line in lines_of(tmp_path)]
    keys = [(row["probability"], row["score"]) for row in rows]
    assert keys == sorted(keys, reverse=True)
    own = {row["nearest_own_caption"] for row in rows}
    assert {row["detector"] for row in rows} == {"words"} and "" not in own
    assert "nearest of the image's own" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_review_keeps_verdicts_that_the_audit_heeds(shapes_run, tmp_path, capsys, caplog):
    workdir, _, _ = shapes_run
    workdir = shutil.copytree(workdir, tmp_path / "run")
    options = [f"--workdir={workdir}", "--split=val", "--detector=words", "--min-probability=0"]
    command = [sys.executable, "-m", "fne_jax.review", *options, "--reviewer=anna", "--port=0"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=TOP, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        try:
            assert "unlabelled pairs of probability" in server.stdout.readline()
            assert "0 verdicts in" in server.stdout.readline()
            url = server.stdout.readline().split()[1]
            with urllib.request.urlopen(f"{url}search?q=a+red+circle") as answer:
                assert answer.read().count(b"<li>") == 9
            with urllib.request.urlopen(f"{url}review") as answer:
                page = answer.read().decode()
            data = re.search(r'data-data="([^"]+)"', page).group(1)
            pair = re.search(r'data-caption="(\d+)" data-image="(\d+)"', page)
            caption, image = map(int, pair.groups())
            body = {"data": data, "caption": caption, "image": image, "verdict": "no_match"}
            headers = {"content-type": "application/json", "origin": url.rstrip("/")}
            request = urllib.request.Request(f"{url}verdict", json.dumps(body).encode(), headers)
            urllib.request.urlopen(request).close()
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 130
        finally:
            server.kill()
        said = ("1 verdicts on val are in",)
        assert_all_in(server.stderr.read(), *said)

    assert (workdir / "reviews" / "embeddings_val.npz").exists()

    audit.main([*options, "--limit=3"])
    assert "1 pairs that reviewers refuted are left out" in capsys.readouterr().out
    lines = (workdir / "audit_val" / audit_pages.JSONL_NAME).read_text().splitlines()
    listed = [(row["caption_index"], row["image_index"]) for row in map(json.loads, lines)]
    assert len(listed) == 3 and (caption, image) not in listed

    exported = tmp_path / "verdicts.csv"
    review.main([f"--workdir={workdir}", f"--export={exported}"])
    (verdict,) = read_verdicts(exported, load_evaluation_split(read_config(workdir), "val"))
    assert (verdict.reviewer, verdict.verdict) == ("anna", "no_match")
    assert verdict.model.startswith("run step ")
    other = ["--store", str(tmp_path / "other.sqlite"), f"--import={exported}"]
    for added in ("1 verdicts added", "0 verdicts added"):
        review.main([f"--workdir={workdir}", *other])
        assert added in capsys.readouterr().out
    # A caption that was corrected since ends no audit, and a store of other data no review.
    before = dataclasses.replace(verdict, caption="another caption", reviewer="bert")
    with VerdictStore(store_path(workdir)) as store, VerdictStore(tmp_path / "b.sqlite") as berts:
        store.add(before)
        berts.add(before)
    audit.main([*options, "--limit=3"])
    assert "1 pairs that reviewers refuted are left out" in capsys.readouterr().out
    assert "1 of 2 verdicts are of other data and do not count: caption" in caplog.text
    theirs = f"--store={tmp_path / 'b.sqlite'}"
    assert "b.sqlite: none of its 1 verdicts is of" in refused("review", *options, theirs)
    text = exported.read_text().replace(verdict.caption, "another caption")
    exported.write_text(text)
    assert "none of its 1 verdicts is of" in refused("review", f"--workdir={workdir}", *other)


@pytest.mark.slow
def test_systems_are_compared_by_verdicts(shapes_run, tmp_path, capsys):
    workdir, _, _ = shapes_run
    theirs, of_val = tmp_path / "theirs", tmp_path / "of_val"
    momentum = [f"--workdir={workdir}", "--weights=momentum", f"--out={tmp_path / 'm.json'}"]
    evaluate.main([*momentum, f"--dump={theirs}"])
    evaluate.main([*momentum, f"--dump={of_val}", "--split=val"])
    sample = EvaluationSample(1, 8, 3)
    dataset, pooled, _ = questions_for_evaluation([workdir, theirs], "best", "test", sample)
    _, of_run, _ = questions_for_evaluation([workdir], "best", "test", sample)
    asked, of_run = ({(q.caption, q.image) for q in one} for one in (pooled, of_run))
    assert of_run < asked and len(asked) == len(pooled)
    # Nothing tells which system found a pair, nor how sure it was.
    assert set(pooled) == {Question(*pair, sample=sample.name) for pair in asked}
    with pytest.raises(UserError, match="of another dataset or split"):
        questions_for_evaluation([workdir, of_val], "best", "test", sample)

    caption, image = np.array(sorted(asked)).T
    verdicts = [
        Verdict("test", int(dataset.image_id[i]), int(dataset.caption_id[c]), "",
                dataset.captions[c], "match" if true else "no_match", sample=sample.name)
        for c, i, true in zip(caption, image, dataset.truth.is_true(caption, image), strict=True)
    ]  # fmt: skip
    path = tmp_path / "verdicts.jsonl"
    write_verdicts(path, verdicts)
    for arguments in ([f"--workdir={workdir}", f"--out={tmp_path / 'o.json'}"], momentum):
        evaluate.main([*arguments, f"--verdicts={path}"])
        assert "by verdicts" in capsys.readouterr().out
    report = json.loads((tmp_path / "m.json").read_text())
    embedded = read_embeddings_of(theirs, dataset)
    rows = sample.draw(dataset.image_id, dataset.caption_id)["t2i"]
    best = (embedded.text_emb[rows] @ embedded.image_emb.T).argmax(axis=1)
    value = 100 * dataset.truth.is_true(rows, best).mean()
    assert report["metrics"]["judged_t2i_r1"]["value"] == pytest.approx(value)
    for option in ("out", "report"):
        overwriting = [f"--workdir={workdir}", f"--verdicts={path}", f"--{option}={path}"]
        assert f"--{option}={path} is a file that" in refused("evaluate", *overwriting)
    write_verdicts(path, verdicts[::2])
    assert "results are not judged" in refused("evaluate", *momentum, f"--verdicts={path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere"], "nowhere is not a folder"),
        (["--workdir=.", "--export=a.csv", "--import=b.csv"], "give one of --export"),
        (["--workdir=.", "--export=a.csv", "--sample=20"], "give one of --export"),
        (["--workdir=.", "--sample=0"], "--sample is 0; expected 1 to 999999 pairs"),
        (["--workdir=.", "--export=a.csv"], "verdicts.sqlite does not exist"),
        (["--workdir=.", "--export=a.txt"], "verdicts.sqlite does not exist"),
        (["--workdir=.", "--import=a.csv"], "a.csv: cannot be read"),
        (["--workdir=.", "--port=70000"], "--port is 70000"),
        (["--workdir=.", "--store="], "--store= is empty; expected a path"),
        (["--workdir=.", "--import="], "--import= is empty; expected a path"),
        (["--workdir=.", "--store=a.txt"], "--store=a.txt: expected a file that ends in .sqlite"),
        (["--workdir=.", "--export=a.csv", "--store=a"], "--store=a: expected a file"),
        (["--workdir=."], "config.json does not exist"),
        (["--workdir=.", "--store=a.sqlite"], "config.json does not exist"),
        (["--workdir=.", "--fitted=none.json"], "none.json: cannot be read"),
        (["--for-evaluation", "."], "config.json does not exist"),
        (["--workdir=.", "--questions=a.csv"], "--questions=a.csv: expected a name that ends in"),
        (["--workdir=.", "--questions=a.jsonl", "--export=b.csv"], "does not go with --export"),
        (["--workdir=.", "--questions=a.jsonl"], "config.json does not exist"),
        (["--workdir=.", "--images-dir=a"], "--images-dir goes with --questions"),
        (["--workdir=.", "--reviewer= "], "--reviewer is empty"),
        (["--workdir=.", "--limit=0"], "--limit is 0"),
        (["--workdir=.", "--splits=val"], "unknown argument '--splits=val'"),
        (["--workdir=.", "--export=a.csv", "--config.data.dir=b"], "does not go with --export"),
        (["--for-evaluation", "x", "--queries=0"], "--queries is 0"),
        (["--for-evaluation", "x", "--seed=-1"], "--seed is -1"),
        (["--for-evaluation", "x", "--first=5"], "--first: invalid choice"),
        (["--for-evaluation", "nowhere"], "nowhere is not a folder"),
        ([], "give the --workdir of a run"),
    ],
)
def test_mistakes_of_a_review(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("review", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_review_checks_all_before_it_writes_or_embeds(shapes_run, tmp_path):
    workdir, _, _ = shapes_run
    store = tmp_path / "s.sqlite"
    evaluation = ["--for-evaluation", workdir, workdir]
    for arguments, message in (
        ([f"--workdir={workdir}", "--split=dev"], "the split 'dev' is unknown"),
        ([f"--workdir={workdir}", f"--fitted={tmp_path / 'no.json'}"], "no.json: cannot be read"),
        ([*evaluation, tmp_path / "no"], "no is not a folder"),
        ([*evaluation, tmp_path], "config.json does not exist"),
        ([*evaluation, "--checkpoint=77"], "there is no checkpoint '77'"),
    ):
        assert message in refused("review", *arguments, f"--store={store}")
        assert not store.exists() and not (workdir / "reviews").exists()
    store.write_bytes(b"no database, but long enough to be read" * 9)
    error = refused("review", f"--workdir={workdir}", "--split=val", f"--store={store}")
    assert "s.sqlite is damaged" in error
    assert not (workdir / "reviews").exists()


def test_resuming_with_another_config_fails(shapes_run):
    workdir, arguments, _ = shapes_run
    batch = ("--config.global_batch_size=40", "--config.momentum=0.5")
    error = refused("train", *arguments, f"--workdir={workdir}", *batch)
    assert "config.momentum: 0.99 in the run, 0.5 now" in error
    assert "config.global_batch_size: 48 in the run, 40 now" in error


def test_dry_run_shows_the_run_and_writes_nothing(shapes_run, tmp_path, capsys):
    _, arguments, _ = shapes_run
    train.main([*arguments, f"--workdir={tmp_path / 'none'}", "--dry-run"])
    out = capsys.readouterr().out
    for part in ("word_embedding", "total", "mesh", "MiB", "input_ids", "first caption", "[CLS]"):
        assert part in out
    assert not (tmp_path / "none").exists()


def test_unknown_checkpoint_and_split(shapes_run):
    workdir, _, _ = shapes_run
    error = refused("evaluate", f"--workdir={workdir}", "--checkpoint=77")
    assert_all_in(error, "no checkpoint '77'", "best, latest or one of")
    for option, said in (
        ("--checkpoint=²", "no checkpoint '²'"),
        ("--checkpoint=", "no checkpoint ''"),
        ("--split=dev", "the split 'dev'"),
        ("--split=", "the split ''"),
    ):
        assert said in refused("evaluate", f"--workdir={workdir}", option)


def test_evaluating_an_empty_workdir(tmp_path):
    assert "not the workdir of a run" in refused("evaluate", f"--workdir={tmp_path}")
    assert "is not a folder" in refused("evaluate", f"--workdir={tmp_path / 'no'}")


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare"])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, command):
    where = {"evaluate": ["--workdir=nowhere"]}.get(command, ["--config=nowhere.py"])
    extra = [f"--workdir={tmp_path / 'run'}"] if command == "train" else []
    done = call(command, *where, *extra)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir()), "nothing half-written stays behind"


def test_wrong_arguments(tmp_path):
    base = f"--config={TOP / 'configs' / 'flickr8k.py'}"
    workdir = f"--workdir={tmp_path / 'run'}"
    for arguments, part in (
        ([], "--workdir"),
        ([workdir, "--config.mommentum=1"], "config.momentum"),
        ([workdir, "--config.global_batch_size=30"], "8 devices do not divide"),
        ([workdir, "--config.queue_size=9"], "smaller than a batch"),
        ([workdir], "config.data.dir is ''"),
        ([workdir, "--config.data.dir=nowhere"], "dataset_<name>.json and images/"),
    ):
        assert part in refused("train", base, *arguments)
    assert not (tmp_path / "run").exists(), "nothing half-written stays behind"


def break_key(content):
    del content["images"][2]["sentences"]


def break_image(content):
    content["images"][1]["filename"] = "gone.jpg"


def break_captions(content):
    content["images"][3]["sentences"] = []


def break_split(content):
    content["images"][0]["split"] = "training"


@pytest.mark.parametrize(
    ("break_it", "parts"),
    [
        (break_key, ("images[2]", "'sentences' is missing")),
        (break_image, ("images[1]", "no image", "gone.jpg")),
        (break_captions, ("images[3]", "list of captions is empty")),
        (break_split, ("images[0]", "'training'", "train, restval, val, test")),
    ],
)
def test_damaged_karpathy_files(tmp_path, break_it, parts):
    content = write_karpathy(tmp_path / "data")
    break_it(content)
    (tmp_path / "data" / "dataset_made-up.json").write_text(json.dumps(content))
    error = refused(
        "prepare",
        f"--config={TOP / 'configs' / 'flickr8k.py'}",
        f"--config.data.dir={tmp_path / 'data'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    assert_all_in(error, "dataset_made-up.json", *parts)
    assert not list((tmp_path / "cache").rglob("prepared.json"))


def test_files_that_are_no_json(tmp_path):
    (tmp_path / "images").mkdir()
    config = f"--config={TOP / 'configs' / 'flickr8k.py'}"
    where = f"--config.data.dir={tmp_path}"
    assert_all_in(refused("prepare", config, where), "expected one dataset*.json", "found none")
    (tmp_path / "dataset_x.json").write_text("{")
    assert "not JSON" in refused("prepare", config, where)
    (tmp_path / "dataset_x.json").write_text("{}")
    assert "the key 'images' is missing" in refused("prepare", config, where)


def test_a_tokenizer_that_is_not_there(tmp_path):
    write_karpathy(tmp_path / "data", counts=(60, 3, 3))
    error = refused(
        "train",
        f"--config={TOP / 'configs' / 'flickr8k.py'}",
        f"--config.data.dir={tmp_path / 'data'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.global_batch_size=16",
        "--config.data.tokenizer=no/such-tokenizer",
        f"--workdir={tmp_path / 'run'}",
    )
    assert_all_in(error, "'no/such-tokenizer'", "tokenizer.json", "'train'")


def test_prepare_tells_counts_and_density(shapes_run, capsys):
    _, arguments, _ = shapes_run
    prepare.main(arguments[:6])
    assert_all_in(capsys.readouterr().out, "40 images       200 captions", "false negatives:")


@pytest.mark.parametrize(
    "field", ["data.matches", "objective.teacher", "encoder.image.pretrained", "init_from"]
)
def test_the_home_of_nobody_is_refused_wherever_a_path_is_given(field, tmp_path):
    of_nobody = [
        f"--config.{field}=~nobodyx/there",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    told = refused(
        "train", "--config=configs/shapes.py", f"--workdir={tmp_path / 'run'}", *of_nobody,
        "--config.data.source=synthetic",
    )  # fmt: skip
    assert_all_in(told, "'~nobodyx/there'", "there is no user of that name")
    assert not (tmp_path / "run" / "config.json").exists()
