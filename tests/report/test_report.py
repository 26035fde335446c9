"""The report of a run: its figures and examples are right, its page is safe and complete."""

import dataclasses
import datetime
import logging
import resource
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fne_jax import evaluate
from fne_jax.evaluation import top_k as top_k_lib
from fne_jax.evaluation.results import chance_levels
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    false_negative_posterior,
)
from fne_jax.report import example_cards, figures, run_report
from fne_jax.training.metric_log import MetricLog, read_metrics
from tests.support.embeddings import statistics, unit_rows
from tests.support.pages import HOSTILE, Page, assert_safe_and_complete, hostile_split
from tests.support.tiny import tiny_config


# Some anchors fall back in the first case; in the second all candidates of some are eliminated.
@pytest.mark.parametrize(("dim", "positive"), [(6, (0.3, 0.2)), (2, (0.2, 0.5))])
def test_choices_against_a_plain_version(dim, positive):
    rng = np.random.default_rng(1)
    anchors, captions, owner = unit_rows(rng, 5, dim), unit_rows(rng, 9, dim), np.arange(9) % 5
    settings = {"fne__prior": 0.1, "fne__posterior_threshold": 0.1}
    config = tiny_config(fne__elimination="hard", **settings)
    stats = statistics(positive=positive, negative=(0.1, 0.2))
    split = EmbeddedSplit(
        anchors, captions, owner, np.arange(5), np.arange(9), config=config, stats=stats
    )
    match, hardest, chosen, sampled, found = example_cards.choose_negatives(
        split, "i2t", np.arange(5), np.arange(5)
    )
    similarity = anchors @ captions.T
    posterior = np.asarray(false_negative_posterior(similarity, stats, 0.1))
    for row in range(5):
        others = [key for key in range(9) if owner[key] != row]
        assert hardest.caption[row] == max(others, key=lambda key: similarity[row, key])
        eligible = [key for key in others if posterior[row, key] <= config.fne.posterior_threshold]
        assert found[row] == bool(eligible)
        if not eligible:
            continue
        key = chosen.caption[row]
        above = [key for key in eligible if similarity[row, key] > positive[0] - 0.2]
        assert sampled[row] == bool(above)
        best = max(eligible, key=lambda key: similarity[row, key])
        assert key in (above or [best]) and chosen.image[row] == row
        shown = false_negative_posterior(similarity[row, key], stats, 0.1, monotone=True)
        assert chosen.probability[row] == pytest.approx(float(shown), abs=1e-5)
        assert chosen.similarity[row] == pytest.approx(similarity[row, key], abs=1e-5)
    np.testing.assert_allclose(match.similarity, np.diagonal(similarity), atol=1e-5)
    assert set(sampled) == {True, False} and all(found) == (dim == 6)


def test_outcomes_against_a_plain_version(monkeypatch):
    monkeypatch.setattr(top_k_lib, "BLOCK_ROWS", 4)
    rng = np.random.default_rng(2)
    images, captions, owner = unit_rows(rng, 5, 3), unit_rows(rng, 11, 3), np.arange(11) % 5
    images[4] = images[0]  # a tie counts against the query
    split = EmbeddedSplit(images, captions, owner, np.arange(5), np.arange(11))
    own = owner == np.arange(5)[:, None]
    found = example_cards.query_outcomes(split)
    for way, similarity, is_own in (
        ("i2t", images @ captions.T, own),
        ("t2i", captions @ images.T, own.T),
    ):
        match, rival, rank = found[way]
        items = (match.caption, rival.caption) if way == "i2t" else (match.image, rival.image)
        assert len(match) == len(rival) == len(rank) == len(similarity)
        for row, of_row in enumerate(similarity):
            best = of_row[is_own[row]].max()
            highest = of_row[~is_own[row]].max()
            assert match.similarity[row] == pytest.approx(best, abs=1e-6)
            assert of_row[items[0][row]] == pytest.approx(best, abs=1e-6)
            assert is_own[row, items[0][row]] and not is_own[row, items[1][row]]
            assert rival.similarity[row] == pytest.approx(highest, abs=1e-6)
            assert rank[row] == 1 + sum(of_row[~is_own[row]] >= best - 1e-7)
    assert (found["t2i"][2][owner == 4] > 1).all()


