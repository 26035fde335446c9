"""The audit finds the pairs that a plain search finds, and writes all of them safely."""

import codecs
import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from fne_jax import audit, configuration
from fne_jax.data import match_files
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.sources.shapes_scenes import SceneTruth
from fne_jax.data.verdicts import Verdict
from fne_jax.errors import UserError
from fne_jax.evaluation import top_k as top_k_lib
from fne_jax.evaluation.embedding_files import write_embeddings
from fne_jax.false_negatives import audit_pages, suspects
from fne_jax.false_negatives.detectors import judge_by
from fne_jax.false_negatives.judged_split import split_statistics
from fne_jax.false_negatives.unlabelled import unlabelled_pairs
from fne_jax.false_negatives.verdict_fitting import said_of
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_evaluation_split
from fne_jax.report import html
from tests.support.embeddings import statistics, unit_rows
from tests.support.pages import HOSTILE, Page, assert_safe_and_complete, hostile_split
from tests.support.planted import judged_split
from tests.support.tiny import tiny_config


@pytest.mark.parametrize("per_query", [2, 9])
def test_pairs_against_a_plain_version(monkeypatch, per_query):
    monkeypatch.setattr(top_k_lib, "BLOCK_ROWS", 4)
    rng = np.random.default_rng(0)
    image_emb, text_emb, owner = unit_rows(rng, 5, 3), unit_rows(rng, 11, 3), np.arange(11) % 5
    split = EmbeddedSplit(image_emb, text_emb, owner, np.arange(5), np.arange(11))
    pairs = unlabelled_pairs(split, per_query)
    similarity = text_emb @ image_emb.T
    own = similarity[np.arange(11), owner]
    others = [(c, i) for c in range(11) for i in range(5) if owner[c] != i]
    kept = set()
    for axis, count in ((0, 11), (1, 5)):
        for query in range(count):
            of_query = [pair for pair in others if pair[axis] == query]
            kept |= set(sorted(of_query, key=lambda pair: -similarity[pair])[:per_query])
    expected = sorted(kept, key=lambda pair: -similarity[pair])
    assert list(zip(pairs.caption, pairs.image, strict=True)) == expected
    np.testing.assert_allclose(pairs.similarity, [similarity[p] for p in expected], atol=1e-6)
    np.testing.assert_allclose(split.own_similarity, own, atol=1e-6)


def test_embeddings_that_are_not_finite():
    text_emb = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="text_emb"):
        rows = np.arange(2)
        split = EmbeddedSplit(np.eye(3, dtype=np.float32)[:2], text_emb, rows, rows, rows)
        unlabelled_pairs(split, 1)


def about(suspected):
    return {
        "run": HOSTILE[0], "step": 3, "split": "train", "suspected": suspected, "least": 0.001,
        "per_query": 5, "rank_by": "by probability", "prior": 1e-4,
        "precision": "", "heeded": "", "of_run": True, "of_labels": False,
        "detector": "captions", "description": "by captions", "score": "cosine",
    }  # fmt: skip


def rows(split, caption, image, probability, similarity=None):
    """Returns what an audit tells of pairs of a dataset."""
    nearest = np.arange(len(probability)) - 1  # the first has none
    similarity = np.ones(len(probability)) if similarity is None else similarity
    pairs = Pairs(caption, image, similarity, probability, np.sqrt(probability), nearest)
    return audit_pages.rows(judged(split, statistics()), pairs, "captions")


def some_rows(split, count):
    index = np.arange(count)
    caption = index % len(split.captions)
    image = (split.caption_image[caption] + 1 + index // len(split.captions)) % len(split.image_id)
    return rows(split, caption, image, np.linspace(1, 0, count), np.linspace(0.9, 0.1, count))


def from_csv(folder):
    # As a spreadsheet does, which tells UTF-8 by the byte order mark.
    text = (folder / audit_pages.CSV_NAME).read_bytes()
    assert text.startswith(codecs.BOM_UTF8)
    return list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline="")))


