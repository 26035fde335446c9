"""Tables of pairs: splits by name, and mistakes in them."""

import csv
import io

import pytest

from fne_jax.data.pairs import SPLITS
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
    rows = [{"image": name, "caption": "words"} for name in names[:1000]]
    sources.write_csv(tmp_path, rows, ("image", "caption"))
    listing = pair_tables.read_listing(str(tmp_path), "csv")
    for split in SPLITS:
        assert [i.source_id for i in listing.images if i.split == split] == [
            n for n, s in zip(names[:1000], splits, strict=False) if s == split
        ]
    # In a small table val and test have no less than 20 images, or a fifth of all.
    for count, least in ((30, 6), (60, 12), (250, 20)):
        sources.write_csv(tmp_path, rows[:count], ("image", "caption"))
        small = pair_tables.read_listing(str(tmp_path), "csv").images
        found = {image.source_id: image.split for image in small}
        for split in ("val", "test"):
            assert list(found.values()).count(split) == least
        assert all(
            found[n] == "val" for n, s in zip(names[:count], splits, strict=False) if s == "val"
        )
    sources.write_csv(tmp_path, rows[:3], ("image", "caption"))
    with pytest.raises(UserError, match=r"no image of the split .*; add a column 'split'"):
        pair_tables.read_listing(str(tmp_path), "csv")


def test_lists_of_captions_in_cells_are_taken_one_by_one(tmp_path, caplog):
    cells = ["['a dog', \"a cat's\"]", '["a", "b"]', "[a dog]", "['a'\n 'b']", "plain"]
    rows = [
        {"image": f"{n}.jpg", "caption": cell, "split": split}
        for n, (cell, split) in enumerate(zip(cells, [*SPLITS, "train", "train"], strict=True))
    ]
    sources.write_csv(tmp_path, rows, ("image", "caption", "split"))
    images = pair_tables.read_listing(str(tmp_path), "csv").images
    found = {image.source_id: (list(image.captions), list(image.caption_ids)) for image in images}
    assert found["0.jpg"] == (["a dog", "a cat's"], [0, 1])
    assert found["1.jpg"] == (["a", "b"], [2, 3])
    assert [found[f"{n}.jpg"][0] for n in (2, 3, 4)] == [["[a dog]"], ["['a'\n 'b']"], ["plain"]]
    assert "2 cells hold a list of captions, which are taken one by one, such as in" in caplog.text