def test_metric_tables_show_every_metric_once():
    metrics = {"rsum": 300.0, "i2t_r1": {"value": 41.0, "low": 39.5, "high": 42.25}, "t2i_r1": 20.0}
    metrics |= {"complete_i2t_map_at_r": 11.0, "complete_t2i_map_at_r": 12.0}
    metrics |= {"cxc_t2i_r1": {"value": 7.0, "definition": "against CxC"}}
    labelled, complete, others = run_report.metric_tables(metrics, {"i2t_r1": 1.25})
    assert labelled["columns"] == complete["columns"] == ["image to text", "text to image"]
    (row,) = labelled["rows"]
    assert row["name"] == "R@1" and row["cells"] == [
        {"text": "41.0", "interval": "39.5 to 42.2", "chance": "1.2"},
        {"text": "20.0", "interval": "", "chance": ""},
    ]
    (row,) = complete["rows"]
    assert row["name"] == "mAP@R" and [cell["text"] for cell in row["cells"]] == ["11.0", "12.0"]
    (row,) = others["rows"]
    assert (row["name"], row["meaning"]) == ("cxc_t2i_r1", "against CxC")
    assert row["cells"][0]["text"] == "7.0"


def test_curves_are_those_that_were_logged():
    lines = [
        {"step": 5, "loss": 3.0, "warmup": 1.0},
        {"step": 7, "loss": 2.0, "warmup": 1.0},
        {"step": 8, "eval_i2t_r1": 10.0, "eval_t2i_r1": 10.0},
        {"step": 10, "loss": 1.0, "warmup": 0.0, "sampled_false_negative_rate": 0.25},
        {"step": 15, "loss": 0.5, "warmup": 0.0, "sampled_false_negative_rate": 0.5},
        {"step": 15, "eval_i2t_r1": 10.0, "eval_t2i_r1": 10.0},
    ]
    drawn = figures.learning_curves(lines)
    warmup, after, recall, negatives = drawn
    # One loss does not run into the other.
    for title, points in ((warmup, [(5, 3), (7, 2)]), (after, [(10, 1), (15, 0.5)])):
        (loss,) = drawn[title].axes[0].lines
        np.testing.assert_array_equal(loss.get_xydata(), points)
    assert (warmup, after) == ("Loss of the warm-up", "Loss after the warm-up")
    assert (
        recall == "Validation recall, %" and negatives == "Negatives that are in truth matches, %"
    )
    np.testing.assert_array_equal(
        drawn[negatives].axes[0].lines[0].get_xydata(), [(10, 25), (15, 50)]
    )
    # Where they coincide, the one above is the thinner.
    below, above = drawn[recall].axes[0].lines[:2]
    np.testing.assert_array_equal(below.get_xydata(), above.get_xydata())
    assert below.get_linewidth() > above.get_linewidth()
    # Nothing lies over the lines.
    assert not any(figure.axes[0].get_legend() for figure in drawn.values())


def test_a_value_that_was_logged_once_is_a_dot():
    lines = [{"step": 9, "loss": 1.5, "warmup": 0.0}, {"step": 9, "eval_t2i_r1": 4.0}]
    drawn = figures.learning_curves(lines)
    assert list(drawn) == ["Training loss", "Validation recall, %"]
    (loss,) = drawn["Training loss"].axes[0].lines
    assert loss.get_xydata().tolist() == [[9, 1.5]] and loss.get_marker() == "o"