def test_files_hold_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_pages, "_ROWS_A_PAGE", 4)
    split = hostile_split()
    found = some_rows(split, 10)
    audit_pages.write(tmp_path / "out", split, found, about(10))
    assert from_csv(tmp_path / "out") == [
        {name: str(value) for name, value in row.items()} for row in found
    ]
    lines = (tmp_path / "out" / audit_pages.JSONL_NAME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
    assert found[3]["caption"] == split.captions[3]
    assert found[3]["source_image_id"] == split.source_image_id[2]
    assert found[3]["labelled_source_image_id"] == split.source_image_id[1]

    pages = sorted(path.name for path in (tmp_path / "out").glob("*.html"))
    assert pages == ["index.html", "page_2.html", "page_3.html"]
    shown = 0
    for number, name in enumerate(pages):
        page = Page((tmp_path / "out" / name).read_text())
        assert_safe_and_complete(page)
        files = {audit_pages.CSV_NAME, audit_pages.JSONL_NAME}
        assert {use["href"] for use in page.tags["a"]} - files == set(pages) - {name}
        beside = {use["rel"]: use["href"] for use in page.tags["a"] if "rel" in use}
        around = {"prev": pages[number - 1] if number else None, "next": (*pages, None)[number + 1]}
        assert beside == {rel: page for rel, page in around.items() if page}
        shown += len(page.tags["li"])
        assert HOSTILE[0] in " ".join(page.text)
    assert shown == 10

    audit_pages.write(tmp_path / "out", split, found[:3], about(3))
    assert [path.name for path in (tmp_path / "out").glob("*.html")] == ["index.html"]


def test_spreadsheets_run_no_caption(tmp_path):
    captions = [
        "@SUM(1+1)",
        "=1+1",
        "-2+3",
        "+x",
        "\ta dog",
        "a\0dog",
        'a - dog, = "it"',
        "\ud800 é",
    ]
    split = dataclasses.replace(hostile_split(images=4), captions=captions)
    found = some_rows(split, 8)
    audit_pages.write(tmp_path, split, found, about(8))
    read = [row["caption"] for row in from_csv(tmp_path)]
    assert read[:5] == [f"'{caption}" for caption in captions[:5]]
    assert read[5:] == ["a␀dog", captions[6], "? é"]
    assert from_csv(tmp_path)[7]["probability"] == "0.0"  # numbers are left alone
    lines = (tmp_path / audit_pages.JSONL_NAME).read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == captions


def test_captions_of_one_image_stand_together(tmp_path, monkeypatch):
    monkeypatch.setattr(audit_pages, "_ROWS_SHOWN", 2)
    split = hostile_split()
    image = np.array([1, 0, 1, 1, 2, 0])
    caption = np.array([8, 9, 10, 11, 12, 13])
    found = rows(split, caption, image, np.linspace(1, 0, 6))
    audit_pages.write(tmp_path, split, found, about(6))
    page = Page((tmp_path / "index.html").read_text())
    # Each suspected image once, and each caption's own.
    assert len(page.tags["section"]) == 3 and len(page.tags["img"]) == 3 + 6
    assert len(page.tags["details"]) == 3 + 6 + 1 and "1 more of this image" in page.text
    ranks = [int(text[:-1]) for text in page.text if text[:-1].isdigit() and text[-1] == "."]
    assert ranks == [1, 3, 4, 2, 6, 5]


def test_small_posteriors_can_be_told_apart():
    texts = {0.9995: "> 99.9", 0.42: "42.0", 0.001: "0.1", 0.00034: "0.034", 1e-6: "0.0001"}
    texts[3e-8] = "< 0.0001"
    for posterior, text in texts.items():
        assert html.posterior_text(posterior) == f"{text}\N{NO-BREAK SPACE}%"
    (row,) = rows(hostile_split(), *np.zeros((2, 1), int), np.array([3.4567891e-7]))
    assert row["probability"] == 3.45679e-7


def test_nothing_found_is_a_page_too(tmp_path):
    audit_pages.write(tmp_path, hostile_split(), [], about(0))
    assert "There is none" in (tmp_path / "index.html").read_text()


def judged(split, stats, **fne):
    rng = np.random.default_rng(0)
    emb = unit_rows(rng, len(split.image_id), 4), unit_rows(rng, len(split.captions), 4)
    return judged_split(split, *emb, stats=stats, config=tiny_config(**fne))


def test_nothing_is_suspected_before_the_count_that_the_loss_asks_for():
    split, settings = hostile_split(), {"per_query": 2, "least": 0.0}
    settings["detector"] = "gaussians"
    few = judged(split, statistics(count=30), fne__min_count=30)
    with pytest.raises(
        UserError, match=r"gaussians: the statistics are of 30 matching pairs.* 30; choo"
    ):
        suspects.find_suspects(few, **settings)
    enough = judged(split, statistics(count=31), fne__min_count=30)
    assert len(suspects.find_suspects(enough, **settings).pairs.caption)
    with pytest.raises(UserError, match="of 1 matching pairs"):
        suspects.find_suspects(judged(split, statistics(count=1), fne__min_count=0), **settings)


def test_what_ranks():
    split = judged(hostile_split(), statistics(), fne__prior=0.3)
    settings = {"per_query": 3, "least": 0.0}
    found = suspects.find_suspects(split, **settings)
    assert found.detector == "words"  # its captions are of one image each twice
    keys = list(zip(found.pairs.probability, found.pairs.score, strict=True))
    assert keys == sorted(keys, reverse=True) and len(set(keys)) > 5
    # Each judgement is still that of its pair.
    again = judge_by("words", split)(Pairs(found.pairs.caption, found.pairs.image))
    np.testing.assert_array_equal(again.score, found.pairs.score)
    np.testing.assert_array_equal(again.nearest, found.pairs.nearest)


def test_what_reviewers_say(tmp_path):
    split = hostile_split()
    of_split = judged(split, statistics(), fne__prior=0.3)
    found = suspects.find_suspects(of_split, per_query=3, least=0.0)
    pairs = found.pairs.rows()

    def verdict(number, said, reviewer="anna"):
        caption, image = pairs[number]
        return Verdict("val", int(split.image_id[image]), int(split.caption_id[caption]), "",
                       split.captions[caption], said, reviewer)  # fmt: skip

    verdicts = [
        verdict(0, "no_match"), verdict(2, "match"), verdict(3, "unsure"), verdict(4, "match"),
        verdict(4, "no_match", "bert"), verdict(6, "no_match"), verdict(6, "unsure", "bert"),
    ]  # fmt: skip
    # Of the suspects only some are found: what was confirmed is in all the same, at its place.
    few = dataclasses.replace(found, pairs=found.pairs[[0, 1, 3, 5, 6, 7]])
    kept = [1, 2, 3, 5, 7]
    heeded = suspects.heed_verdicts(few, of_split, said_of(of_split, verdicts))
    assert heeded.refuted == 2 and heeded.pairs.rows() == [pairs[number] for number in kept]
    kept = [number for number in range(len(pairs)) if number not in (0, 6)]
    heeded = suspects.heed_verdicts(found, of_split, said_of(of_split, verdicts))
    assert heeded.refuted == 2
    assert heeded.pairs.rows() == [pairs[number] for number in kept]
    np.testing.assert_array_equal(heeded.pairs.score, found.pairs.score[kept])
    audit_pages.write_audit(tmp_path, of_split, heeded, limit=20, quality={})
    lines = (tmp_path / audit_pages.JSONL_NAME).read_text().splitlines()
    confirmed = [json.loads(line)["confirmed"] for line in lines]
    assert confirmed == [number == 2 for number in kept[:20]]
    text = (tmp_path / "index.html").read_text()
    counted = "2 pairs that reviewers refuted are left out, 1 that they confirmed are in"
    assert counted in text
    assert text.count("reviewers say it matches") == 1
    assert counted in suspects.describe(of_split, heeded, {})


def test_the_precision_is_on_the_page(tmp_path, monkeypatch):
    split = hostile_split()
    truth = SceneTruth(np.zeros((7, 3, 6), int), np.zeros((14, 9), int))
    monkeypatch.setattr(SceneTruth, "is_true", lambda self, caption, image: caption % 2 == 0)
    of_split = judged(dataclasses.replace(split, truth=truth), statistics(), fne__prior=0.3)
    found = suspects.find_suspects(of_split, per_query=3, least=0.0)
    quality = suspects.detector_quality(of_split)
    audit_pages.write_audit(tmp_path, of_split, found, limit=20, quality=quality)
    text = (tmp_path / "index.html").read_text()
    assert f"Precision at {len(found.pairs.caption)}: " in text and "in truth a match" in text


def test_precision_counts_what_is_in_truth_a_match(monkeypatch):
    split = hostile_split(images=2)
    truth = SceneTruth(np.zeros((2, 3, 6), int), np.zeros((4, 9), int))
    monkeypatch.setattr(SceneTruth, "is_true", lambda self, caption, image: caption == 3)
    object.__setattr__(split, "truth", truth)
    caption = np.array([3, 0, 1, 2])
    pairs = caption, 1 - split.caption_image[caption]
    assert "precision at 4: 25.0%" in suspects.precision_text(split, Pairs(*pairs))
    in_truth = [row["in_truth"] for row in rows(split, *pairs, np.ones(4))]
    assert in_truth == [True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=x", "--limit=0"], "--limit is 0; expected at least 1"),
        (["--workdir=x", "--per-query=-2"], "--per-query is -2; expected at least 1"),
        (["--workdir=x", "--min-probability=1.5"], "--min-probability is 1.5; expected 0 to 1"),
        (["--split=train"], "give either the --workdir"),
        (["--workdir=x", "--embeddings=y"], "give either the --workdir"),
        (["--embeddings=y", "--out=z"], "takes the --config of the data"),
        (["--workdir=x", "--config=c.py"], "--config goes with --embeddings"),
        (["--embeddings=x", "--config=c.py", "--out=z", "--checkpoint=3"], "goes with --workdir"),
        (["--workdir=x", "--seed=3"], "unknown argument '--seed=3'"),
        (["--workdir=x", "--detector=external"], "external takes --caption-embeddings"),
        (["--workdir=x", "--detector=best"], "--detector: invalid choice: 'best'"),
        (["--workdir=x", "--matches=a.csv"], "--matches=a.csv: expected a name that ends in .npz"),
        (["--workdir=nowhere"], "nowhere is not a folder"),
        (["--workdir=x", f"--out={__file__}"], "test_audit.py is a file; expected a folder"),
        (["--workdir=x", f"--matches={__file__}/a.npz"], "test_audit.py is a file; expected a fol"),
        (["--workdir=x", "--matches=a.npz", "--out=y"], "--matches takes no --out"),
        (["--workdir=x", "--labels", "--per-query=3"], "--per-query does not go with --labels"),
        (["--workdir=x", "--labels", "--matches=a.npz"], "--matches does not go with --labels"),
    ],
)
def test_mistakes_of_the_command(arguments, message):
    with pytest.raises(UserError, match=message):
        audit.main(arguments)


