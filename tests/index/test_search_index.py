"""An index follows its gallery: what is new, changed, gone, damaged; and what interrupts it."""

import errno
import itertools
import logging
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest

from fne_jax.errors import UserError
from fne_jax.index import kept_rows, search_index
from fne_jax.index.search_index import build_index
from tests.support.index import Model, build, pixels_of, unit, write_image


@pytest.fixture
def photos(tmp_path):
    """A folder of eleven images, some of them in a folder below."""
    for number in range(11):
        below = "below/" if number % 3 == 0 else ""
        write_image(tmp_path / "photos" / f"{below}{number:02d}.png", number)
    return tmp_path / "photos"


def parts_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def assert_as_if_new(index, photos):
    """Asserts that an index is that of a model that never saw the folder before."""
    other = build(photos, None)
    assert index.names == other.names
    # The projection of a batch rounds by its size.
    np.testing.assert_allclose(index.rows, other.rows, atol=1e-3)
    images = [index.search(image=photos / name, top=1)[0].name for name in index.names]
    assert images == index.names


def test_a_text_finds_what_its_embedding_is_nearest_to(photos, tmp_path):
    model = Model()
    index = build(photos, tmp_path / "index", model)
    assert len(index) == 11 and index.rows.dtype == np.float16
    hits = index.search("a dog", top=4)
    products = index.rows.astype(np.float64) @ model.embed_texts(["a dog"])[0]
    order = np.argsort(-products)[:4]
    assert [hit.name for hit in hits] == [index.names[row] for row in order]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    np.testing.assert_allclose([hit.score for hit in hits], products[order], rtol=1e-5)
    assert all(pathlib.Path(hit.path).is_file() for hit in hits)
    assert len(index.search("a dog", top=99)) == 11


def test_an_image_of_any_kind_finds_itself(photos):
    index = build(photos, None)
    file = photos / "07.png"
    for image in (file, str(file), file.read_bytes()):
        hit = index.search(image=image, top=1)[0]
        assert hit.name == "07.png" and hit.score == pytest.approx(1, abs=2e-3)


def test_a_second_call_embeds_only_what_is_new_or_changed(photos, tmp_path, caplog):
    folder = tmp_path / "index"
    build(photos, folder)
    (photos / "01.png").unlink()
    (photos / "02.png").rename(photos / "zz.png")
    write_image(photos / "04.png", 40)
    os.utime(photos / "04.png", ns=(0, 0))  # whatever the clock of the file system
    write_image(photos / "new" / "a.bmp", 50)
    model = Model()
    with caplog.at_level(logging.INFO, logger="fne_jax"):
        index = build(photos, folder, model)
    assert sum(model.embedded) == 3 and "3 embedded now, 8 kept, 2 gone" in caplog.text
    assert index.names == sorted(index.names) and "01.png" not in index.names
    assert_as_if_new(index, photos)
    again = Model()
    index = build(photos, folder, again)
    assert again.embedded == [] and len(parts_in(folder)) == 1
    assert_as_if_new(index, photos)


def test_rows_and_names_are_files_that_anyone_reads(photos, tmp_path):
    index = build(photos, tmp_path / "index")
    (part,) = parts_in(tmp_path / "index")
    rows = np.load(tmp_path / "index" / part / kept_rows.ROWS, mmap_mode="r")
    np.testing.assert_array_equal(rows, index.rows)
    assert isinstance(index.rows, np.memmap)
    text, ends, stamps = (
        np.load(tmp_path / "index" / part / f"{name}.npy") for name in ("names", "ends", "stamps")
    )
    status = (photos / "below" / "00.png").stat()
    row = list(index.names).index("below/00.png")
    assert [text[a:b].tobytes().decode() for a, b in itertools.pairwise([0, *ends])] == index.names
    assert stamps[row].tolist() == [status.st_size, status.st_mtime_ns]


