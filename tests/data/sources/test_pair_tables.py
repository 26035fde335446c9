"""Tables of pairs: splits by name, and mistakes in them."""

import pytest

from fne_jax.data.sources import pair_tables
from fne_jax.errors import UserError
from tests.support import sources


def test_a_table_without_splits_is_parted_by_name(tmp_path):
    names = [f"images/{n}.jpg" for n in range(4000)]
    splits = [pair_tables.split_of_name(name) for name in names]
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert abs(splits.count(split) / 4000 - share) < 0.012
    # Their SHA-256 begin with 0x5c, 0x0b and 0x14; a twentieth of 256 is 12.8, a tenth 25.6.
    assert [splits[n] for n in (0, 6, 68)] == ["train", "val", "test"]
    rows = [{"image": name, "caption": "words"} for name in names[:300]]
    sources.write_csv(tmp_path, rows, ("image", "caption"))
    listing = pair_tables.read_listing(str(tmp_path), "csv")
    for split, images in listing.splits.items():
        assert [i.source_id for i in images] == [
            n for n, s in zip(names[:300], splits, strict=False) if s == split
        ]
    sources.write_csv(tmp_path, rows[:3], ("image", "caption"))
    with pytest.raises(UserError, match=r"no image of the split .*; add a column 'split'"):
        pair_tables.read_listing(str(tmp_path), "csv")


def replaced(rows, index, **fields):
    return [row | fields if n == index else row for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: replaced(rows, 1, split="training"), r"line 3: split is 'training'"),
        (lambda rows: replaced(rows, 1, split=""), r"line 3: the split is missing"),
        (lambda rows: replaced(rows, -1 + len(rows), split="train"), "but 'test' in .*: line"),
        (lambda rows: replaced(rows, 0, image_id="image1.jpg"), "image_id"),
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
        pair_tables.read_listing(str(tmp_path), "csv")


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
        pair_tables.read_listing(str(tmp_path / f"pairs.{kind}"), kind)


def test_a_folder_must_hold_one_table(tmp_path):
    with pytest.raises(UserError, match=r"expected one \*.csv.*found none"):
        pair_tables.read_listing(str(tmp_path), "csv")
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(UserError, match=r"found a\.csv, b\.csv"):
        pair_tables.read_listing(str(tmp_path), "csv")
