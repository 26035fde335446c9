"""The protocols against the package of ECCV Caption's authors, and against plain definitions."""

import sys

import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.evaluation import coco_protocols, protocols
from fne_jax.evaluation.metrics import complete_metrics, retrieval_metrics
from fne_jax.evaluation.results import format_table
from fne_jax.evaluation.top_k import top_k
from fne_jax.model.embedded_split import EmbeddedSplit

DIM = 8


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made_up(owner, image_id, caption_id, seed=0):
    """Returns embeddings of captions that resemble their images'."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(len(image_id), DIM))
    text = image[owner] + 0.4 * rng.normal(size=(len(owner), DIM))
    return EmbeddedSplit(unit(image), unit(text), owner, image_id, caption_id)


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("eccv_caption")
    return coco_protocols._package()


@pytest.fixture(scope="module")
def coco(package):
    """COCO's test split in its order, with six captions of one image."""
    caption_id = np.append(package.coco_ids, 10**7)
    owners = [package.coco_gts["t2i"][number][0] for number in package.coco_ids.tolist()]
    image_id = np.array(list(dict.fromkeys(owners)))
    row = {number: index for index, number in enumerate(image_id.tolist())}
    owner = np.array([row[number] for number in owners] + [17])
    return made_up(owner, image_id, caption_id)


@pytest.fixture(scope="module")
def measured(coco):
    return protocols.measure(coco, "all")


@pytest.mark.slow
def test_eccv_and_cxc_are_the_packages(coco, package, measured):
    coco = coco.part(np.arange(5000), np.arange(25000))
    i2t, _ = top_k(coco.image_emb, coco.text_emb, 50)
    t2i, _ = top_k(coco.text_emb, coco.image_emb, 50)
    theirs = package.compute_all_metrics(
        dict(zip(coco.image_id.tolist(), coco.caption_id[i2t].tolist(), strict=True)),
        dict(zip(coco.caption_id.tolist(), coco.image_id[t2i].tolist(), strict=True)),
        target_metrics=("eccv_r1", "eccv_map_at_r", "eccv_rprecision", "cxc_recalls"),
    )
    names = {"eccv_rprecision": "r_precision", "eccv_map_at_r": "map_at_r"}
    assert len(theirs) == 6
    for name, scores in theirs.items():
        protocol = name.split("_")[0]
        key = names.get(name, name.removeprefix(f"{protocol}_"))
        for direction, value in scores.items():
            ours = measured[0][f"{protocol}_{direction}_{key}"]
            assert ours.value == pytest.approx(100 * value, rel=1e-9), (name, direction)


def test_each_value_says_what_it_is_of_how_many(measured):
    measured, left_out = measured
    assert left_out == {}
    queries = {
        name: (one.queries, one.candidates)
        for name, one in measured.items()
        if name.endswith(("_r1", "rsum"))
    }
    assert queries == {
        "i2t_r1": (5000, 25001),
        "t2i_r1": (25001, 5000),
        "rsum": ([5000, 25001], [25001, 5000]),
        "coco_1k_i2t_r1": (5000, 5001),
        "coco_1k_t2i_r1": (25001, 1000),
        "coco_1k_rsum": ([5000, 25001], [5001, 1000]),
        "eccv_i2t_r1": (1261, 25000),
        "eccv_t2i_r1": (1332, 5000),
        "cxc_i2t_r1": (5000, 25000),
        "cxc_t2i_r1": (24972, 5000),
    }
    assert all(one.low <= one.value <= one.high for one in measured.values())
    assert "mean over five folds" in measured["coco_1k_t2i_medr"].definition
    assert "any image of ECCV Caption" in measured["eccv_t2i_r_precision"].definition
    assert measured["i2t_r5"].definition == (
        "image queries, the captions of all of the split ranked by cosine similarity, ties last: "
        "percentage of queries with its own caption among the first 5"
    )
    table = format_table(measured)
    assert f"rSum {measured['rsum'].value:.1f}" in table
    assert all(title in table for title in ("COCO 1K, mean of 5 folds", "ECCV Caption", "CxC"))


