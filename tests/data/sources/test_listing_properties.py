"""Whatever stands in a listing, it is read as it was written, or refused with one clear error."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation.image_shards import plan_shards
from fne_jax.data.sources import json_lists, karpathy, pair_tables, text_files
from fne_jax.data.sources.image_files import stamps_of
from fne_jax.data.sources.listing import decoded, same_file, usable_captions
from fne_jax.errors import UserError

# The same examples each time, so that a change that breaks none of them stays unbroken.
bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# Half characters and NULs as well, which JSON can spell.
odd_text = st.sampled_from(["a\0.jpg", "\ud800.jpg", "a\udcff", "", ".", "train", "a" * 5000])
any_text = odd_text | st.text(st.characters(exclude_categories=()), max_size=9)
file_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)
# Where text belongs, text that is wrong somewhere is the likeliest to pass the first checks.
any_value = st.integers(0, 2).flatmap(lambda kind: (odd_text, any_text, any_json)[kind])
names = st.text(
    st.sampled_from("ab/. ") | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=8,
)
# Folders that are not there are an error of their own.
flat_names = names.map(lambda name: name.replace("/", "_"))
captions = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listings")
    (folder / "images").mkdir()
    return folder


def read_or_refused(read, *arguments):
    """Reads a listing and all that is done with it before images are opened."""
    try:
        listing = read(*arguments)
    except UserError as error:
        assert str(error)
        return None
    images = listing.images
    plan_shards(images, stamps_of([image.path for image in images]), [], 0)
    for image in images:
        kept, ids, skipped = usable_captions(image)
        assert len(kept) == len(ids) and len(kept) + len(skipped) == len(image.captions)
        # What the records hold.
        json.dumps([kept, image.source_id], ensure_ascii=False).encode()
        np.array([image.image_id], np.int32), np.array(ids, np.int64)
    return listing


def read_table(folder, kind, content):
    (folder / f"table.{kind}").write_bytes(content)
    return read_or_refused(pair_tables.read_listing, str(folder / f"table.{kind}"), kind)


@st.composite
def datasets(draw, names=names):
    """Returns a list of (split, name, captions), each image once and each split with one."""
    unique = draw(st.lists(names, min_size=3, max_size=6, unique_by=lambda n: same_file("/f/" + n)))
    splits = [*SPLITS, *draw(st.lists(st.sampled_from(SPLITS), min_size=3, max_size=3))]
    return [(split, name, draw(captions)) for split, name in zip(splits, unique, strict=False)]


def assert_read_as_written(listing, dataset, folder):
    written = [entry for split in SPLITS for entry in dataset if entry[0] == split]
    images = listing.images
    assert [(image.path, list(image.captions)) for image in images] == [
        (folder / name, texts) for _, name, texts in written
    ]


@bounded
@given(st.binary(max_size=80) | file_text.map(str.encode))
@example(b"\xff\xfe")
@example(b"image,caption\r\na,b\r\n")
@example(b"image,caption\n" + b"a," + b"b" * 200_000)
def test_any_file_is_a_table_or_refused(folder, content):
    for kind in ("csv", "jsonl"):
        read_table(folder, kind, content)


@bounded
@given(
    st.permutations(["image", "caption", "split", "image_id"]),
    st.lists(st.lists(file_text | st.sampled_from(["train", "val", "test"]), max_size=5)),
    st.sampled_from(",;\t"),
)
def test_any_cells_are_read_or_refused(folder, columns, rows, delimiter):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([columns, *rows])
    read_table(folder, "csv", stream.getvalue().encode())


@bounded
@given(datasets(), st.sampled_from(",;\t"), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_csv_is_read_as_written(folder, dataset, delimiter, encoding):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["caption", "split", "image"])
    for split, name, texts in dataset:
        writer.writerows([text, split, name] for text in texts)
    listing = read_table(folder, "csv", stream.getvalue().encode(encoding))
    # An empty cell is none.
    dataset = [(split, name, [text or None for text in texts]) for split, name, texts in dataset]
    assert_read_as_written(listing, dataset, folder)


@bounded
@given(st.lists(st.dictionaries(st.sampled_from(pair_tables.COLUMNS), any_json) | any_json))
def test_any_objects_are_read_or_refused(folder, rows):
    read_table(folder, "jsonl", "\n".join(map(json.dumps, rows)).encode())


@bounded
@given(datasets(), st.sampled_from(pair_tables.COLUMNS), any_value)
def test_any_value_in_jsonl_is_read_or_refused(folder, dataset, column, value):
    rows = [{"image": name, "caption": "words", "split": split} for split, name, _ in dataset]
    rows[0][column] = value
    read_table(folder, "jsonl", "\n".join(map(json.dumps, rows)).encode())


@bounded
@given(datasets(), st.booleans())
def test_jsonl_is_read_as_written(folder, dataset, ascii_only):
    rows = [
        {"image": name, "caption": text, "split": split}
        for split, name, texts in dataset
        for text in texts
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    assert_read_as_written(read_table(folder, "jsonl", lines.encode()), dataset, folder)


@bounded
@given(st.binary(max_size=80) | file_text.map(str.encode), st.lists(flat_names, max_size=3))
def test_any_text_beside_an_image_is_read_or_refused(tmp_path_factory, content, others):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("a.jpg", *(f"b{other}.png" for other in others)):
        (folder / name).touch()
    (folder / "a.txt").write_bytes(content)
    listing = read_or_refused(text_files.read_listing, str(folder))
    if listing is not None:
        written = "".join("".join(image.captions) for image in listing.images)
        lines = io.StringIO(decoded(content), newline=None).read().split("\n")
        assert written == "".join(line for line in lines if line.strip())


def read_karpathy(folder, content):
    (folder / "dataset_any.json").write_text(json.dumps(content))
    return read_or_refused(karpathy.read_listing, str(folder))


def karpathy_of(dataset):
    return [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
        for split, name, texts in dataset
    ]


@bounded
@given(any_json | any_json.map(lambda images: {"images": images}))
def test_any_json_is_karpathys_or_refused(folder, content):
    read_karpathy(folder, content)


KEYS = st.sampled_from(["filename", "filepath", "split", "sentences", "cocoid", "imgid"])


@bounded
@given(datasets(flat_names), st.integers(0, 2), KEYS, any_value)
def test_any_value_in_karpathys_is_read_or_refused(folder, dataset, index, key, value):
    entries = karpathy_of(dataset)
    entries[index][key] = value
    read_karpathy(folder, {"images": entries})


@bounded
@given(datasets(flat_names), st.integers(0, 2), any_json)
def test_any_caption_id_is_read_or_refused(folder, dataset, index, value):
    entries = karpathy_of(dataset)
    entries[index]["sentences"][0]["sentid"] = value
    read_karpathy(folder, {"images": entries})


@bounded
@given(datasets(flat_names), st.randoms(use_true_random=False))
def test_karpathys_is_read_as_written(folder, dataset, random):
    entries = karpathy_of(dataset)
    count = sum(len(entry["sentences"]) for entry in entries)
    ids = iter(random.sample(range(2**40), count))
    for sentence in (sentence for entry in entries for sentence in entry["sentences"]):
        sentence["sentid"] = next(ids)
    listing = read_karpathy(folder, {"images": entries})
    assert_read_as_written(listing, dataset, folder / "images")
    written = {e["filename"]: [s["sentid"] for s in e["sentences"]] for e in entries}
    for image in listing.images:
        assert image.caption_ids == written[image.source_id]


@settings(bounded, max_examples=40)  # of six files each
@given(st.lists(any_json, min_size=3, max_size=3), datasets(), st.integers(0, 2), any_json)
def test_any_lists_of_the_authors_are_read_or_refused(folder, contents, dataset, index, value):
    lists = {split: [] for split in SPLITS}
    for split, name, texts in dataset:
        lists[split].append({"image": name, "caption": texts})
    lists[SPLITS[index]][0]["image_id"] = value
    for mistaken in (False, True):
        for number, split in enumerate(SPLITS):
            content = contents[number] if mistaken else lists[split]
            (folder / f"any_{split}.json").write_text(json.dumps(content))
        read_or_refused(json_lists.read_listing, str(folder))
