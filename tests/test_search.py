"""The command `search` on a small run: what it prints, keeps, refuses, and how it is stopped."""

import functools
import json
import logging
import os
import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from fne_jax import search
from fne_jax.errors import Interrupted, UserError
from fne_jax.index.search_index import build_index
from fne_jax.model.model import load_workdir
from fne_jax.training import loop
from tests.support import TOP
from tests.support.tiny import LinearTowers, tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(num_epochs=0.3, checkpoint__every_steps=1)
    loop.train_and_evaluate(config, workdir, module=LinearTowers())
    return workdir


@pytest.fixture(autouse=True)
def linear_towers(monkeypatch):
    restore = functools.partial(load_workdir, module=LinearTowers())
    monkeypatch.setattr(search, "load_workdir", restore)


@pytest.fixture(scope="module")
def model(workdir):
    return load_workdir(workdir, module=LinearTowers())


@pytest.fixture
def run(workdir, tmp_path):
    """A copy of the run that has no index."""
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture
def photos(tmp_path, model):
    """Twelve images of the validation split as files that keep each pixel."""
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(model.load_split("val").images[:12]):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02d}.png")
    return tmp_path / "photos"


def lines_of(capsys, run, *arguments):
    search.main([f"--workdir={run}", *map(str, arguments)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_split_is_searched_as_its_evaluation_embeds_it(run, model, capsys):
    dataset = model.load_split("val")
    split = model.embed_split(dataset)
    caption = dataset.captions[3]
    (found,) = lines_of(capsys, run, "--images=val", "--json", "--top=5", caption)
    similarity = split.image_emb @ split.text_emb[3]
    order = np.argsort(-similarity)[:5]
    assert found["text"] == caption
    assert [hit["name"] for hit in found["hits"]] == [dataset.source_image_id[n] for n in order]
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5]
    scores = [hit["score"] for hit in found["hits"]]
    np.testing.assert_allclose(scores, similarity[order], atol=1e-3)
    own = [dataset.captions[n] for n in np.flatnonzero(dataset.caption_image == order[0])]
    assert found["hits"][0]["captions"] == own


def test_texts_are_searched_by_image(run, photos, model, capsys):
    (found,) = lines_of(capsys, run, "--texts=val", "--json", f"--image={photos / '02.png'}")
    texts = list(dict.fromkeys(model.load_split("val").captions))
    similarity = model.embed_texts(texts) @ model.embed_images(photos / "02.png")[0]
    # Texts of the same words have the same embedding.
    scores = [similarity[texts.index(hit["name"])] for hit in found["hits"]]
    np.testing.assert_allclose(scores, -np.sort(-similarity)[:10], atol=1e-3)
    np.testing.assert_allclose(scores, [hit["score"] for hit in found["hits"]], atol=1e-3)
    assert (run / "index_val_texts").is_dir()


def test_a_text_that_the_model_cannot_read_is_warned_of_once(run, model, caplog, capsys):
    long = " ".join(["red six"] * 20)
    texts = ["red six", "\N{SNOWMAN} \u732b", "...", long, "red \u732b"]
    search.main([f"--workdir={run}", "--images=val", "--top=1", *texts])
    log = "fne_jax.index.search_index"
    warnings = [
        each.getMessage()
        for each in caplog.records
        if each.name == log and each.levelno > logging.INFO
    ]
    nothing = "it is without any word of the tokenizer's vocabulary"
    cut = (
        f"cut to 30 words (config.data.max_words) or {model.config.evaluation.text_length} tokens "
        "(config.data.text_length)"
    )
    assert warnings == [
        f"'\N{SNOWMAN} \u732b': {nothing}",
        f"'...': {nothing}",
        f"{long!r:.60}: it is {cut}",
    ]
    caplog.clear()
    build_index(model, texts=texts).search("red six")
    (line,) = [each.getMessage() for each in caplog.records if each.levelno > logging.INFO]
    assert line.startswith(f"1 of 5 captions (20.0%) are {cut}, such as 'red six red six")
    assert "; 2 of 5 captions (40.0%) are without any word" in line


def test_people_read_ranks_scores_and_files(run, photos, capsys):
    image = photos / "03.png"
    search.main([f"--workdir={run}", f"--images={photos}", "--top=3", f"--image={image}", "a dog"])
    text = capsys.readouterr().out
    by_text, by_image = text.split("\n\n")
    assert by_text.splitlines()[1] == "a dog" and len(by_text.splitlines()) == 5
    rows = by_image.splitlines()
    assert rows[0] == str(image) and re.fullmatch(rf"   1   1\.000  {image}", rows[1])
    assert [int(row.split()[0]) for row in rows[1:]] == [1, 2, 3]


def test_a_second_call_embeds_nothing_and_another_checkpoint_all(run, photos, caplog, capsys):
    for arguments, said in (
        ([], "12 embedded now, 0 kept"),
        ([], "0 embedded now, all kept"),
        (["--checkpoint=1"], "12 embedded now, 0 kept"),
        (["--weights=momentum"], "12 embedded now, 0 kept"),
        (["--checkpoint=1"], "0 embedded now, all kept"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="fne_jax"):
            search.main([f"--workdir={run}", f"--images={photos}", *arguments])
        assert said in caplog.text
        everything = re.search(
            "made by the checkpoint of step .*, this is .* of step 1: everything", caplog.text
        )
        assert bool(everything) == (arguments == ["--checkpoint=1"] and said.startswith("12"))
    assert capsys.readouterr().out == ""
    assert len(list(run.glob("index_photos_*"))) == 2


def test_an_index_is_kept_elsewhere_if_the_run_cannot_be_written_to(run, photos, tmp_path, capsys):
    (run / "index_val").write_text("")  # a folder could not be made either
    with pytest.raises(UserError, match=r"cannot be kept: .*; keep it elsewhere by --index-dir"):
        search.main([f"--workdir={run}", "--images=val"])
    search.main([f"--workdir={run}", "--images=val", f"--index-dir={tmp_path / 'own'}", "a dog"])
    assert (tmp_path / "own" / "index_val").is_dir() and "a dog" in capsys.readouterr().out


def test_recall_of_an_engine_is_told_both_ways(run, capsys):
    search.main([f"--workdir={run}", "--images=val", "--index=faiss:Flat", "--top=1", "a dog"])
    captured = capsys.readouterr()
    line = "faiss:Flat: recall at 10 against exact: text-to-image 1.000, image-to-image 1.000\n"
    assert line in captured.err and len(captured.out.splitlines()) > 2
    search.main([f"--workdir={run}", "--texts=val", "--index=faiss:Flat"])
    assert "image-to-text 1.000, text-to-text 1.000" in capsys.readouterr().err


def test_damaged_images_are_named_and_the_others_found(run, photos, caplog, capsys):
    (photos / "04.png").write_bytes(b"\x89PNG")
    (found,) = lines_of(capsys, run, f"--images={photos}", "--json", "--top=99", "a dog")
    assert len(found["hits"]) == 11
    assert "1 of 12 images cannot be used" in caplog.text and "04.png" in caplog.text


def test_names_that_are_no_text_are_printed(run, photos, capsys):
    (photos / "00.png").rename(photos / os.fsdecode(b"\xff.png"))
    search.main([f"--workdir={run}", f"--images={photos}", "--top=99", "a dog"])
    assert "\\udcff.png" in capsys.readouterr().out
    (found,) = lines_of(capsys, run, f"--images={photos}", "--json", "--top=99", "a dog")
    assert "\udcff.png" in [hit["name"] for hit in found["hits"]]


def test_what_a_terminal_would_obey_is_printed_escaped(run, photos, caplog, capsys):
    (photos / "00.png").rename(photos / "a\n\x1b[31m\x9b.png")
    (photos / "bad\x1b[31m.png").write_bytes(b"\x89PNG")
    search.main([f"--workdir={run}", f"--images={photos}", "--top=99", "a\ndog \u96ea"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "a\\ndog \u96ea" and len(lines) == 2 + 12
    assert r"bad\x1b[31m.png'" in caplog.text
    assert any(line.endswith(r"/a\n\x1b[31m\x9b.png") for line in lines)


def test_wrong_arguments_are_told_before_anything_is_loaded(photos, tmp_path):
    photo = photos / "00.png"
    for arguments, message in (
        ([], "give either the --images or the --texts"),
        (["--images=val", "--texts=val"], "give either the --images or the --texts"),
        (
            ["--images=~no-such-user/g"],
            "'~no-such-user/g': there is no user of that name, whose home folder ~no-such-user",
        ),
        (
            ["--images=val", "--image=~no-such-user/a.jpg"],
            "for a file or folder of that name write ./~no-such-user",
        ),
        (["--images=", "a dog"], "--images= is empty"),
        (["--images=val", "--index-dir="], "--index-dir= is empty; expected a path"),
        (["--images=val", "--top=0"], "--top is 0"),
        (["--images=val", " "], "text to search by is empty"),
        (["--images=val", os.fsdecode(b"a\xff")], r"is 'a\udcff', which has a NUL or half a"),
        (["--images=val", "--index=faiss"], "expected exact or faiss:FACTORY"),
        (["--images=val", f"--image={tmp_path / 'no.jpg'}"], "no.jpg is not a file"),
        (["--images=val", "--imag=x"], "unknown argument '--imag=x'"),
        ([f"--images={tmp_path / 'no'}"], "nowhere is not a folder"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            search.main(["--workdir=nowhere", *arguments])
    assert photo.exists()


def test_wrong_galleries_are_told_with_the_run(run, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([f"--images={tmp_path / 'no'}"], "does not exist; expected a folder of images"),
        ([f"--images={tmp_path / 'empty'}"], "there is no image in it"),
        ([f"--images={photos / '00.png'}"], "give it as --image"),
        ([f"--texts={photos}"], "is a folder"),
        (["--images=val", "--checkpoint=77"], "no checkpoint '77'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            search.main([f"--workdir={run}", *arguments])
    assert not list(run.glob("index_*"))


def test_the_examples_of_the_docs_run(run, photos, tmp_path, monkeypatch, capsys):
    page = (TOP / "docs" / "search.md").read_text()
    commands = re.findall(r"^python -m fne_jax\.search (.*)$", page, re.MULTILINE)
    assert len(commands) == 7
    monkeypatch.setattr(pathlib.Path, "is_file", lambda path: path.name == "beach.jpg")
    for command in commands:
        assert search._parse(shlex.split(command))[0].workdir == "runs/flickr30k"
    monkeypatch.undo()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "flickr30k")
    shutil.copy(photos / "03.png", tmp_path / "beach.jpg")
    restore = functools.partial(load_workdir, module=LinearTowers())
    monkeypatch.setattr("fne_jax.model.model.load_workdir", restore)
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    assert names["hits"][0].name == "03.png" and names["rows"].shape == (2, 3)
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert (tmp_path / "runs" / "flickr30k" / "index_photos").is_dir()


def test_ctrl_c_is_told_with_what_is_kept(run, photos, monkeypatch, caplog):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "build_index", interrupted)
    with pytest.raises(Interrupted, match="the same command goes on") as stop:
        search.main([f"--workdir={run}", f"--images={photos}"])
    assert stop.value.exit_code == 130