def test_statistics_of_a_split_are_those_of_its_batches():
    rng = np.random.default_rng(3)
    image_emb, owner = unit_rows(rng, 6, 4), np.arange(17) % 6
    text_emb = image_emb[owner] + 0.5 * unit_rows(rng, 17, 4)
    text_emb /= np.linalg.norm(text_emb, axis=1, keepdims=True)
    split = EmbeddedSplit(image_emb, text_emb, owner, np.arange(6), np.arange(17))
    stats = split_statistics(split, batch=5, seed=1)
    order = np.random.default_rng(1).permutation(17)[:15].reshape(3, 5)
    positive, negative = [], []
    for rows in order:
        similarity = image_emb[owner[rows]] @ text_emb[rows].T
        same = owner[rows][:, None] == owner[rows][None, :]
        others = np.where(same, 0, similarity)
        for k in range(5):
            strangers = ~same[k]
            if (similarity[k, strangers] < similarity[k, k]).all() and (
                similarity[strangers, k] < similarity[k, k]
            ).all():
                positive.append(similarity[k, k])
                negative += [others[k].max(), others[:, k].max()]
    assert 2 < len(positive) < 15
    assert stats.positive.count == len(positive) and stats.negative.count == len(negative)
    np.testing.assert_allclose(stats.positive.mean, np.mean(positive), rtol=1e-5)
    np.testing.assert_allclose(stats.negative.mean, np.mean(negative), rtol=1e-5)