@pytest.mark.parametrize("absolute", [False, True])
def test_moving_a_table_with_its_images_changes_no_split_and_no_name(tmp_path, absolute):
    found = []
    for place in ("here", "on/another/disk"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        before = f"{folder}/" if absolute else "./"
        rows = [{"image": f"{before}images/{n}.jpg", "caption": "words"} for n in range(99)]
        sources.write_csv(folder, rows, ("image", "caption"))
        images = pair_tables.read_listing(str(folder), "csv").images
        found.append([(image.split, image.source_id, image.image_id) for image in images])
    assert found[0] == found[1] and found[0][0][1] == "images/2.jpg"


def test_an_image_id_is_the_table_s_own(tmp_path):
    rows = sources.table_rows(tmp_path)
    for kind in (str, float):  # 7.0, as pandas writes it
        sources.write_csv(tmp_path, [row | {"image_id": kind(row["image_id"])} for row in rows])
        for image in pair_tables.read_listing(str(tmp_path), "csv").images:
            assert image.source_id == f"images/image{90 - image.image_id}.jpg"


def replaced(rows, index, **fields):
    return [row | fields if n == index else row for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: replaced(rows, 1, split="training"), r"line 3: split is 'training'"),
        (lambda rows: replaced(rows, 1, split=""), r"line 3: the split is missing"),
        (lambda rows: replaced(rows, -1 + len(rows), split="train"), "but 'test' in .*: line"),
        (lambda rows: replaced(rows, 0, image_id=89), "the image_id 90 is also|89 is also"),
        (lambda rows: replaced(rows, 1, image_id=""), "line 3: the image_id is missing, which oth"),
        (lambda rows: replaced(rows, 1, image_id="a.jpg"), "image_id is 'a.jpg'; expected a whole"),
        (lambda rows: replaced(rows, 1, image_id="nan"), "line 3: image_id is 'nan', .* no value;"),
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
        (
            "csv",
            b"image,caption\na.jpg,caf\xe9\n",
            "line 2: not text .*0xe9.*iconv -f cp12",
        ),
        ("csv", b"image,caption,Image\n", "the column 'image' appears twice"),
        ("csv", b"image;caption\na.jpg;one; two\n", "line 2: more fields .* with ';' between"),
        ("csv", b"image;words\n", "the column 'caption' is missing; .* and is 'image;words'"),
        ("csv", b"image,caption\n", r"pairs\.csv: it lists no image"),
        (
            "csv",
            b"PK\x03\x04\x80",
            "not a text file, whatever its name says; unpack it, or save it",
        ),
        (
            "csv",
            b"image,caption,image_id\na.jpg,b,1.000\n",
            "image_id is '1.000'; expected a whole",
        ),
        ("csv", b"sep=;\nimage;caption\n", "line 1 is Excel's 'sep=;'; delete that line"),
        ("csv", b"image,caption\na\0.jpg,b\n", "line 2: 'image' is 'a.x00.jpg'"),
        ("jsonl", b'{"image": "\\ud800.jpg", "caption": "b"}', "line 1: 'image' is '.ud800.jpg'"),
        ("jsonl", b'{"image": "a\\u0000", "caption": "b"}', "line 1: 'image' is 'a.x00'"),
        ("jsonl", b'{"image": ["a"], "caption": "b"}', r"line 1: 'image' is \['a'\]"),
        (
            "jsonl",
            b'{"image": "a", "caption": "b", "split": ["train"]}',
            "split is .'train'",
        ),
        ("jsonl", b'{"image": "a", "caption": "b", "split": 7}', "line 1: split is 7"),
        ("jsonl", b'{"image": "a", "caption": "b", "image_id": []}', r"line 1: image_id is \[\]"),
        ("jsonl", b'{"image": "a", "caption": "b", "image_id": NaN}', "image_id is nan, which st"),
        ("jsonl", b'{"image": "a", "caption": "b", "image_id": true}', "line 1: image_id is True"),
        ("jsonl", b'{"image": "a", "caption": "b", "image_id": "\\udcff"}', "line 1: image_id is"),
        ("jsonl", b"[" * 200_000, "line 1: not JSON: maximum recursion"),
        ("jsonl", b'{"image": "a.jpg", "caption": "b"}\n{"image": \n', "line 2: not JSON"),
        ("jsonl", b'{"image": "a.jpg"}\n', "line 1: the key 'caption' is missing"),
        ("jsonl", b"[1]\n", "line 1: expected an object, got '.1.'"),
        # Without quoting, with texts in quotation marks: not one caption of three rows.
        (
            "csv",
            b'image\tcaption\na.jpg\t"a dog\nb.jpg\ta cat\nc.jpg\tit says "\n',
            "line 4: one field holds whole rows, 'a dog",
        ),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, kind, text, message):
    (tmp_path / f"pairs.{kind}").write_bytes(text)
    with pytest.raises(UserError, match=message):
        pair_tables.read_listing(str(tmp_path / f"pairs.{kind}"), kind)


def test_a_folder_must_hold_one_table(tmp_path):
    (tmp_path / "pairs.xlsx").touch()
    message = (
        r"expected one \*.csv or \*.tsv.*found none; pairs.xlsx is there: save it as 'CSV UTF-8'"
    )
    with pytest.raises(UserError, match=message):
        pair_tables.read_listing(str(tmp_path), "csv")
    for name, advice in (("pairs.ods", "save it as"), ("pairs.csv.gz", "unpack it by gunzip")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=rf"{name}: not a text file; {advice}"):
            pair_tables.read_listing(str(tmp_path / name), "csv")
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(UserError, match=r"found a\.csv, b\.csv"):
        pair_tables.read_listing(str(tmp_path), "csv")


def test_a_table_that_cannot_be_opened(tmp_path):
    (tmp_path / "pairs.csv").mkdir()
    with pytest.raises(UserError, match=r"pairs.csv: cannot be read: .*directory"):
        pair_tables.read_listing(str(tmp_path), "csv")


CAPTION = 'Straße,"café"; a\tb'


