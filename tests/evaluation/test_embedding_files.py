"""Embeddings written, read again, read from others, and refused by file and row."""

import dataclasses
import json

import numpy as np
import pytest

from fne_jax import convert, evaluate
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.evaluation import embedding_files
from fne_jax.evaluation.embedding_files import read_embeddings, read_embeddings_of, write_embeddings
from fne_jax.evaluation.metrics import retrieval_metrics
from fne_jax.evaluation.results import read_values
from fne_jax.model.embedded_split import EmbeddedSplit

OWNER = np.array([0, 1, 2, 0, 3, 3, 1])


def unit(rng, rows):
    vectors = rng.normal(size=(rows, 5)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    truth = rng.random((4, 7)) < 0.3
    truth[OWNER, np.arange(7)] = True
    ids = np.array([50, 40, 30, 20]), np.arange(100, 107)
    return EmbeddedSplit(unit(rng, 4), unit(rng, 7), OWNER, *ids, truth)


@pytest.fixture
def folder(split, tmp_path):
    """What another model's owner writes: the three arrays that have to be there."""
    np.save(tmp_path / "image_embeddings.npy", split.image_emb)
    np.save(tmp_path / "text_embeddings.npy", split.text_emb)
    np.save(tmp_path / "caption_image.npy", OWNER)
    return tmp_path


def test_what_is_written_is_read_to_the_bit(split, tmp_path):
    dataset = PairDataset(
        [f"caption {n}" for n in range(7)],
        OWNER,
        split.image_id,
        np.zeros((4, 1, 1, 3), np.uint8),
        split.caption_id,
        ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
    )
    for _ in range(2):  # over an older one, too
        write_embeddings(tmp_path / "dump", dataclasses.replace(split, dataset=dataset))
    read = read_embeddings(tmp_path / "dump")
    for name, expected in vars(split).items():
        np.testing.assert_array_equal(getattr(read, name), expected, err_msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]
    names = json.loads((tmp_path / "dump" / "names.json").read_text())
    assert names["images"][2] == "c.jpg" and names["captions"][6] == "caption 6"


def test_nothing_of_an_older_dump_is_taken_for_the_new_one_s(split, tmp_path):
    write_embeddings(tmp_path, split)
    write_embeddings(tmp_path, dataclasses.replace(split, truth=None))
    assert read_embeddings(tmp_path).truth is None


def test_a_dump_needs_a_folder(split, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"--dump=.*taken: cannot be written"):
        write_embeddings(tmp_path / "taken", split)
    assert (tmp_path / "taken").read_text() == "a file"


def test_rows_of_other_lengths_are_normalised_and_ids_may_be_missing(split, folder):
    np.save(folder / "text_embeddings.npy", split.text_emb.astype(np.float64) * 3)
    read = read_embeddings(folder)
    np.testing.assert_allclose(read.text_emb, split.text_emb, rtol=1e-6)
    assert read.text_emb.dtype == np.float32 and read.truth is None
    np.testing.assert_array_equal(read.caption_id, np.arange(7))


def changed(array, row, value):
    array = array.copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "image_embeddings",
            lambda a: changed(a, [1, 3], np.nan),
            r"2 rows are not finite.*\[1, 3",
        ),
        ("text_embeddings", lambda a: changed(a, 5, 0), r"1 rows are all 0, first \[5\]"),
        ("text_embeddings", lambda a: a[:, :4], r"has 5 dimensions, text_embeddings.npy 4"),
        ("image_embeddings", lambda a: a.astype(int), r"expected floats \[rows, dim\], got int64"),
        ("image_embeddings", lambda a: a[0], r"expected floats \[rows, dim\], got float32 \[5\]"),
        ("caption_image", lambda a: a[:6], r"expected 7 integers, got int64 \[6\]"),
        ("caption_image", lambda a: a + 1, r"expected rows 0 to 3 .* got 1 to 4"),
        ("caption_image", lambda a: changed(a, 2, 0), r"1 images have no caption.*rows \[2\]"),
        ("image_id", lambda a: np.arange(5), r"image_id.npy: expected 4 integers, got int64 \[5\]"),
        ("matches", lambda a: np.ones((7, 4), bool), r"expected bool \[4, 7\], got bool \[7, 4\]"),
        ("matches", lambda a: np.eye(4, 7) > 0, r"captions without a match: rows \[4, 5, 6\]"),
    ],
)
def test_what_is_wrong_is_named(folder, name, change, message):
    path = folder / f"{name}.npy"
    np.save(path, change(np.load(path) if path.exists() else None))
    with pytest.raises(UserError, match=message):
        read_embeddings(folder)