EMBEDDINGS_CONFIG = """
from tests.support.planted import judged_split
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(data__synthetic__images=9, fne__prior=0.3, global_batch_size=8).lock()
"""


def test_anyones_embeddings_are_audited(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "tiny.py"
    config.write_text(EMBEDDINGS_CONFIG)
    rng = np.random.default_rng(0)
    image_emb, owner = unit_rows(rng, 9, 6), np.repeat(np.arange(9), 2)
    text_emb = image_emb[owner] + 0.3 * unit_rows(rng, 18, 6)
    text_emb /= np.linalg.norm(text_emb, axis=1, keepdims=True)
    text_emb[4] = image_emb[7]  # a caption of image 2 that is all of image 7
    folder = tmp_path / "theirs"
    folder.mkdir()
    np.save(folder / "image_embeddings.npy", image_emb)
    np.save(folder / "text_embeddings.npy", text_emb)
    np.save(folder / "caption_image.npy", owner)
    out = tmp_path / "out"
    arguments = [f"--embeddings={folder}", f"--config={config}", "--split=val", f"--out={out}"]
    arguments += ["--detector=gaussians"]
    audit.main(arguments)
    assert capsys.readouterr().out.startswith("val: 18 captions, 9 images")
    first = json.loads((out / audit_pages.JSONL_NAME).read_text().splitlines()[0])
    assert (first["caption_index"], first["image_index"]) == (4, 7)
    assert first["similarity"] == pytest.approx(1.0)
    assert "theirs" in (out / "index.html").read_text()

    # That caption is the first of those that may be wrong.
    audit.main([*arguments[:-1], "--labels", "--limit=3"])
    lines = (out / audit_pages.LABEL_NAMES[1]).read_text().splitlines()
    assert json.loads(lines[0])["caption_index"] == 4 and len(lines) == 3

    # As a list to train with.
    matches = tmp_path / "lists" / "matches.npz"
    listing = [*arguments[:3], f"--matches={matches}", "--detector=similarity"]
    audit.main([*listing, "--min-probability=0", "--per-query=2"])
    assert f"written to {matches}, for config.data.matches" in capsys.readouterr().out
    of_split = load_evaluation_split(configuration.load_config(str(config), []), "val")
    pairs = match_files.read_match_list(matches, of_split)
    listed = set(pairs.rows())
    assert 18 <= len(listed) <= 4 * 18 and (4, 7) in listed
    assert all(owner[caption] != image for caption, image in listed)

    # The same in another order, which the ids tell.
    loaded = load_evaluation_split(configuration.load_config(str(config), []), "val")
    split = EmbeddedSplit(image_emb, text_emb, owner, loaded.image_id, loaded.caption_id)
    rng = np.random.default_rng(1)
    moved = split.part(rng.permutation(9), rng.permutation(18))
    write_embeddings(tmp_path / "moved", moved)
    audit.main([f"--embeddings={tmp_path / 'moved'}", *arguments[1:]])
    again = json.loads((out / audit_pages.JSONL_NAME).read_text().splitlines()[0])
    assert again == first

    # By a sentence encoder that takes caption 12, of image 6, for what caption 3, of image 1, says.
    encoder = unit_rows(rng, 18, 30)
    encoder[12] = 7 * encoder[3]
    np.save(tmp_path / "encoder.npy", encoder)
    few = [
        "--per-query=8",
        "--min-probability=0",
        f"--caption-embeddings={tmp_path / 'encoder.npy'}",
    ]
    audit.main([*arguments[:-1], *few])
    assert "detector external: " in capsys.readouterr().out
    lines = (out / audit_pages.JSONL_NAME).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    pairs = {(row["caption_index"], row["image_index"]) for row in found[:2]}
    assert pairs == {(12, 1), (3, 6)} and len(found) == 18 * 8
    assert all(row["score"] == pytest.approx(1.0) for row in found[:2])
    for wrong, message in (
        (encoder[1:], r"encoder.npy: 17 rows; expected 18, one for each caption"),
        (np.full((18, 2), np.nan), "encoder.npy: 18 rows are not finite"),
    ):
        np.save(tmp_path / "encoder.npy", wrong)
        with pytest.raises(UserError, match=message):
            audit.main([*arguments[:-1], *few])

    np.save(folder / "caption_image.npy", owner[::-1])
    with pytest.raises(UserError, match="each caption with the same image"):
        audit.main(arguments)