def exported(delimiter=",", encoding="utf-8", header=("image", "caption", "split"), empty=()):
    """Returns a table as a spreadsheet writes it."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)  # its lines end as on Windows
    rows = [(f"{split}.jpg", CAPTION, split) for split in ("train", "val", "test")]
    writer.writerows([(*row, *empty) for row in (header, *rows)])
    writer.writerows([("", " ", "\xa0", *empty)] * 2 if empty else [])
    return stream.getvalue().encode(encoding)


EXPORTS = {
    "open_clip's columns": exported("\t", header=("filepath", "title", "split")),
    "Hugging Face's columns": exported(header=("file_name", "text", "split")),
    "a validation split": exported().replace(b",val\r", b",validation\r"),
    "semicolons": exported(";"),
    "tabs in UTF-16, Excel's Unicode text": exported("\t", "utf-16"),
    "a byte order mark": exported(encoding="utf-8-sig"),
    "names in other letters": exported(header=("Image", "CAPTION", " Split ")),
    "empty columns and rows": exported(empty=("", "")),
    "spaces": exported().replace(b",", b", ").replace("Straße, ".encode(), "Straße,".encode()),
}


@pytest.mark.parametrize("export", list(EXPORTS))
def test_exports_of_spreadsheets_are_read(tmp_path, export):
    (tmp_path / "pairs.csv").write_bytes(EXPORTS[export])
    images = pair_tables.read_listing(str(tmp_path), "csv").images
    for split, image in zip(SPLITS, images, strict=True):
        assert image.split == split and image.path == tmp_path / f"{split}.jpg"
        assert list(image.captions) == [CAPTION]


def test_tabs_brackets_and_a_test_split_alone(tmp_path):
    folder = tmp_path / "pairs [1]"
    folder.mkdir()
    for name in ("~$pairs.tsv", "._pairs.tsv"):  # Excel's and macOS's own
        (folder / name).touch()
    (folder / "pairs.TSV").write_text("image\tcaption\tsplit\na.jpg\ta dog\ttest\n")
    (image,) = pair_tables.read_listing(str(folder), "csv").images
    assert image.split == "test" and image.path == folder / "a.jpg"


@pytest.mark.parametrize("other", ["./a.jpg", "b/../a.jpg", "{folder}/a.jpg"])
def test_all_spellings_of_a_path_are_one_image(tmp_path, other):
    other = other.format(folder=tmp_path)
    names = ["a.jpg", other, "images/6.jpg", "images/68.jpg", "images/0.jpg", "./images/6.jpg"]
    rows = [{"image": name, "caption": f"words {n}"} for n, name in enumerate(names)]
    if not other.startswith("/"):
        sources.write_csv(tmp_path, rows, ("image", "caption"))
        images = pair_tables.read_listing(str(tmp_path), "csv").images
        assert sorted(image.captions[0] for image in images) == [f"words {n}" for n in (0, 2, 3, 4)]
        (first,) = [image for image in images if image.path.name == "a.jpg"]
        assert first.captions == ["words 0", "words 1"] and first.source_id == "a.jpg"
    rows = [row | {"split": split} for row, split in zip(rows, ["train", "val"] * 3, strict=True)]
    sources.write_csv(tmp_path, rows, ("image", "caption", "split"))
    with pytest.raises(UserError, match=r"line 3: split of .*a.jpg' is 'val', but 'train' in .*2"):
        pair_tables.read_listing(str(tmp_path), "csv")


@pytest.mark.parametrize(
    ("name", "images", "header", "row"),
    [
        ("captions.txt", "Images", "image,caption", "{image},{caption}"),
        (
            "results.csv",
            "flickr30k_images",
            "image_name| comment_number| comment",
            "{image}| 0| {caption}",
        ),
    ],
)
def test_tables_of_kaggle_are_read(tmp_path, name, images, header, row):
    folder = tmp_path / images
    folder.mkdir()
    rows = []
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(b"")
        rows.append(row.format(image=f"{number}.jpg", caption=f"Number {number} ."))
    (tmp_path / name).write_text("\n".join([header, *rows, ""]))
    images = pair_tables.read_listing(str(tmp_path / name), "csv").images
    assert {image.path: image.captions for image in images} == {
        folder / f"{number}.jpg": [f"Number {number} ."] for number in range(60)
    }
