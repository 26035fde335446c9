"""Every layout of captioned pictures: read, prepared, trained on, and its mistakes named."""

import json

import numpy as np
import pytest

from fne_jax.data.pairs import load_split, with_captions_per_image
from fne_jax.data.sources import listing, pair_tables
from fne_jax.errors import UserError
from fne_jax.training.loop import train_and_evaluate
from tests.support import sources
from tests.support.tiny import tiny_config


def config_of(source, folder, cache, **fields):
    return tiny_config(
        data__source=source,
        data__dir=str(folder),
        data__cache_dir=str(cache),
        global_batch_size=8,
        evaluation__batch_size=8,
        **fields,
    )


def write(source, folder):
    if source == "coco":
        return sources.write_coco(folder)
    if source == "json_lists":
        return sources.write_json_lists(folder)
    rows = sources.table_rows(folder)
    if source == "csv":
        sources.write_csv(folder, rows)
    else:
        sources.write_jsonl(folder, rows)
    return rows


@pytest.fixture(scope="module", params=["coco", "json_lists", "csv", "jsonl"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    content = write(request.param, folder / "source")
    config = config_of(request.param, folder / "source", folder / "cache")
    return content, config, {s: load_split(config.data, 8, s) for s in listing.SPLITS}


def test_images_and_captions_of_each_layout(prepared):
    _, config, splits = prepared
    number = 0
    for split, dataset in splits.items():
        count = sources.SPLITS[split]
        assert len(dataset.image_id) == len(dataset.images) == count
        assert len(dataset.captions) == len(dataset.caption_id) == len(dataset.caption_image)
        expected = {
            f"Picture {number + i}, seen {n} times.": i
            for i in range(count)
            for n in range(2 + (number + i) % 3)
        }
        assert dict(zip(dataset.captions, dataset.caption_image, strict=True)) == expected
        for i, name in ((0, f"picture{number}.jpg"), (count - 1, f"picture{number + count - 1}")):
            assert dataset.images[i]["image"] == sources.jpeg(
                number + i, width=30 + (number + i) % 11
            )
            if config.data.source != "coco":
                assert name in dataset.source_image_id[i]
        number += count
    for ids in ("image_id", "caption_id"):
        everywhere = np.concatenate([getattr(dataset, ids) for dataset in splits.values()])
        assert len(set(everywhere.tolist())) == len(everywhere)


def test_a_few_steps_of_training(prepared, tmp_path):
    _, config, _ = prepared
    run = config.copy_and_resolve_references()
    run.num_epochs = 4 * 8 / 70
    train_and_evaluate(run, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert max(losses) == 4 and np.isfinite(list(losses.values())).all()
    assert np.isfinite([line["eval_rsum"] for line in lines if "eval_rsum" in line]).all()


def test_coco_keeps_its_own_ids(tmp_path):
    entries = sources.write_coco(tmp_path / "source")
    config = config_of("coco", tmp_path / "source", tmp_path / "cache")
    for split in listing.SPLITS:
        dataset = load_split(config.data, 8, split)
        of_split = [e for e in entries if listing.SPLIT_OF[e["split"]] == split]
        assert dataset.image_id.tolist() == [e["cocoid"] for e in of_split]
        assert dataset.source_image_id == [str(e["cocoid"]) for e in of_split]
        sentences = [s for e in of_split for s in e["sentences"]]
        assert dataset.caption_id.tolist() == [s["sentid"] for s in sentences]
        assert dataset.captions == [s["raw"] for s in sentences]


def test_captions_per_image(prepared):
    _, _, splits = prepared
    test = splits["test"]
    assert with_captions_per_image(test, 0) is test
    two = with_captions_per_image(test, 2)
    assert np.bincount(two.caption_image).tolist() == [2] * 6
    three = with_captions_per_image(test, 3)
    # Pictures 29 to 34 have 4, 2, 3, 4, 2, 3 captions.
    assert np.bincount(test.caption_image).tolist() == [4, 2, 3, 4, 2, 3]
    assert np.bincount(three.caption_image).tolist() == [3, 2, 3, 3, 2, 3]
    kept = [test.captions.index(caption) for caption in three.captions]
    assert kept == sorted(kept)
    np.testing.assert_array_equal(three.caption_id, test.caption_id[kept])
    owners = test.caption_image.tolist()
    firsts = [[c for c, o in zip(test.captions, owners, strict=True) if o == i] for i in range(6)]
    assert set(two.captions) == {caption for captions in firsts for caption in captions[:2]}


def test_captions_per_image_keeps_the_truth_in_step(tmp_path):
    config = config_of(
        "shapes", "", tmp_path, data__shapes__train_images=2, data__shapes__val_images=2,
        data__shapes__test_images=7,
    )  # fmt: skip
    test = load_split(config.data, 8, "test")
    some = with_captions_per_image(test, 2)
    assert some.captions == [c for n, c in enumerate(test.captions) if n % 5 < 2]
    kept = np.arange(35) % 5 < 2
    np.testing.assert_array_equal(some.truth.matrix(), test.truth.matrix()[:, kept])


def test_a_table_without_splits_is_parted_by_name(tmp_path):
    names = [f"images/{n}.jpg" for n in range(4000)]
    splits = [pair_tables.split_of_name(name) for name in names]
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert abs(splits.count(split) / 4000 - share) < 0.012
    # Their SHA-256 begin with 0x5c, 0x0b and 0x14; a twentieth of 256 is 12.8, a tenth 25.6.
    assert [splits[n] for n in (0, 6, 68)] == ["train", "val", "test"]
    rows = [{"image": name, "caption": "words"} for name in names[:300]]
    (tmp_path / "a").mkdir()
    sources.write_csv(tmp_path / "a", rows, ("image", "caption"))
    source = pair_tables.pair_table_source(str(tmp_path / "a"), "csv")
    for split, images in source.splits.items():
        assert [i.source_id for i in images] == [
            n for n, s in zip(names[:300], splits, strict=False) if s == split
        ]
    sources.write_csv(tmp_path / "a", rows[:3], ("image", "caption"))
    with pytest.raises(UserError, match=r"no image of the split .*; add a column 'split'"):
        pair_tables.pair_table_source(str(tmp_path / "a"), "csv")


def replaced(rows, index, **fields):
    return [row | fields if n == index else row for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: replaced(rows, 1, split="training"), r"line 3: split is 'training'"),
        (lambda rows: replaced(rows, 1, split=""), r"line 3: the split is missing"),
        (lambda rows: replaced(rows, -1 + len(rows), split="train"), "but 'test' in .*: line"),
        (lambda rows: replaced(rows, 0, image_id="picture1.jpg"), "image_id"),
        (lambda rows: replaced(rows, 1, image=""), r"line 3: 'image' is None"),
        (
            lambda rows: [row for row in rows if row["split"] != "val"],
            "no image of the split 'val'",
        ),
    ],
)
def test_mistakes_in_tables(tmp_path, change, message):
    sources.write_csv(tmp_path, change(sources.table_rows(tmp_path)))
    with pytest.raises(UserError, match=message):
        pair_tables.pair_table_source(str(tmp_path), "csv")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("csv", b"picture,text\na,b\n", "the column 'image' is missing"),
        ("csv", b"image,caption\na.jpg,one, two\n", "line 2: more fields than columns"),
        ("csv", b'image,caption\na.jpg,"one\n', "not a CSV file"),
        ("csv", b"", "the column 'image' is missing"),
        ("csv", b"\xff\xfe\x00", "not text in UTF-8"),
        ("jsonl", b'{"image": "a.jpg", "caption": "b"}\n{"image": \n', "line 2: not JSON"),
        ("jsonl", b'{"image": "a.jpg"}\n', "line 1: the key 'caption' is missing"),
        ("jsonl", b"[1]\n", "line 1: the key 'image' is missing"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, kind, text, message):
    (tmp_path / f"pairs.{kind}").write_bytes(text)
    with pytest.raises(UserError, match=message):
        pair_tables.pair_table_source(str(tmp_path / f"pairs.{kind}"), kind)


def test_tables_and_lists_that_are_not_there(tmp_path):
    for source, expected in (("csv", r"expected one \*.csv"), ("json_lists", r"\*train\*.json")):
        config = config_of(source, tmp_path, tmp_path / "cache")
        with pytest.raises(UserError, match=f"{expected}.*found none"):
            load_split(config.data, 8, "train")
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(UserError, match=r"found a\.csv, b\.csv"):
        pair_tables.pair_table_source(str(tmp_path), "csv")


@pytest.mark.parametrize("source", ["flickr8k", "flickr30k", "coco"])
def test_a_missing_download_says_what_to_put_where(tmp_path, source):
    config = config_of(source, tmp_path, tmp_path / "cache")
    with pytest.raises(UserError) as error:
        load_split(config.data, 8, "train")
    for part in (str(tmp_path), f"dataset_{source}.json", "caption_datasets.zip", "https://",
                 "images/"):  # fmt: skip
        assert part in str(error.value)


def test_a_missing_folder_of_pictures_says_what_to_put_where(tmp_path):
    sources.write_coco(tmp_path)
    (tmp_path / "images" / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"images/val2014 is not there.*by hand.*val2014\.zip"):
        load_split(config_of("coco", tmp_path, tmp_path / "cache").data, 8, "train")


def test_an_unknown_source_lists_the_choices(tmp_path):
    config = config_of("karpaty", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"'karpaty'; expected one of karpathy, .*jsonl"):
        load_split(config.data, 8, "train")


def edited_coco(folder, edit):
    entries = sources.write_coco(folder)
    edit(entries)
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    return config_of("coco", folder, folder / "cache")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("cocoid", 391_000, r"images\[2\]: the image id 391000 is also that of .*images\[0\]"),
        ("cocoid", 2**31, r"images\[2\]: the image id is 2147483648"),
        ("cocoid", "x", r"images\[2\]: the image id is 'x'"),
        ("filename", 5, r"images\[2\]: 'filename' is 5"),
        (
            "sentences",
            [{"raw": "words", "sentid": "x"}],
            r"images\[2\]: the id of a caption is 'x'",
        ),
    ],
)
def test_mistakes_in_karpathy_files(tmp_path, field, value, message):
    config = edited_coco(tmp_path, lambda entries: entries[2].update({field: value}))
    with pytest.raises(UserError, match=message):
        load_split(config.data, 8, "train")


def test_an_image_in_two_of_the_authors_lists(tmp_path):
    lists = sources.write_json_lists(tmp_path)
    lists["test"].append(lists["val"][0])
    (tmp_path / "flickr_test.json").write_text(json.dumps(lists["test"]))
    config = config_of("json_lists", tmp_path, tmp_path / "cache")
    with pytest.raises(UserError, match=r"flickr_test.json: \[6\]: split of 'picture24.jpg'"):
        load_split(config.data, 8, "train")
    (tmp_path / "flickr_test.json").write_text('{"image": 1}')
    with pytest.raises(UserError, match="expected a list of objects"):
        load_split(config.data, 8, "train")