def test_files_that_are_not_there_or_not_arrays_are_named(folder):
    (folder / "caption_image.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"caption_image.npy: cannot be read as .npy"):
        read_embeddings(folder)
    (folder / "caption_image.npy").unlink()
    with pytest.raises(UserError, match=r"caption_image.npy does not exist"):
        read_embeddings(folder)
    with pytest.raises(UserError, match="is not a folder"):
        read_embeddings(folder / "nowhere")


def test_evaluate_scores_them_without_a_run(split, folder, capsys):
    out = folder / "scores.json"
    arguments = [f"--embeddings={folder}", f"--out={out}"]
    evaluate.main([*arguments, "--protocol=all", f"--dump={folder / 'again'}"])
    printed = capsys.readouterr().out
    assert "4 images, 7 captions" in printed and "coco_5k is for COCO's 5,000" in printed
    report = json.loads(out.read_text())
    assert read_values(report) == pytest.approx(
        retrieval_metrics(split.image_emb, split.text_emb, OWNER)
    )
    one = report["metrics"]["t2i_r5"]
    assert one["low"] <= one["value"] <= one["high"] and one["queries"] == 7
    assert one["candidates"] == 4 and "image among the first 5" in one["definition"]
    assert (folder / "again" / "text_embeddings.npy").exists()

    for wrong, message in (
        (["--workdir=x"], "give one of the --workdir"),
        (["--weights=momentum"], "--weights goes with --workdir, not with --embeddings"),
        (["--split=val"], "--split goes with --embeddings beside the --config of their data"),
        ([f"--dump={folder / 'image_embeddings.npy'}"], "is a file; expected a folder"),
        ([f"--dump={folder}/"], "is the folder of --embeddings"),
        ([f"--report={out}"], "cannot hold both"),
        (["--config.seed=3"], "unknown argument '--config.seed=3'"),
        (["--protocol=coco_1k"], "coco_1k is for COCO's 5,000 test images"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*arguments, *wrong])
    with pytest.raises(UserError, match="cannot be written"):
        evaluate.main([f"--embeddings={folder}", f"--out={folder / 'no' / 'scores.json'}"])


def dataset_of(split, captions=None):
    count = len(split.image_emb)
    return PairDataset(
        captions or [f"caption {n}" for n in range(len(split.text_emb))],
        split.caption_image,
        split.image_id,
        np.zeros((count, 1, 1, 3), np.uint8),
        split.caption_id,
        [f"{n}.jpg" for n in split.image_id],
    )


def shuffled(split):
    """Returns the split in another order of images and captions."""
    return split.part(np.array([2, 0, 3, 1]), np.array([3, 6, 0, 5, 1, 4, 2]))


def test_rows_are_found_by_their_ids(split, tmp_path):
    write_embeddings(tmp_path, shuffled(split))
    assert not np.array_equal(read_embeddings(tmp_path).image_id, split.image_id)
    dataset = dataset_of(split)
    read = read_embeddings_of(tmp_path, dataset)
    for name, expected in vars(dataclasses.replace(split, dataset=dataset)).items():
        np.testing.assert_array_equal(getattr(read, name), expected, err_msg=name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image_id", lambda a: a + 1, r"image_id.npy: 4 of the split's 4 ids are missing, first"),
        (
            "caption_id",
            lambda a: a * 0,
            r"caption_id.npy: some ids appear more than once, first \[0\]",
        ),
        ("caption_id", lambda a: a[::-1].copy(), "each caption with the same image"),
        ("caption_image", lambda a: a[::-1].copy(), "each caption with the same image"),
    ],
)
def test_rows_that_are_not_the_split_s_are_refused(split, tmp_path, name, change, message):
    write_embeddings(tmp_path, dataclasses.replace(split, truth=None))
    (tmp_path / "parts.json").unlink()
    np.save(tmp_path / f"{name}.npy", change(getattr(split, name)))
    with pytest.raises(UserError, match=message):
        read_embeddings_of(tmp_path, dataset_of(split))


def test_captions_that_are_not_the_split_s_are_refused(split, tmp_path):
    theirs = shuffled(split)
    for changes, kind in (
        ({"captions": list("abcdefg")}, "caption"),
        ({"source_image_id": list("abcd")}, "image"),
    ):
        dataset = dataclasses.replace(dataset_of(theirs), **changes)
        write_embeddings(tmp_path, dataclasses.replace(theirs, dataset=dataset))
        with pytest.raises(UserError, match=rf"names.json: {kind} \d is '.', that of the split"):
            read_embeddings_of(tmp_path, dataset_of(split))