def test_statistics_figures_show_the_posterior_and_the_weights():
    fne = tiny_config(fne__prior=0.05).fne
    stats = statistics()
    assert figures.statistics_figures(SimilarityStatistics.create(), fne) == {}
    drawn = figures.statistics_figures(stats, fne)
    left, right = drawn["similarity_distributions"].axes
    (posterior,) = right.lines
    similarity = posterior.get_xdata()
    expected = false_negative_posterior(similarity, stats, 0.05)
    np.testing.assert_allclose(posterior.get_ydata(), 100 * expected)
    negative, positive, cut = left.lines
    assert similarity[negative.get_ydata().argmax()] == pytest.approx(0.4, abs=0.01)
    assert similarity[positive.get_ydata().argmax()] == pytest.approx(0.7, abs=0.01)
    assert cut.get_xdata()[0] == pytest.approx(0.7 - fne.margin)
    for line in drawn["sampling_weights"].axes[0].lines:
        weight = line.get_ydata()
        assert (weight[similarity < 0.499] == 0).all() and (weight[similarity > 0.501] > 0).all()


def test_svg_takes_the_colour_and_width_of_its_page():
    drawn = figures.statistics_figures(statistics(), tiny_config().fne)
    svgs = [figures.as_svg(figure, name) for name, figure in drawn.items()]
    pages = [Page(svg) for svg in svgs]
    for svg, page in zip(svgs, pages, strict=True):
        (root,) = page.tags["svg"]
        assert "viewbox" in root and "width" not in root and "height" not in root
        assert "currentColor" in svg and figures._INK not in svg and "#000000" not in svg
        assert "cosine similarity" in " ".join(page.text)
    assert not set(pages[0].ids) & set(pages[1].ids)


def embedded(split, **more):
    """Returns a split as a run embeds it."""
    rng, owner = np.random.default_rng(3), split.caption_image
    rows = unit_rows(rng, len(split.image_id), 4), unit_rows(rng, len(owner), 4)
    stats = statistics(positive=(0.5, 0.2), negative=(0.2, 0.2))
    known = {"split_name": "test", "step": 12, "dataset": split, "config": tiny_config()}
    known |= {"name": "run", "stats": stats}
    return EmbeddedSplit(*rows, owner, split.image_id, split.caption_id, **(known | more))


def page_of(folder, log=(), **what):
    path = folder / "report.html"
    run_report.write_run_report(path, embedded(**what), {"rsum": 123.4}, log=log)
    page = Page(path.read_text())
    assert_safe_and_complete(page)
    return page


def test_the_page_is_safe_and_complete(tmp_path):
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    page = page_of(tmp_path, split=hostile_split(), log=log)
    assert len(page.tags["svg"]) == 3
    shown = " ".join(page.text)
    for caption in HOSTILE:
        assert caption in shown  # as text, unharmed
    assert "1337" not in shown
    for part in (
        "rSum 123.4",
        "FNE's choice",
        "Best and worst",
        "global_batch_size",
        jax.__version__,
    ):
        assert part in shown
    assert any(HOSTILE[1] in image["alt"] for image in page.tags["img"])


def test_the_head_tells_when_what_and_what_chance_would_be(tmp_path):
    page = page_of(tmp_path, split=hostile_split(), config=tiny_config(data__dir="/home/me/pets/"))
    shown = " ".join(page.text)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    chance = chance_levels(embedded(hostile_split()))["rsum"]
    for part in (today, "synthetic (pets)", "7 images, 14 captions", f"would have {chance:.1f}"):
        assert part in shown


def test_a_page_tells_nothing_of_the_machine_s_folders(tmp_path):
    split = hostile_split()
    names = [f"/home/me/pets/{n}.jpg" for n in range(7)]
    split = dataclasses.replace(split, source_image_id=names)
    config = tiny_config(data__dir="/home/me/pets", data__cache_dir="C:\\Users\\me\\cache")
    page = page_of(tmp_path, split=split, config=config)
    text = (tmp_path / "report.html").read_text()
    assert "/home" not in text and "Users" not in text
    assert "…/pets" in page.text and "…/cache" in page.text and "Image …/3.jpg" in page.text


