"""From a file of verdicts to an audit by the detector that was fitted to them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from fne_jax import audit, configuration
from fne_jax.data import match_files
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.verdicts import Verdict, pairs_of, read_verdicts, write_verdicts
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import write_embeddings
from fne_jax.false_negatives import audit_pages, fitted_detector, verdict_fitting
from fne_jax.false_negatives.detectors import judge_by
from fne_jax.false_negatives.verdict_samples import pooled, sample
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_evaluation_split
from tests.support.planted import is_true, judged_split, planted_split, unlabelled

CONFIG = """
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(data__synthetic__images=60, global_batch_size=8).lock()
"""


@pytest.fixture
def written(tmp_path):
    """The arguments of an audit of anyone's embeddings, and the verdicts on a sample of pairs."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    dataset = load_evaluation_split(configuration.load_config(str(config), []), "val")
    planted, topic = planted_split(60, 2, topics=12, noise=0.8)
    # The planted captions are shuffled, those of the dataset are not.
    order = np.argsort(planted.caption_image, kind="stable")
    text_emb = planted.text_emb[order]
    rows = dataset.caption_image, dataset.image_id, dataset.caption_id
    np.testing.assert_array_equal(rows[0], planted.caption_image[order])
    write_embeddings(tmp_path / "theirs", EmbeddedSplit(planted.image_emb, text_emb, *rows))
    split = judged_split(dataset, planted.image_emb, text_emb)
    drawn = sample(split, 500, 0)
    said = np.where(is_true(split, topic, drawn.caption, drawn.image), "match", "no_match")
    verdicts = [
        Verdict("val", int(dataset.image_id[i]), int(dataset.caption_id[c]), "",
                dataset.captions[c], str(word), "ann", sample="first", weight=float(weight))
        for c, i, word, weight in zip(drawn.caption, drawn.image, said, drawn.weight, strict=True)
    ]  # fmt: skip
    arguments = [f"--embeddings={tmp_path / 'theirs'}", f"--config={config}", "--split=val"]
    return [*arguments, f"--out={tmp_path / 'out'}"], verdicts, (split, topic)


def test_an_audit_by_verdicts(written, tmp_path, capsys, caplog):
    arguments, verdicts, (split, topic) = written
    own, label = int(split.image_id[split.caption_image[0]]), int(split.caption_id[0])
    of_label = dataclasses.replace(
        verdicts[0], image_id=own, caption_id=label, caption=split.dataset.captions[0],
        reviewer="bob", sample="", weight=None,
    )  # fmt: skip
    write_verdicts(tmp_path / "said.csv", [*verdicts, of_label])
    fitted = f"--fitted={tmp_path / 'fitted.json'}"
    audit.main([*arguments, f"--verdicts={tmp_path / 'said.csv'}", fitted])
    told = capsys.readouterr().out
    assert "verdicts of people: ann 500\n" in told
    assert "fitted to 500 verdicts on val" in told and "by the embeddings of theirs" in told
    assert "what config.fne.prior should be" in told and "precision 90% from probability" in told
    assert "\ndetector fitted: trees" in told  # it is preferred to the others
    lines = (tmp_path / "out" / audit_pages.JSONL_NAME).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["detector"] for row in rows] == ["fitted"] * len(rows)
    pairs = [(row["caption_index"], row["image_index"]) for row in rows]
    assert is_true(split, topic, *np.array(pairs[:50]).T).mean() > 0.9
    # Refuted pairs are left out, and those that are confirmed are in, as far as pairs are listed.
    judged = dict(zip(pairs_of(verdicts, split.dataset).rows(), verdicts, strict=True))
    refuted, confirmed = ({pair for pair, one in judged.items() if one.verdict == word}
                          for word in ("no_match", "match"))  # fmt: skip
    assert not refuted & set(pairs)
    assert [row["confirmed"] for row in rows] == [pair in confirmed for pair in pairs]

    detector = fitted_detector.read(tmp_path / "fitted.json")
    about = detector.about
    assert (about["run"], about["split"], about["samples"]) == ("theirs", "val", ["first"])
    true = np.mean([one.verdict == "match" for one in verdicts])
    assert about["density"]["low"] < about["density"]["value"] < true
    # Told once, where it is so: of the verdicts that it was fitted to.
    assert "the detector was fitted to these verdicts" in told
    # The file does for the next audit.
    audit.main([*arguments, fitted])
    again = (tmp_path / "out" / audit_pages.JSONL_NAME).read_text().splitlines()
    assert not any(json.loads(line)["confirmed"] for line in again)
    assert "detector fitted" in capsys.readouterr().out
    assert "not calibrated here" not in caplog.text
    # And for a list to train with, of the precision by verdicts rather than of the probability.
    audit.main([*arguments[:3], fitted, f"--matches={tmp_path / 'matches.npz'}"])
    assert f"probability {detector.threshold(0.8):g} or more" in capsys.readouterr().out
    dataset = load_evaluation_split(configuration.load_config(str(tmp_path / "tiny.py"), []), "val")
    listed = match_files.read_match_list(tmp_path / "matches.npz", dataset)
    assert len(listed.caption) > 100
    assert is_true(split, topic, listed.caption, listed.image).mean() > 0.7
    assert refuted & set(listed.rows())
    listing = [*arguments[:3], fitted, f"--matches={tmp_path / 'matches.npz'}"]
    audit.main([*listing, f"--verdicts={tmp_path / 'said.csv'}"])
    heeded = match_files.read_match_list(tmp_path / "matches.npz", dataset)
    assert set(heeded.rows()) == (set(listed.rows()) - refuted) | confirmed
    of_pair = dict(zip(heeded.rows(), heeded.probability, strict=True))
    assert {of_pair[pair] for pair in confirmed} == {1} and confirmed & set(listed.rows())
    left_out = len(refuted & set(listed.rows()))
    assert (
        f"{left_out} pairs that reviewers refuted are left out, {len(confirmed)} that they "
        "confirmed are in"
    ) in capsys.readouterr().out
    # Whatever the detector says of them.
    audit.main([*listing, f"--verdicts={tmp_path / 'said.csv'}", "--min-probability=1"])
    sure = match_files.read_match_list(tmp_path / "matches.npz", dataset)
    assert set(sure.rows()) == confirmed


