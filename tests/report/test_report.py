"""The report of a run: its figures and examples are right, its page is safe and complete."""

import dataclasses
import logging
import sys

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fne_jax import evaluate, figures
from fne_jax.model.model import Model
from fne_jax.objectives.fne_settings import FNESettings
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    false_negative_posterior,
)
from fne_jax.report import examples, run_report
from fne_jax.retrieval import blocks
from fne_jax.training.metric_log import MetricLog
from tests.support.embeddings import statistics, unit_rows
from tests.support.pages import HOSTILE, Page, assert_safe_and_complete, hostile_split
from tests.support.tiny import tiny_config


def test_choices_against_a_plain_version():
    rng = np.random.default_rng(1)
    anchors, gallery = unit_rows(rng, 5, 6), unit_rows(rng, 9, 6)
    same = np.arange(5)[:, None] == np.arange(9)[None, :] % 5
    settings = FNESettings.from_config(tiny_config(fne__elimination="hard", fne__prior=0.1).fne)
    stats = statistics(positive=(0.3, 0.2), negative=(0.1, 0.2))
    choices = examples.choose_negatives(
        jax.random.key(0), anchors, gallery[:5], gallery, same, stats, settings
    )
    similarity = anchors @ gallery.T
    posterior = np.asarray(false_negative_posterior(similarity, stats, 0.1))
    for row in range(5):
        others = [key for key in range(9) if not same[row, key]]
        hardest = max(others, key=lambda key: similarity[row, key])
        assert choices.hardest.index[row] == hardest
        eligible = [
            key
            for key in others
            if posterior[row, key] <= settings.posterior_threshold
            and similarity[row, key] > 0.3 - settings.margin
        ]
        assert choices.sampled[row] == bool(eligible)
        assert choices.chosen.index[row] in (eligible or [hardest])
        chosen = choices.chosen.index[row]
        assert choices.chosen.posterior[row] == pytest.approx(posterior[row, chosen], abs=1e-5)
        assert choices.chosen.similarity[row] == pytest.approx(similarity[row, chosen], abs=1e-5)
    np.testing.assert_allclose(choices.positive_similarity, np.diagonal(similarity), atol=1e-5)


def test_outcomes_against_a_plain_version(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 4)
    rng = np.random.default_rng(2)
    queries, items = unit_rows(rng, 11, 3), unit_rows(rng, 6, 3)
    items[5] = items[0]  # a tie counts against the query
    query_label, item_label = np.arange(11) % 3, np.arange(6) % 3
    of = examples.query_outcomes(queries, items, query_label, item_label)
    similarity = queries @ items.T
    for row in range(11):
        own = [i for i in range(6) if item_label[i] == query_label[row]]
        others = [i for i in range(6) if i not in own]
        best = max(similarity[row, own])
        assert of.match_similarity[row] == pytest.approx(best, abs=1e-6)
        assert of.rival_similarity[row] == pytest.approx(max(similarity[row, others]), abs=1e-6)
        assert of.rank[row] == 1 + sum(similarity[row, i] >= best - 1e-7 for i in others)
    lead = of.match_similarity - of.rival_similarity
    best, worst = of.best_and_worst(2)
    assert set(best) == set(np.argsort(lead)[-2:]) and worst[0] == lead.argmin()


def test_metric_tables_show_every_metric_once():
    metrics = {"rsum": 300.0, "i2t_r1": {"value": 41.0, "low": 39.5, "high": 42.25}, "t2i_r1": 20.0}
    metrics |= {"complete_i2t_map_at_r": 11.0, "complete_t2i_map_at_r": 12.0}
    metrics |= {"cxc_t2i_r1": {"value": 7.0, "definition": "against CxC"}}
    standard, complete, further = run_report.metric_tables(metrics)
    assert standard["rows"][0]["name"] == "R@1"
    assert standard["rows"][0]["values"] == ["41.0 (39.5 to 42.2)", "20.0"]
    assert [row["name"] for row in complete["rows"]] == ["mAP@R"]
    assert further["rows"] == [
        {"name": "cxc_t2i_r1", "meaning": "against CxC", "values": ["7.0"]}
    ]  # fmt: skip