def test_parts_of_two_dumps_are_not_scored(split, tmp_path):
    write_embeddings(tmp_path / "one", split)
    write_embeddings(tmp_path / "two", shuffled(split))
    (tmp_path / "two" / "matches.npy").replace(tmp_path / "one" / "matches.npy")
    with pytest.raises(UserError, match=r"matches.npy is not the file that was written with"):
        read_embeddings(tmp_path / "one")
    # Without word of what was written together, the labels still have to be true.
    (tmp_path / "one" / "parts.json").unlink()
    with pytest.raises(UserError, match=r"matches.npy: captions that do not match their own image"):
        read_embeddings(tmp_path / "one")


def test_a_dump_that_was_killed_is_not_scored(split, tmp_path, monkeypatch):
    """Wherever it ends, what is left of it and of the dump before it is refused."""
    written = []
    for last in range(20):
        write_embeddings(tmp_path, split)
        left = iter(range(last))

        def write(path, content, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            written.append(path.name)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

        with monkeypatch.context() as patch:
            patch.setattr(embedding_files, "write_atomically", write)
            try:
                write_embeddings(tmp_path, shuffled(split))
                break
            except KeyboardInterrupt:
                pass
        if "image_embeddings.npy" not in written[-last:]:
            with pytest.raises(UserError, match=r"image_embeddings.npy does not exist"):
                read_embeddings(tmp_path)
    assert last == 7 and set(written) == {path.name for path in tmp_path.iterdir()}


def test_an_order_takes_anyone_s_embeddings(split, tmp_path, capsys):
    config = tmp_path / "configs" / "tiny.py"
    config.parent.mkdir()
    config.write_text(
        "from tests.support.tiny import tiny_config\n\n"
        "def get_config():\n    return tiny_config(data__synthetic__images=9).lock()\n"
    )
    config = [f"--config={config}", "--config.encoder.image.pretrained=not/here", "--split=val"]
    out = tmp_path / "theirs"
    convert.main(["order", *config, f"--out={out}"])
    assert "save your model's image_embeddings.npy" in capsys.readouterr().out
    names = json.loads((out / "names.json").read_text())
    owner = np.load(out / "caption_image.npy")
    assert len(names["images"]) == owner.max() + 1 and len(names["captions"]) == len(owner)
    with pytest.raises(UserError, match=r"image_embeddings.npy does not exist"):
        evaluate.main([f"--embeddings={out}"])
    image_emb = unit(np.random.default_rng(0), len(names["images"]))
    np.save(out / "image_embeddings.npy", image_emb)
    np.save(out / "text_embeddings.npy", image_emb[owner])
    evaluate.main([f"--embeddings={out}", *config])
    assert "rSum 600.0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"image_embeddings.npy already exists"):
        convert.main(["order", *config, f"--out={out}"])


def test_an_archive_under_another_name_is_named(folder):
    np.savez(folder / "archive.npz", a=np.ones(3))
    (folder / "archive.npz").replace(folder / "image_embeddings.npy")
    with pytest.raises(UserError, match=r"image_embeddings.npy: is an .npz archive"):
        read_embeddings(folder)


def test_rows_of_extreme_lengths_are_normalised(split, folder):
    scale = np.array([1e30, 1e-30, 1.0, 5.0], np.float32)[:, None]
    np.save(folder / "image_embeddings.npy", split.image_emb * scale)
    read = read_embeddings(folder)
    np.testing.assert_allclose(read.image_emb, split.image_emb, rtol=1e-5)


def test_damaged_files_are_refused_or_read(split, folder):
    """Whatever 500 damages leave: an error for the user, or rows of length 1."""
    rng = np.random.default_rng(0)
    whole = {path: path.read_bytes() for path in sorted(folder.glob("*.npy"))}
    refused = 0
    for number in range(500):
        path = list(whole)[number % len(whole)]
        content = bytearray(whole[path])
        if number % 2:
            content[rng.integers(128 if number % 4 == 1 else len(content))] = rng.integers(256)
        else:
            del content[rng.integers(len(content)) :]
        path.write_bytes(content)
        try:
            read = read_embeddings(folder)
            np.testing.assert_allclose(np.linalg.norm(read.image_emb, axis=1), 1, atol=2e-3)
        except UserError as error:
            refused += path.name in str(error)
        path.write_bytes(whole[path])
    assert refused > 300