def test_coco_1k_is_the_mean_of_five_thousands_in_order(coco, measured):
    folds = []
    for start in range(0, 5000, 1000):
        captions = np.flatnonzero(
            (coco.caption_image >= start) & (coco.caption_image < start + 1000)
        )
        folds.append(
            retrieval_metrics(
                coco.image_emb[start : start + 1000],
                coco.text_emb[captions],
                coco.caption_image[captions] - start,
            )
        )
    for name in folds[0]:
        expected = np.mean([fold[name] for fold in folds])
        assert measured[0][f"coco_1k_{name}"].value == pytest.approx(expected)


@pytest.mark.slow
def test_coco_recalls_are_the_packages(coco, package):
    coco = coco.part(np.arange(5000), np.arange(25000))
    i2t = np.argsort(-(coco.image_emb @ coco.text_emb.T), axis=1)
    t2i = np.argsort(-(coco.text_emb @ coco.image_emb.T), axis=1)
    theirs = package.compute_all_metrics(
        dict(zip(coco.image_id.tolist(), coco.caption_id[i2t].tolist(), strict=True)),
        dict(zip(coco.caption_id.tolist(), coco.image_id[t2i].tolist(), strict=True)),
        target_metrics=("coco_5k_recalls", "coco_1k_recalls"),
        Ks=(1, 5),
    )
    for name, scores in theirs.items():
        protocol, key = name[:7], name[8:]
        ours = protocols.measure(coco, protocol)[0]
        prefix = "" if protocol == "coco_5k" else "coco_1k_"
        for direction, value in scores.items():
            assert ours[f"{prefix}{direction}_{key}"].value == pytest.approx(100 * value)


def test_the_order_of_the_split_does_not_matter_to_extended_truths(coco, measured):
    rng = np.random.default_rng(1)
    mixed = coco.part(rng.permutation(5000), rng.permutation(25001))
    ours = protocols.measure(mixed, "eccv")[0]
    for name, one in ours.items():
        assert one.value == pytest.approx(measured[0][name].value), name


def test_other_splits_are_refused_by_name(coco, package, monkeypatch):
    small = made_up(np.arange(12) // 3, np.arange(4), np.arange(12))
    for protocol in ("coco_5k", "coco_1k"):
        with pytest.raises(UserError, match=rf"{protocol} is for COCO's 5,000 .* split has 4"):
            protocols.measure(small, protocol)
        with pytest.raises(UserError, match=protocol):
            protocols.check_suits(protocol, small.image_id, small.caption_id)
    without = coco.part(np.arange(5000), np.arange(3, 25001))
    missing = sorted(coco.caption_id[:3].tolist())
    with pytest.raises(UserError, match=rf"3 of 25000 caption ids .* first \[{missing[0]}, "):
        protocols.check_suits("cxc", without.image_id, without.caption_id)
    twice = np.append(coco.caption_id, coco.caption_id[0])
    with pytest.raises(UserError, match="caption ids of COCO are in this split twice"):
        protocols.check_suits("eccv", coco.image_id, twice)

    measured, left_out = protocols.measure(small, "all")
    assert set(left_out) == {"coco_5k", "coco_1k", "eccv", "cxc"} and "rsum" in measured
    coco_protocols._package.cache_clear()
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(UserError, match=r"needs eccv_caption: pip install -e '\.\[eccv\]'"):
        protocols.measure(small, "eccv")


def test_the_whole_split_has_the_metrics_of_training():
    rng = np.random.default_rng(2)
    owner = rng.permutation(np.append(np.arange(9), rng.integers(0, 9, 20)))
    truth = rng.random((9, 29)) < 0.2
    truth[owner, np.arange(29)] = True
    split = made_up(owner, np.arange(9), np.arange(29))
    split = EmbeddedSplit(**(vars(split) | {"truth": truth}))
    measured, _ = protocols.measure(split, "flickr30k")
    expected = retrieval_metrics(split.image_emb, split.text_emb, owner)
    expected |= complete_metrics(split.image_emb, split.text_emb, truth)
    assert {name: one.value for name, one in measured.items()} == pytest.approx(expected)
    table = format_table(measured)
    assert "against the complete truth" in table and "mAP@R" in table
    kept = split.part(np.arange(9), np.arange(29)[::-1])
    assert protocols.measure(kept, "flickr30k")[0]["rsum"].value == measured["rsum"].value