def test_verdicts_measure_an_audit_by_any_detector(written, tmp_path, capsys):
    arguments, verdicts, (split, topic) = written
    write_verdicts(tmp_path / "said.csv", verdicts)
    measuring = ["--detector=similarity", "--min-probability=0", "--per-query=30"]
    audit.main([*arguments, *measuring, f"--verdicts={tmp_path / 'said.csv'}"])
    told = capsys.readouterr().out
    assert "of all unlabelled pairs match" in told and "500 verdicts)" in told
    # Of the list before verdicts are heeded, which is the one without them.
    audit.main([*arguments, *measuring])
    capsys.readouterr()
    (whole,) = re.findall(r"of the first ([\d,]+) pairs (\d+)% match \((\d+)% to (\d+)%", told)[-1:]
    lines = (tmp_path / "out" / audit_pages.JSONL_NAME).read_text().splitlines()
    for first, share, low, high in re.findall(
        r"of the first ([\d,]+) pairs (\d+)% match \((\d+)% to (\d+)%", told
    ):
        rows = [json.loads(line) for line in lines[: int(first.replace(",", ""))]]
        pairs = np.array([(row["caption_index"], row["image_index"]) for row in rows]).T
        if len(rows) == int(first.replace(",", "")):
            assert int(low) - 1 <= 100 * is_true(split, topic, *pairs).mean() <= int(high) + 1
        assert int(low) <= int(share) <= int(high)
    assert int(whole[0].replace(",", "")) > 1000
    assert "was fitted to these" not in told
    # Verdicts that no sample drew measure nothing.
    plain = [dataclasses.replace(one, sample="", weight=None) for one in verdicts]
    write_verdicts(tmp_path / "plain.csv", plain)
    audit.main([*arguments, *measuring, f"--verdicts={tmp_path / 'plain.csv'}"])
    told = capsys.readouterr().out
    assert "no person's verdict is of a random sample" in told and "of the first" not in told


def test_verdicts_tell_whether_probabilities_are_right(written, tmp_path, capsys):
    arguments, verdicts, (split, _) = written
    write_verdicts(tmp_path / "said.csv", verdicts)
    said = f"--verdicts={tmp_path / 'said.csv'}"
    audit.main([*arguments, "--detector=similarity", said, "--config.fne.prior=0.1"])
    told = capsys.readouterr().out
    # Each verdict speaks for as many pairs as it weighs.
    rows = pairs_of(verdicts, split.dataset)
    pairs = rows.replace(similarity=split.similarity(rows.caption, rows.image))
    config = configuration.load_config(str(tmp_path / "tiny.py"), ["--config.fne.prior=0.1"])
    split = dataclasses.replace(split, config=config)
    judged = judge_by("similarity", split)(pairs).probability
    weight = np.array([one.weight for one in verdicts])
    match = np.array([one.verdict == "match" for one in verdicts])
    classes = re.findall(
        r"probability (\S+) (?:to (\S+)|or more), ([\d.]+)% on average, "
        r"([\d.]+)% match \(.*, (\d+) verdicts",
        told,
    )
    assert len(classes) >= 2
    for low, high, expected, found, count in classes:
        among = (float(low) <= judged) & (judged < float(high or 2))
        assert among.sum() == int(count)
        mean = 100 * np.average(judged[among], weights=weight[among])
        share = 100 * np.average(match[among], weights=weight[among])
        np.testing.assert_allclose([float(expected), float(found)], [mean, share], atol=0.51)