def test_curves_are_those_that_were_logged():
    lines = [
        {"step": 5, "loss": 2.0},
        {"step": 8, "eval_i2t_r1": 10.0},
        {"step": 10, "loss": 1.0, "hinge_active": 0.5},
    ]
    drawn = figures.learning_curves(lines)
    assert list(drawn) == ["Training loss", "Validation recall, %"]
    loss, after_warmup = drawn["Training loss"].axes[0].lines
    np.testing.assert_array_equal(loss.get_xydata(), [(5, 2), (10, 1)])
    assert list(after_warmup.get_xdata()) == [10, 10]


def test_statistics_figures_show_the_posterior_and_the_weights():
    fne = tiny_config(fne__prior=0.05).fne
    stats = statistics()
    assert figures.statistics_figures(SimilarityStatistics.create(), fne) == {}
    drawn = figures.statistics_figures(stats, fne)
    left, right = drawn["similarity_distributions"].axes
    (posterior,) = right.lines
    similarity = posterior.get_xdata()
    expected = false_negative_posterior(similarity, stats, 0.05)
    np.testing.assert_allclose(posterior.get_ydata(), expected)
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


@pytest.fixture
def evaluated():
    config = tiny_config()
    stats = statistics(positive=(0.5, 0.2), negative=(0.2, 0.2))
    return Model(config, None, None, None, None, step=12, stats=stats)


def embeddings(split):
    rng = np.random.default_rng(3)
    return unit_rows(rng, len(split.image_id), 4), unit_rows(rng, len(split.captions), 4)


def test_the_page_is_safe_and_complete(tmp_path, evaluated):
    split = hostile_split()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    path = run_report.write_run_report(
        tmp_path, evaluated, split, *embeddings(split), {"rsum": 123.4}, "test"
    )
    text = path.read_text()
    page = Page(text)
    assert_safe_and_complete(page)
    assert len(page.tags["svg"]) == 3
    shown = " ".join(page.text)
    for caption in HOSTILE:
        assert caption in shown  # as text, unharmed
    assert "1337" not in text
    for part in (
        "rSum 123.4",
        "FNE's choice",
        "Best and worst",
        "global_batch_size",
        jax.__version__,
    ):
        assert part in shown
    assert any(HOSTILE[1] in image["alt"] for image in page.tags["img"])


def test_the_page_of_a_run_that_knows_little(tmp_path, evaluated):
    """One image, no metrics.jsonl, no statistics."""
    split = hostile_split(images=1)
    evaluated = dataclasses.replace(evaluated, stats=SimilarityStatistics.create())
    path = run_report.write_run_report(tmp_path, evaluated, split, *embeddings(split), {}, "val")
    page = Page(path.read_text())
    assert_safe_and_complete(page)
    assert "there is no posterior yet" in " ".join(page.text) and not page.tags["svg"]


def test_without_matplotlib_there_is_a_warning_and_no_page(
    tmp_path, evaluated, monkeypatch, caplog
):
    monkeypatch.delitem(sys.modules, "fne_jax.report.run_report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    split = hostile_split()
    with caplog.at_level(logging.WARNING):
        evaluate._write_page(tmp_path, evaluated, split, embeddings(split), {}, "test")
        assert figures.statistics_images(statistics(), evaluated.config.fne) == {}
    assert [record.getMessage() for record in caplog.records] == [
        "no report.html: pip install matplotlib",
        "no figures in TensorBoard: pip install matplotlib",
    ]
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_figures(tmp_path, monkeypatch):
    log = MetricLog(tmp_path, 0)
    log.write_images(7, lambda: figures.statistics_images(statistics(), tiny_config().fne))
    log.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    names = {"statistics/similarity_distributions", "statistics/sampling_weights"}
    assert set(events.Tags()["tensors"]) == names
    assert [event.step for event in events.Tensors("statistics/sampling_weights")] == [7]

    monkeypatch.setitem(sys.modules, "clu", None)
    MetricLog(tmp_path, 0).write_images(8, lambda: pytest.fail("drawn for nobody"))
