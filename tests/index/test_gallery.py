"""What is found in folders, tables, splits and lists, and what is said where nothing is."""

import os

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.index.gallery import images_of, label_of, texts_of
from tests.support.index import no_split, pixels_of, write_image


def split(source_ids=("x", "y", "z")):
    images = np.stack([pixels_of(number) for number in range(3)])
    captions, owner = ["a dog", "a cat", "the dog", "a dog"], np.array([0, 2, 0, 1], np.int32)
    ids = np.array([7, 8, 9], np.int32)
    return PairDataset(captions, owner, ids, images, np.arange(4), list(source_ids))


def size_of(path):
    with Image.open(path) as image:
        return image.size


def splits(name):
    assert name == "val"
    return split()


def test_images_of_every_kind_below_a_folder_are_found(tmp_path):
    for name in ("b.JPG", "a/c.png", "a/b/d.webp", "e.tif", "f.bmp", "g.gif", "h.ppm"):
        write_image(tmp_path / name, 1)
    for name in ("notes.txt", ".hidden.png", ".trash/i.png", "k.pdf", "jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "b.JPG")
    found = images_of(tmp_path, no_split)
    expected = ["a/b/d.webp", "a/c.png", "b.JPG", "b.jpg", "e.tif", "f.bmp", "g.gif", "h.ppm"]
    assert found.names == expected
    assert [os.path.relpath(found.path(row), tmp_path) for row in range(8)] == expected
    status = (tmp_path / "e.tif").stat()
    assert found.stamps[4].tolist() == [status.st_size, status.st_mtime_ns]
    assert size_of(found.content(1)) == (8, 8) and found.captions(0) == ()


def test_linked_folders_are_searched_once_and_circles_end(tmp_path):
    for name in ("photos/own/a.png", "photos/own/b.png", "disk/c.png", "disk/[1]/d.png"):
        write_image(tmp_path / name, 1)
    for name, target in (("holiday", "disk"), ("again", "disk"), ("circle", "photos"),
                         ("own/up", "photos"), ("a copy", "photos/own")):  # fmt: skip
        (tmp_path / "photos" / name).symlink_to(tmp_path / target)
    (tmp_path / "photos" / "lost").symlink_to(tmp_path / "nowhere")
    found = images_of(tmp_path / "photos", no_split)
    assert found.names == ["again/[1]/d.png", "again/c.png", "own/a.png", "own/b.png"]
    assert all(os.path.isfile(found.path(row)) for row in range(4))


def test_a_table_gives_images_and_captions_whatever_their_splits(tmp_path):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", 1)
    write_image(tmp_path / "out" / "b.png", 2)
    rows = ["in/a.png,a dog,train", f"{tmp_path / 'out' / 'b.png'},a cat,train"]
    rows += ["./in/a.png,the dog,train", "in/a.png,,train", "gone.png,a bird,train"]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["image,caption,split", *rows]))
    found = images_of(str(table), no_split)
    assert found.names == ["in/a.png", "out/b.png", "gone.png"]
    assert [list(found.captions(row)) for row in (0, 1)] == [["a dog", "the dog"], ["a cat"]]
    assert found.stamps[2].tolist() == [-1, 0] and found.stamps[0, 0] > 0
    assert size_of(found.path(1)) == (8, 8)
    texts = texts_of(table, no_split)
    assert texts.names == ["a dog", "the dog", "a cat", "a bird"]
    below = tmp_path / "in" / "pairs.jsonl"
    below.write_text(f'{{"image": "{tmp_path / "out" / "b.png"}", "caption": "a cat"}}\n')
    assert images_of(below, no_split).names == [str(tmp_path / "out" / "b.png")]


def test_a_split_gives_its_images_with_their_captions():
    found = images_of("val", splits)
    assert found.names == ["x", "y", "z"] and found.path(0) == ""
    assert [found.captions(row) for row in range(3)] == [["a dog", "the dog"], ["a dog"], ["a cat"]]
    np.testing.assert_array_equal(found.content(2), pixels_of(2))
    checksum = split().identity.checksum
    assert found.stamps.shape == (3, 2) and (found.stamps.view("u8") == int(checksum, 16)).all()
    assert found.some_captions(3) == ["a dog", "a dog", "a cat"]
    assert found.some_captions(1) == ["a dog"]
    assert texts_of("val", splits).names == ["a dog", "a cat", "the dog"]
    # Sources may call images alike; their ids are unique.
    assert images_of("val", lambda name: split(["x", "x", "y"])).names == ["7", "8", "9"]


def test_lists_and_files_of_sentences(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", 1)
    monkeypatch.chdir(tmp_path)
    found = images_of(["a.png", tmp_path / "a.png", "gone.png"], no_split)
    assert found.names == [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]
    assert found.stamps[1, 0] == -1
    (tmp_path / "lines.txt").write_text("a dog\n\n a cat \r\na dog\n", encoding="utf-16")
    assert texts_of("lines.txt", no_split).names == ["a dog", " a cat "]
    # None of these ends a line, though Python's `splitlines` says so.
    odd = "".join(map(chr, (0x0B, 0x0C, 0x1C, 0x85, 0x2028, 0x2029)))
    lines = [f"a{end}dog" for end in odd]
    (tmp_path / "lines.txt").write_bytes("\r".join(lines).encode())
    assert texts_of("lines.txt", no_split).names == lines


def test_names_of_folders_tell_places_apart(tmp_path, monkeypatch):
    assert label_of("train") == "train"
    monkeypatch.chdir(tmp_path)
    labels = {label_of(path) for path in ("a/photos", "b/photos", "./train", "a/bad name.csv")}
    assert len(labels) == 4
    assert label_of("a/photos") == label_of(tmp_path / "b" / ".." / "a" / "photos")
    assert label_of("a/bad name.csv").startswith("bad-name_")


def test_what_is_no_gallery_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "empty.csv").write_text("image,caption\n")
    (tmp_path / "bad.csv").write_text("image,words\na.png,a dog\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert label_of(tmp_path / "circle").startswith("circle_")
    for read, source, message in (
        (images_of, tmp_path / "nowhere", "nowhere' does not exist; expected a folder of images"),
        (images_of, tmp_path / "empty", "there is no image in it"),
        (images_of, tmp_path / "a.png", "give it as --image"),
        (images_of, tmp_path / "empty.csv", "there is no image"),
        (images_of, tmp_path / "bad.csv", "the column 'caption' is missing"),
        (images_of, "no\0name", r"no.x00name' does not exist"),
        (images_of, tmp_path / "circle", "circle' does not exist; expected a folder of images"),
        (
            images_of,
            "~no-such-user/g",
            "'~no-such-user/g': there is no user of that name, whose home folder ~no-such-user",
        ),
        (images_of, [], "no images in the list"),
        (images_of, "", "'' is no path; expected that of a file or folder"),
        (texts_of, tmp_path / "nowhere", "does not exist; expected a table"),
        (texts_of, tmp_path / "empty", "is a folder; expected a table"),
        (texts_of, tmp_path / "empty.txt", "there is no text"),
        (texts_of, ["a dog", 3], r"texts\[1\]: expected a str, got int"),
        (texts_of, ["a dog", "\ud800"], r"texts\[1\] is '.ud800', which has .* half a character"),
    ):
        with pytest.raises(UserError, match=message):
            read(source, no_split)