def test_mistakes(written, tmp_path, capsys):
    arguments, verdicts, _ = written
    for more, message in (
        (["--detector=fitted"], "--detector=fitted takes --fitted"),
        ([f"--verdicts={tmp_path}/said.csv"], "said.csv: cannot be read"),
        ([f"--fitted={tmp_path}/none.json"], "none.json: cannot be read"),
        ([f"--fitted={tmp_path}/said.csv"], "said.csv: expected a name that ends in .json"),
    ):
        with pytest.raises(UserError, match=message):
            audit.main([*arguments, *more])
    write_verdicts(tmp_path / "few.jsonl", verdicts[:25])
    fitting = [f"--verdicts={tmp_path}/few.jsonl", f"--fitted={tmp_path}/few.json"]
    with pytest.raises(UserError, match="a detector is fitted to at least 20"):
        audit.main([*arguments, *fitting])
    assert "25 verdicts): what config.fne.prior should be" in capsys.readouterr().out
    assert not (tmp_path / "few.json").exists() and not (tmp_path / "out").exists()


def test_a_detector_of_other_embeddings_is_told(written, tmp_path, caplog):
    arguments, verdicts, _ = written
    write_verdicts(tmp_path / "said.csv", verdicts)
    fitted = f"--fitted={tmp_path / 'fitted.json'}"
    audit.main([*arguments, f"--verdicts={tmp_path / 'said.csv'}", fitted])
    assert "not calibrated here" not in caplog.text
    (tmp_path / "theirs").rename(tmp_path / "others")
    audit.main([f"--embeddings={tmp_path / 'others'}", *arguments[1:], fitted])
    assert (
        "learnt from verdicts on the split val by theirs, not on the split val by others: its "
        "probabilities are not calibrated here"
    ) in caplog.text


def test_a_density_by_verdicts_that_all_agree_is_no_prior():
    verdicts = {"is_match": np.zeros(30, bool), "weight": np.full(30, 9.0)}
    said = Pairs(np.arange(30), np.arange(30), **verdicts)
    told = verdict_fitting.describe_density(said, said[:0])
    assert told.startswith("0% of all unlabelled pairs match by all 30 verdicts (0.00% to 9.50%")
    assert "too few to tell config.fne.prior" in told


def test_samples_stand_for_all_pairs_each_by_itself(tmp_path):
    split, _ = planted_split(20, 2, topics=4)
    caption, image = (rows[:4].tolist() for rows in unlabelled(split))

    def verdict(pair, word, name="", weight=None, reviewer="ann", time=""):
        return Verdict("val", image[pair], caption[pair], "", split.dataset.captions[caption[pair]],
                       word, reviewer, time, sample=name, weight=weight)  # fmt: skip

    verdicts = [
        verdict(0, "match", "a", 30.0, time="2026-05-04T12:30:00Z"),
        verdict(1, "no_match", "a", 10.0),
        # Drawn by another sample as well, and judged otherwise: the later verdict counts in both.
        verdict(0, "no_match", "b", 5.0, time="2026-05-04T12:31:00Z"),
        verdict(2, "match", "b", 15.0),
        # What the sample's own reviewer is outvoted in stands for others still.
        verdict(2, "no_match", "evaluation", reviewer="bert"),
        verdict(2, "no_match", reviewer="cy"),
        verdict(3, "match"),
    ]
    # As they are, and after a store has imported them one by one, and exported them.
    with VerdictStore(tmp_path / "v.sqlite") as store:
        for one in verdicts:
            assert store.import_verdicts([one]) == 1 and store.import_verdicts([one]) == 0
        write_verdicts(tmp_path / "v.csv", store.last())
    for given in (verdicts, read_verdicts(tmp_path / "v.csv")):
        said = verdict_fitting.said_of(split, given)
        assert said.sample.tolist() == ["a", "b", "a", "b", ""]
        assert said.is_match.tolist() == [False, False, False, False, True]
        expected = split.unlabelled * np.array([3 / 4, 1 / 4, 1 / 4, 3 / 4, np.nan])
        np.testing.assert_allclose(said.weight, expected)
    together = pooled(said.weight[:4], said.sample[:4])
    np.testing.assert_allclose(together, expected[:4] / 2)
    assert verdict_fitting.said_of(split, []).weight.size == 0
    # As a spreadsheet saves 7.260000000000002 whose thousands are separated by points.
    with pytest.raises(
        UserError, match=r"sample 'a' stand for 7,260,000,000,000,012 pairs, of 760"
    ):
        verdict_fitting.said_of(split, [verdict(0, "match", "a", 7.26e15 + 2), verdicts[1]])
