"""Scores by verdicts against a plain version, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from fne_jax import configuration, evaluate
from fne_jax.data.verdicts import Verdict, write_verdicts
from fne_jax.errors import UserError
from fne_jax.evaluation import results
from fne_jax.evaluation.embedding_files import write_embeddings
from fne_jax.false_negatives.judged_evaluation import (
    EvaluationSample,
    find_sample,
    first_results,
    measure_judged,
    pool,
)
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.model import load_evaluation_split
from tests.support.embeddings import unit_rows
from tests.support.pages import hostile_split

SPLIT = hostile_split(images=20)
OWNER = SPLIT.caption_image


def system(seed):
    rng = np.random.default_rng(seed)
    images = unit_rows(rng, 20, 3)
    text = images[OWNER] + 0.8 * unit_rows(rng, 40, 3)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    ids = OWNER, SPLIT.image_id, SPLIT.caption_id
    return EmbeddedSplit(images, text.astype(np.float32), *ids, dataset=SPLIT)


def is_true(caption, image):
    return (caption + image) % 3 == 0


def verdict(sample, caption, image, said=None, reviewer="anna"):
    said = said or ("match" if is_true(caption, image) else "no_match")
    return Verdict("val", int(SPLIT.image_id[image]), int(SPLIT.caption_id[caption]), "",
                   SPLIT.captions[caption], said, reviewer, sample=sample.name)  # fmt: skip


def judged_pool(sample, systems):
    pairs = pool([first_results(sample, one) for one in systems], OWNER, sample.seed)
    return [verdict(sample, *pair) for pair in pairs.rows()]


@pytest.mark.parametrize("first", [1, 10])
def test_scores_against_a_plain_version(first):
    sample, systems = EvaluationSample(first, 13, 4), [system(seed) for seed in range(3)]
    verdicts = judged_pool(sample, systems)
    asked = {(one.caption_id, one.image_id) for one in verdicts}
    assert len(asked) == len(verdicts)
    needed, values = set(), []
    for one in systems:
        measured = measure_judged(sample, one, verdicts)
        similarity = one.image_emb @ one.text_emb.T
        drawn = sample.draw(SPLIT.image_id, SPLIT.caption_id)
        for direction, matrix in (("i2t", similarity), ("t2i", similarity.T)):
            hits = []
            for query in drawn[direction]:
                found = np.argsort(-matrix[query])[:first]
                pairs = [(c, query) if direction == "i2t" else (query, c) for c in found]
                hits.append([OWNER[c] == i or is_true(c, i) for c, i in pairs])
                needed |= {(int(c), int(i)) for c, i in pairs if OWNER[c] != i}
            hits = np.array(hits)
            r1 = measured[f"judged_{direction}_r1"]
            assert r1.value == pytest.approx(100 * hits[:, 0].mean())
            assert r1.low <= r1.value <= r1.high and 0 < r1.high - r1.low < 100
            assert r1.queries == 13 and "judged or labelled a match" in r1.definition
            values.append(r1.value)
            if first == 10:
                p10 = measured[f"judged_{direction}_p10"]
                assert p10.value == pytest.approx(100 * hits.mean())
                assert p10.high - p10.low < r1.high - r1.low
        assert len(measured) == (2 if first == 1 else 4)
        assert "by verdicts" in results.format_table(measured)
    # What is asked is what is needed, and nothing labelled.
    assert asked == needed and len(set(values)) > 2


def test_the_order_tells_nothing_and_shared_results_come_once():
    sample = EvaluationSample(10, 20, 1)
    systems = [first_results(sample, system(seed)) for seed in (0, 1)]
    both, swapped = pool(systems, OWNER, 3), pool(systems[::-1], OWNER, 3)
    assert both.rows() == swapped.rows()
    twice = pool([systems[0], systems[0]], OWNER, 3)
    alone = pool(systems[:1], OWNER, 3).rows()
    assert twice.rows() == alone
    of_first = np.array([pair in alone for pair in both.rows()])
    # Neither first nor last.
    half = len(of_first) // 2
    assert abs(of_first[:half].mean() - of_first[half:].mean()) < 0.2 < of_first.mean() < 0.95


def test_queries_do_not_depend_on_the_order_of_the_split():
    sample, rng = EvaluationSample(1, 7, 2), np.random.default_rng(0)
    image_id, caption_id = rng.permutation(500)[:30], rng.permutation(900)[:90]
    drawn = sample.draw(image_id, caption_id)
    moved = rng.permutation(30), rng.permutation(90)
    again = sample.draw(image_id[moved[0]], caption_id[moved[1]])
    for ids, order, direction in zip((image_id, caption_id), moved, drawn, strict=True):
        np.testing.assert_array_equal(ids[drawn[direction]], ids[order][again[direction]])
        assert len(set(drawn[direction])) == 7
    other = dataclasses.replace(sample, seed=3).draw(image_id, caption_id)
    assert list(other["i2t"]) != list(drawn["i2t"])
    everything = dataclasses.replace(sample, queries=100).draw(image_id, caption_id)
    assert sorted(everything["i2t"]) == list(range(30))


def test_a_system_that_was_not_judged_is_refused():
    sample, systems = EvaluationSample(1, 20, 0), [system(seed) for seed in range(3)]
    verdicts = judged_pool(sample, systems[:2])
    with pytest.raises(UserError, match="of this system's first results are not judged"):
        measure_judged(sample, systems[2], verdicts)
    complete = judged_pool(sample, systems)
    with pytest.raises(UserError, match=r"^1 of this system's .*\((1|0) of image to text, "):
        own = judged_pool(sample, systems[2:])
        left_out = (own[0].caption_id, own[0].image_id)
        rest = [one for one in complete if (one.caption_id, one.image_id) != left_out]
        measure_judged(sample, systems[2], rest)
    with pytest.raises(UserError, match="not judged"):
        measure_judged(sample, systems[0], [])


def test_reviewers_who_differ_and_who_are_unsure():
    sample, one = EvaluationSample(1, 20, 0), system(0)
    verdicts = judged_pool(sample, [one])

    def r1(verdicts):
        measured = measure_judged(sample, one, verdicts)
        return np.array([measured[f"judged_{name}_r1"].value for name in ("i2t", "t2i")])

    def all_say(word, reviewer="anna"):
        return [dataclasses.replace(v, verdict=word, reviewer=reviewer) for v in verdicts]

    none, unsure, matches = (r1(all_say(word)) for word in ("no_match", "unsure", "match"))
    assert (matches == 100).all() and (none < 100).all()
    np.testing.assert_allclose(unsure, (none + 100) / 2)
    np.testing.assert_allclose(r1(all_say("match") + all_say("no_match", "bert")), unsure)


def test_labels_count_until_they_are_refuted():
    sample, one = EvaluationSample(1, 20, 0), system(0)
    verdicts = judged_pool(sample, [one])
    found = first_results(sample, one)["t2i"]
    labelled = found[OWNER[found.caption[:, 0]] == found.image[:, 0]].rows()
    refuted = [dataclasses.replace(verdict(sample, *pair), verdict="no_match", sample="")
               for pair in map(np.ravel, labelled)]  # fmt: skip
    before, after = (measure_judged(sample, one, said)["judged_t2i_r1"].value
                     for said in (verdicts, verdicts + refuted[:2]))  # fmt: skip
    assert len(labelled) > 2 and after == pytest.approx(before - 100 * 2 / 20)


def test_names_of_samples():
    sample = EvaluationSample(10, 200, 7)
    assert EvaluationSample.of_name(sample.name) == sample
    for name in ("", "even", "evaluation first=5 queries=200 seed=0", sample.name + " "):
        assert EvaluationSample.of_name(name) is None
    other = dataclasses.replace(sample, seed=8)
    verdicts = [verdict(sample, 0, 1), verdict(other, 0, 2)]
    assert find_sample(verdicts[:1]) == sample
    assert find_sample(verdicts, other.name) == other
    with pytest.raises(UserError, match="of several samples; name one by --sample"):
        find_sample(verdicts)
    with pytest.raises(UserError, match="not among those that were judged"):
        find_sample(verdicts, "evaluation first=1 queries=2 seed=3")
    with pytest.raises(UserError, match="no verdict is of a sample for evaluation"):
        find_sample([dataclasses.replace(verdicts[0], sample="even")])


CONFIG = """
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(data__synthetic__images=9, global_batch_size=8).lock()
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "sqlite"])
def test_evaluate_with_verdicts(tmp_path, capsys, kind):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(CONFIG)
    config = f"--config={tmp_path / 'configs' / 'tiny.py'}"
    loaded = configuration.load_config(config.partition("=")[2], [])
    split = load_evaluation_split(loaded, "val")
    rng = np.random.default_rng(0)
    embedded = EmbeddedSplit(
        unit_rows(rng, len(split.image_id), 4), unit_rows(rng, len(split.captions), 4),
        split.caption_image, split.image_id, split.caption_id, dataset=split,
    )  # fmt: skip
    write_embeddings(tmp_path / "theirs", embedded)
    sample = EvaluationSample(1, 6, 0)
    pairs = pool([first_results(sample, embedded)], split.caption_image, 0)
    verdicts = [
        Verdict("val", int(split.image_id[i]), int(split.caption_id[c]), "", split.captions[c],
                "no_match", "anna", sample=sample.name)
        for c, i in pairs.rows()
    ]  # fmt: skip
    path = tmp_path / f"verdicts.{kind}"

    def write(verdicts):
        if kind == "sqlite":
            with VerdictStore(path) as store:
                store.import_verdicts(verdicts)
        else:
            write_verdicts(path, verdicts)

    ours = [f"--embeddings={tmp_path / 'theirs'}", f"--verdicts={path}"]
    with pytest.raises(UserError, match="is not a file"):
        evaluate.main([*ours, config, "--split=val"])
    write(verdicts[1:])
    out = tmp_path / "out.json"
    with pytest.raises(UserError, match=rf"{path.name}: 1 of this system's first results"):
        evaluate.main([*ours, config, "--split=val", f"--out={out}"])
    assert not out.exists()
    write(verdicts)
    page = tmp_path / "page.html"
    evaluate.main([*ours, config, "--split=val", f"--out={out}", f"--report={page}"])
    told = capsys.readouterr().out
    assert "by verdicts" in told and f"verdicts of people: anna {len(verdicts)}" in told
    report = json.loads(out.read_text())
    expected = measure_judged(sample, embedded, verdicts)
    assert report["metrics"]["judged_t2i_r1"] == dataclasses.asdict(expected["judged_t2i_r1"])
    assert report["verdicts"] == {
        "sample": sample.name,
        "number": len(verdicts),
        "reviewers": [{"reviewer": "anna", "instructions": "", "verdicts": len(verdicts)}],
    }
    assert "By verdicts on the first results" in page.read_text()
    with pytest.raises(UserError, match=r"takes the --config"):
        evaluate.main(ours)
    with pytest.raises(UserError, match="--sample goes with --verdicts"):
        evaluate.main([ours[0], "--sample=x"])