def test_a_kept_index_is_read_where_nothing_can_be_written(photos, tmp_path, monkeypatch):
    build(photos, tmp_path / "index")
    before, model = sorted((tmp_path / "index").rglob("*")), Model()

    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(kept_rows, "locked", refuse)  # root may write anywhere
    index = build(photos, tmp_path / "index", model)
    assert model.embedded == [] and sorted((tmp_path / "index").rglob("*")) == before
    assert_as_if_new(index, photos)


def test_another_model_embeds_all_anew_and_says_so_once(photos, tmp_path, caplog):
    build(photos, tmp_path / "index", Model(step=40))
    other = Model(step=80)
    with caplog.at_level(logging.INFO, logger="fne_jax"):
        index = build(photos, tmp_path / "index", other)
    assert sum(other.embedded) == 11
    said = [line for line in caplog.messages if "embedded again" in line]
    assert len(said) == 1 and "step 40" in said[0] and "step 80" in said[0]
    np.testing.assert_allclose(index.rows, build(photos, None, Model(step=80)).rows, atol=1e-3)


def test_images_that_cannot_be_read_are_left_out_and_named(photos, tmp_path, caplog):
    (photos / "03.png").write_bytes(b"no image at all")
    (photos / "05.jpg").write_bytes(b"")
    (photos / "06.png").symlink_to(photos / "nowhere.png")
    for _ in range(2):
        caplog.clear()
        index = build(photos, tmp_path / "index")
        assert len(index) == 11 and "03.png" not in index.names
        assert "2 of 13 images cannot be used" in caplog.text
        assert "03.png" in caplog.text and "05.jpg" in caplog.text
    write_image(photos / "03.png", 3)
    assert "03.png" in build(photos, tmp_path / "index").names


def test_a_pipe_among_the_images_is_left_out_and_named(photos, tmp_path, caplog):
    os.mkfifo(photos / "pipe.jpg")
    # What waits for the pipe after all gets its end in a while.
    ends = threading.Timer(10, os.close, [os.open(photos / "pipe.jpg", os.O_RDWR)])
    ends.start()
    (photos / "below" / "link.jpg").symlink_to(photos / "pipe.jpg")
    index = build(photos, tmp_path / "index")
    assert len(index) == 11 and "2 of 13 images cannot be used" in caplog.text
    assert "pipe.jpg' is not a file" in caplog.text and "link.jpg' is not a file" in caplog.text
    with pytest.raises(UserError, match=r"pipe\.jpg' is not a file"):
        index.search(image=photos / "pipe.jpg")
    ends.cancel()


def test_a_folder_without_a_usable_image_is_refused_and_the_index_stays(photos, tmp_path):
    build(photos, tmp_path / "index")
    before = parts_in(tmp_path / "index")
    for path in photos.rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"none of 11 images can be used: .*01\.png"):
        build(photos, tmp_path / "index")
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(UserError, match="there is no image in it"):
        build(photos, tmp_path / "index")
    assert parts_in(tmp_path / "index") == before


class Stops(Model):
    """A model that is interrupted at one of its calls."""

    def __init__(self, call, error=KeyboardInterrupt):
        super().__init__()
        self._call, self._error = call, error

    def images(self, pixels):
        if len(self.embedded) == self._call:
            raise self._error
        return super().images(pixels)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_ctrl_c_keeps_what_is_embedded(photos, tmp_path, call):
    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "index", Stops(call))
    model = Model()
    index = build(photos, tmp_path / "index", model)
    assert sum(model.embedded) == 11 - 4 * call
    assert_as_if_new(index, photos)