def test_the_page_of_a_run_that_knows_little(tmp_path):
    """One image, no metrics.jsonl, no statistics."""
    page = page_of(tmp_path, split=hostile_split(images=1), stats=SimilarityStatistics.create())
    assert "there is no posterior yet" in " ".join(page.text) and not page.tags["svg"]


def test_the_page_of_anyone_s_embeddings(tmp_path):
    split = hostile_split()
    unknown = {"dataset": None, "config": None, "stats": None, "step": None}
    shown = " ".join(page_of(tmp_path, split=split, **unknown).text)
    assert "rSum 123.4" in shown and "Best and worst" not in shown and "Config" not in shown


def test_nothing_is_suspected_before_the_count_that_the_loss_asks_for(tmp_path):
    config, split = tiny_config(fne__min_count=1000), hostile_split()
    shown = " ".join(page_of(tmp_path, split=split, config=config).text)
    assert "Nothing is suspected before more than 1000" in shown and "FNE's choice" not in shown
    config = tiny_config(fne__min_count=999)
    assert "FNE's choice" in " ".join(page_of(tmp_path, split=split, config=config).text)


def test_a_dissimilar_pair_is_no_suspect():
    """The authors' formula turns round below both means, where nothing is ever sampled."""
    stats = statistics(positive=(0.3, 0.15), negative=(0.25, 0.05))
    assert false_negative_posterior(-0.08, stats, 0.01) > 0.999
    rest = np.sqrt(1 - 0.08**2 - 0.5**2)
    captions = np.array([[-0.08, 0.5, rest, 0], [0.5, -0.08, 0, rest]], np.float32)
    owner = np.array([1, 0])  # each anchor's other candidate is its own
    split = EmbeddedSplit(
        np.eye(2, 4, dtype=np.float32), captions, owner, np.arange(2), np.arange(2),
        config=tiny_config(fne__prior=0.01), stats=stats,
    )  # fmt: skip
    _, hardest, *_ = example_cards.choose_negatives(split, "i2t", np.arange(2), owner)
    np.testing.assert_allclose(hardest.similarity, -0.08, atol=1e-6)
    assert (hardest.probability < 0.01).all()


def test_without_matplotlib_there_is_a_warning_and_no_page(tmp_path, monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "fne_jax.report.run_report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        evaluate._write_page(tmp_path / "report.html", None, {}, None)
        assert figures.statistics_images(statistics(), tiny_config().fne) == {}
    assert [record.getMessage() for record in caplog.records] == [
        "no report.html: pip install matplotlib",
        "no figures in TensorBoard: pip install matplotlib",
    ]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_tensorboard_and_not_the_log(tmp_path, caplog):
    log = MetricLog(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        for step in (1, 2):
            noise = np.random.default_rng(step).integers(256, size=(1, 99, 99, 3), dtype=np.uint8)
            log.write_images(step, lambda image=noise: {"noise": image})
            log.close()
            log.write(step, {"loss": 0.5 * step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}: TensorBoard's log cannot be written" in told
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5, 1.0]


def test_tensorboard_gets_the_figures(tmp_path, monkeypatch):
    log = MetricLog(tmp_path, 0)
    log.write_images(7, lambda: figures.statistics_images(statistics(), tiny_config().fne))
    log.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    names = {"statistics/similarity_distributions", "statistics/sampling_weights"}
    assert set(events.Tags()["tensors"]) == names
    assert [event.step for event in events.Tensors("statistics/sampling_weights")] == [7]

    monkeypatch.setitem(sys.modules, "clu", None)
    MetricLog(tmp_path, 0).write_images(8, lambda: pytest.fail("drawn for nobody"))