def test_what_is_embedded_is_kept_now_and_then(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(search_index, "_KEPT_ROWS", 4)
    kept = []
    add = kept_rows.KeptRows.add

    def watched(self, names, stamps, rows):
        kept.append(len(names))
        add(self, names, stamps, rows)

    monkeypatch.setattr(kept_rows.KeptRows, "add", watched)
    assert_as_if_new(build(photos, tmp_path / "index"), photos)
    assert kept[:3] == [4, 4, 3]


def test_a_damaged_part_is_embedded_anew(photos, tmp_path, caplog):
    folder = tmp_path / "index"
    for name, content in (
        (kept_rows.ROWS, b""),
        (kept_rows.ROWS, None),
        (kept_rows.NAMES, b'{"name": "00.png", "stamp": [1, 2]}\n'),
        (kept_rows.ABOUT, b"[]"),
        (kept_rows.ABOUT, b"{"),
    ):
        build(photos, folder)
        (part,) = parts_in(folder)
        path = folder / part / name
        path.write_bytes(path.read_bytes()[:-5] if content is None else content)
        model = Model()
        caplog.clear()
        index = build(photos, folder, model)
        assert sum(model.embedded) == 11 and f"{part} is damaged" in caplog.text
        assert_as_if_new(index, photos)


def test_a_model_whose_embeddings_are_not_finite_is_told_of(photos, tmp_path):
    class Diverged(Model):
        def images(self, pixels):
            return super().images(pixels) * np.array([[np.nan], *[[1]] * (len(pixels) - 1)])

    with pytest.raises(UserError, match=r"embedding of '01.png' is not finite"):
        build(photos, tmp_path / "index", Diverged())


def test_a_folder_that_cannot_be_written_to_is_named(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the index cannot be kept"):
        build(photos, tmp_path / "file")


def test_without_a_folder_nothing_stays_behind(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(search_index.tempfile, "tempdir", str(tmp_path))
    index = build(photos, None)
    (folder,) = tmp_path.glob("fne_jax_index_*")
    assert index.search("a dog", top=1)
    del index
    assert not folder.exists()
    with pytest.raises(UserError):
        build(photos, None, engine="faiss:Nonsense")
    with pytest.raises(KeyboardInterrupt):
        build(photos, None, Stops(1))
    assert not list(tmp_path.glob("fne_jax_index_*"))


def test_own_embeddings_are_searched_several_at_a_time(photos):
    index = build(photos, None)
    queries = unit(np.random.default_rng(0).standard_normal((5, 16)))
    rows, scores = index.nearest(queries, 3)
    products = queries.astype(np.float64) @ index.rows.astype(np.float64).T
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1)[:, :3])
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :3], rtol=1e-4, atol=1e-6)


def test_no_cosine_is_above_1_though_rows_are_rounded(photos):
    index = build(photos, None)
    queries = index.rows.astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert (np.linalg.norm(index.rows.astype(np.float64), axis=1) > 1).any()
    for sign in (1, -1):
        rows, scores = index.nearest(sign * queries, len(index))
        assert (rows >= 0).all() and np.abs(scores).max() == 1


def test_wrong_questions(photos):
    index = build(photos, None)
    for arguments, message in (
        ({}, "either a text or an image"),
        ({"text": "a dog", "image": photos / "01.png"}, "either a text or an image"),
        ({"text": " "}, "is ' '; expected a sentence"),
        ({"text": "a\ud800"}, r"is 'a\\ud800', which has a NUL or half a character"),
        ({"text": ["a dog"]}, r"is \['a dog'\]; expected a sentence"),
        ({"image": photos / "nowhere.png"}, "nowhere.png'?: cannot be read"),
        ({"text": "a dog", "top": 0}, "top is 0"),
    ):
        with pytest.raises(UserError, match=message):
            index.search(**arguments)
    with pytest.raises(UserError, match=r"expected \[queries, 16\]"):
        index.nearest(np.zeros((1, 3)))
    with pytest.raises(UserError, match="not finite"):
        index.nearest(np.full((1, 16), np.nan))


def test_texts_are_searched_by_text_and_by_image(photos):
    model = Model()
    texts = ["a dog", "a cat", "a dog", "two birds"]
    index = build_index(model, texts=texts)
    assert index.names == ["a dog", "a cat", "two birds"]
    assert index.search("a cat", top=1)[0].name == "a cat"
    products = index.rows.astype(np.float64) @ model.images(pixels_of(7)[None])[0]
    hits = index.search(image=pixels_of(7))
    assert [hit.name for hit in hits] == [index.names[row] for row in np.argsort(-products)]
    assert hits[0].path == "" and hits[0].captions == ()
