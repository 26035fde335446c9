"""Tars, Parquet and TFDS: what holds images and captions in files of its own."""

import io
import itertools
import json
import os
import pathlib
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation import preparing
from fne_jax.data.sources import many_files, parquet, tfds_datasets, webdataset
from fne_jax.data.sources.pair_tables import split_of_name
from fne_jax.errors import UserError
from tests.support import sources
from tests.support.tiny import tiny_config


def prepared(tmp_path, source, folder, **fields):
    config = tiny_config(
        data__source=source,
        data__dir=str(folder),
        data__cache_dir=str(tmp_path / "cache"),
        **{f"data__{name}": value for name, value in fields.items()},
    )
    return preparing.prepare(config.data)


def samples():
    """Returns (split, number, JPEG, captions) of 24, 5 and 6 images."""
    number = 0
    for split, count in sources.SPLITS.items():
        for _ in range(count):
            captions = [f"Image {number}, seen {n} times." for n in range(1 + number % 3)]
            yield split, number, sources.jpeg(number, width=30 + number % 11), captions
            number += 1


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:  # as `tar` writes the same file under a second name
                member.type, member.linkname = tarfile.LNKTYPE, "a.jpg"
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))


def tars(folder, kind="txt"):
    """Writes a tar of at most nine images a file, the captions as text or JSON."""
    for split in SPLITS:
        of_split = [sample for sample in samples() if sample[0] == split]
        for start in range(0, len(of_split), 9):
            members = []
            for _, number, jpeg, captions in of_split[start : start + 9]:
                text = "\n".join(captions) if kind == "txt" else json.dumps({"caption": captions})
                members += [(f"{number:04}.jpg", jpeg), (f"{number:04}.{kind}", text.encode())]
            write_tar(folder / f"{split}-{start:03}.tar", members)


def tables(folder):
    """Writes Parquet as Hugging Face's datasets have it."""
    folder.mkdir(parents=True)
    for split in SPLITS:
        rows = [
            {"image": {"bytes": jpeg, "path": f"{number}.jpg"}, "caption": captions}
            for one, number, jpeg, captions in samples()
            if one == split
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def saved_to_disk(folder):
    """Writes Arrow streams as `save_to_disk` does, the images' paths beside."""
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        rows = []
        for one, number, jpeg, captions in samples():
            if one == split:
                (folder / split / f"{number}.jpg").write_bytes(jpeg)
                rows.append({"image": f"{number}.jpg", "caption": captions})
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(folder / split / "data-00000-of-00001.arrow", table.schema) as out:
            out.write_table(table)


class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of TFDS, its splits under its names."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split.replace("val", "validation"): self._of(split) for split in SPLITS}

    def _of(self, split):
        for one, number, jpeg, captions in samples():
            if one == split:
                yield number, {"image": io.BytesIO(jpeg), "captions": {"text": captions}}

    def _generate_examples(self):
        raise NotImplementedError


def of_tfds(folder, monkeypatch):
    monkeypatch.setattr(tfds.core.utils.gcs_utils, "gcs_dataset_info_files", lambda name: None)
    builder = Captioned(data_dir=folder)
    builder.download_and_prepare()
    return builder.data_dir


def texts(folder):
    for split, number, jpeg, captions in samples():
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{number:04}.jpg").write_bytes(jpeg)
        (folder / split / f"{number:04}.txt").write_text("\n".join(captions))


def test_every_kind_holds_the_same(tmp_path, monkeypatch):
    tars(tmp_path / "tars")
    tars(tmp_path / "json", "json")
    tables(tmp_path / "parquet")
    saved_to_disk(tmp_path / "arrow")
    texts(tmp_path / "texts")
    keys = {"caption_key": "captions/text"}
    found = [
        prepared(tmp_path, "webdataset", tmp_path / "tars"),
        prepared(tmp_path, "webdataset", tmp_path / "json" / "{train,val,test}-*.tar"),
        prepared(tmp_path, "parquet", tmp_path / "parquet"),
        prepared(tmp_path, "parquet", tmp_path / "arrow"),
        prepared(tmp_path, "text_files", tmp_path / "texts"),
        prepared(tmp_path, "tfds", of_tfds(tmp_path / "tfds", monkeypatch), **keys),
    ]  # fmt: skip
    keys["image_key"] = "captions/text"
    with pytest.raises(UserError, match="35 images or captions cannot be used"):
        prepared(tmp_path, "tfds", tmp_path / "tfds" / "captioned" / "1.2.3", **keys)
    first = {split: found[0].load_split(split) for split in SPLITS}
    ids = np.concatenate([first[split].image_id for split in SPLITS])
    assert sorted(ids.tolist()) == list(range(35))
    for one in found:
        assert not one.skipped()
        for split in SPLITS:
            one.check(split)
            loaded = one.load_split(split)
            expected = [sample for sample in samples() if sample[0] == split]
            assert loaded.captions == [text for sample in expected for text in sample[3]]
            assert loaded.caption_image.tolist() == [
                row for row, sample in enumerate(expected) for _ in sample[3]
            ]
            assert [loaded.image(row) for row in range(len(expected))] == [
                jpeg for _, _, jpeg, _ in expected
            ]


def test_a_tar_more_or_another_is_another_dataset(tmp_path):
    tars(tmp_path / "tars [1]")
    first = prepared(tmp_path, "webdataset", tmp_path / "tars [1]")
    assert prepared(tmp_path, "webdataset", tmp_path / "tars [1]").folder == first.folder
    more = [("x.jpg", sources.jpeg(99)), ("x.txt", b"X.")]
    write_tar(tmp_path / "tars [1]" / "train-100.tar", more)
    second = prepared(tmp_path, "webdataset", tmp_path / "tars [1]")
    assert second.summaries["train"].images == first.summaries["train"].images + 1
    assert second.summaries["val"].images == first.summaries["val"].images
    shared = set(first.shards.values()) & set(second.shards.values())
    assert len(shared) == len(first.shards), "only the new tar was read"


def test_what_a_tar_lacks_is_told(tmp_path):
    tars(tmp_path / "tars")
    write_tar(
        tmp_path / "tars" / "train-100.tar",
        [
            ("a.jpg", sources.jpeg(1)),
            ("b.txt", b"Without an image."),
            ("c.jpg", sources.jpeg(2)[:200]),
            ("c.txt", b"Damaged."),
            ("d.jpg", sources.jpeg(3)),
            ("d.txt", b"\xff"),
            ("e.JPG", sources.jpeg(4)),
            ("e.txt", b"\xef\xbb\xbfFine.\r\n\nReally.\r\n"),
            ("e.json", b"{"),
            ("\xe9.jpg", sources.jpeg(5)),  # not UTF-8
            ("\xe9.txt", "Deux mots.".encode("utf-16")),
        ],
    )
    with pytest.raises(UserError, match="5 images or captions cannot be used"):
        prepared(tmp_path, "webdataset", tmp_path / "tars")
    found = prepared(tmp_path, "webdataset", tmp_path / "tars", max_skipped=5)
    train = found.load_split("train")
    assert train.captions[-3:] == ["Fine.", "Really.", "Deux mots."]
    assert train.source_image_id[-2:] == ["e", r"\xe9"]
    reasons = {one.where.rpartition(" ")[2][:1]: one.reason for one in found.skipped()}
    assert reasons["a"] == "the list of captions is empty"
    assert reasons["b"] == "there is no image beside the caption"
    assert reasons["c"].startswith("cannot be decoded")
    assert reasons["d"] == "no caption is left"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")], r"the members a\.\* lie apart"),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], r"the member a\.JPG appears twice"),
        ([("a.jpg", b"1"), ("b.jpg", None)], r"the member b\.jpg is a link, which holds nothing"),
        ([], "holds no file"),
    ],
)
def test_a_tar_in_disorder(tmp_path, members, message):
    write_tar(tmp_path / "tars" / "train.tar", members)
    with pytest.raises(UserError, match=rf"train\.tar: (is damaged: .*)?{message}"):
        prepared(tmp_path, "webdataset", tmp_path / "tars", max_skipped=99)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_damaged_containers_are_named(tmp_path, share):
    tars(tmp_path / "tars")
    tables(tmp_path / "parquet")
    for source, name in (("webdataset", "tars/val-000.tar"),
                         ("parquet", "parquet/val-00000-of-00001.parquet")):  # fmt: skip
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content)) // 512 * 512 + 100])
        with pytest.raises(UserError, match=rf"{path.name}: is damaged"):
            prepared(tmp_path, source, path.parent)


def test_columns_that_are_not_there(tmp_path):
    tables(tmp_path / "parquet")
    with pytest.raises(UserError, match=r"no column .text.; make .*caption_key one of im"):
        prepared(tmp_path, "parquet", tmp_path / "parquet", caption_key="text")


def test_images_that_a_table_names_by_paths(tmp_path):
    saved_to_disk(tmp_path / "arrow")
    names = ["0.jpg", "1.jpg", "none.jpg", "", ".", "a" * 300, "0.jpg/a", "a\0", None]
    table = pa.table({"image": names, "caption": ["One."] * 9})
    pq.write_table(table, tmp_path / "arrow" / "train" / "A.PARQUET")
    table = pa.table({"image": [sources.jpeg(52)], "caption": [b"Bytes."]})
    pq.write_table(table, tmp_path / "arrow" / "train" / "B.parquet")
    with pytest.raises(UserError, match="9 images or captions cannot be used"):
        prepared(tmp_path, "parquet", tmp_path / "arrow")
    before = prepared(tmp_path, "parquet", tmp_path / "arrow", max_skipped=9)
    assert len(before.load_split("train").image_id) == 26
    reasons = {os.path.basename(one.where): one.reason for one in before.skipped()}
    assert reasons["A.PARQUET: row 2, none.jpg"] == "there is no image beside the caption"
    assert (
        reasons["B.parquet: row 0, caption 0"]
        == "the caption is not text: {'bytes': \"b'Bytes.'\"}"
    )
    (tmp_path / "arrow" / "train" / "none.jpg").write_bytes(sources.jpeg(50))
    (tmp_path / "arrow" / "train" / "1.jpg").write_bytes(sources.jpeg(51))
    after = prepared(tmp_path, "parquet", tmp_path / "arrow", max_skipped=9).load_split("train")
    assert [after.image(row) for row in (1, 2)] == [sources.jpeg(51), sources.jpeg(50)]


def test_files_elsewhere(tmp_path):
    tars(tmp_path / "tars")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "tars").iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    here = prepared(tmp_path, "webdataset", tmp_path / "tars")
    there = prepared(tmp_path, "webdataset", "memory://bucket/*.tar")
    assert there.summaries == here.summaries
    tables(tmp_path / "parquet")
    for path in (tmp_path / "parquet").iterdir():
        memory.pipe_file(f"/datasets/owner/name/data/{path.name}", path.read_bytes())
    there = prepared(tmp_path, "parquet", "memory://datasets/owner/name/**/*.parquet")
    assert there.summaries == here.summaries
    assert fsspec.get_filesystem_class("hf")  # of the hub, where `**` is one of its patterns too


@pytest.mark.parametrize("folder", ["data [1]", "data {1,2}"])
def test_whatever_a_folder_is_called_its_files_are_found(tmp_path, folder):
    tars(tmp_path / folder)
    (tmp_path / folder / "val-000.tar").rename(tmp_path / folder / "VAL.TAR")
    (tmp_path / "more").mkdir()
    (tmp_path / folder / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "circle").symlink_to(tmp_path / folder)
    write_tar(tmp_path / "more" / "train.tar", [("a.jpg", b"")])
    (tmp_path / folder / "._train-000.tar").touch()
    found = [
        os.path.relpath(path, tmp_path / folder)
        for path in many_files.named_by(str(tmp_path / folder), [".tar"])
    ]
    expected = ["VAL.TAR", "more/train.tar", "test-000.tar", "train-000.tar", "train-009.tar"]
    assert found == [*expected, "train-018.tar"]
    if "{" not in folder:
        pattern = str(tmp_path / folder / "{train-0*,VAL}.[tT][aA]?")
        assert not many_files.named_by(pattern.replace("[tT][aA]?", "*"), [".tar"])[4:]
        with pytest.raises(UserError, match=r"there is no \.tar file .*\[tT\]"):
            many_files.named_by(pattern, [".tar"])


def test_a_range_that_holds_nothing():
    with pytest.raises(UserError, match=r"\{3\.\.1\} stands for no number"):
        many_files.named_by("/d/{3..1}.tar", [".tar"])


def test_texts_and_images_that_belong_together(tmp_path, caplog):
    texts(tmp_path / "texts")
    train = tmp_path / "texts" / "train"
    for name, content in (
        ("test of a train.JPG", sources.jpeg(90)),
        ("test of a train.TXT", b"In another case."),
        ("cafe\u0301.jpg", sources.jpeg(91)),
        ("caf\u00e9.txt", b"In another form."),
        ("image.heic", b""),
        ("image.txt", b"Of no image."),
        ("._0001.jpg", b"A program's own."),
    ):
        (train / name).write_bytes(content)
    found = prepared(tmp_path, "text_files", tmp_path / "texts").load_split("train")
    assert len(found.image_id) == 26
    assert found.captions[-2:] == ["In another form.", "In another case."]
    assert "1 .txt files have no image beside them" in caplog.text
    (train / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match=r"udce9\.jpg': the name is not in UTF-8; rename it"):
        prepared(tmp_path, "text_files", tmp_path / "texts")


def test_names_tell_splits_or_none_does():
    assert many_files.splits_of(["/d/train/0.tar", "/d/train/1.tar"]) == dict.fromkeys(
        ["/d/train/0.tar", "/d/train/1.tar"], ""
    ), "a folder of all tells nothing"
    assert list(many_files.splits_of(["/d/a-valid.tar", "/d/a-train.tar"]).values()) == [
        "val", "train",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"b\.tar: its name tells no split"):
        many_files.splits_of(["/d/train.tar", "/d/b.tar"])


def test_without_splits_names_are_hashed(tmp_path):
    members = [
        member
        for number in range(120)
        for member in ((f"{number:03}.jpg", sources.jpeg(number)), (f"{number:03}.txt", b"One."))
    ]
    write_tar(tmp_path / "tars" / "all.tar", members)
    found = prepared(tmp_path, "webdataset", tmp_path / "tars")
    for split in SPLITS:
        names = [f"{n:03}" for n in range(120) if split_of_name(f"{n:03}") == split]
        assert found.load_split(split).source_image_id == names


def one_container(kind, folder, monkeypatch):
    """Writes what is in files of a kind, and returns the container of the validation split."""
    if kind == "tfds":
        where = of_tfds(folder, monkeypatch)
        path = next(folder.rglob("*validation.*"))
        names = ("val", str(where), "validation", 0, "image", "captions/text")
        return tfds_datasets.Shard(str(path), *names)
    {"tar": tars, "parquet": tables, "arrow": saved_to_disk}[kind](folder)
    path = str(next(folder.rglob(f"*val*.{kind}" if kind != "arrow" else "val/*.arrow")))
    if kind == "tar":
        return webdataset.Tar(path, "val", "caption")
    return parquet.Table(path, "val", "image", "caption")


@pytest.mark.parametrize(
    ("kind", "seed"),
    [*itertools.product(("tar", "parquet", "arrow"), range(6)), ("tfds", 0), ("tfds", 1)],
)
def test_any_damage_to_a_container_is_read_over_or_named(tmp_path, monkeypatch, kind, seed):
    container = one_container(kind, tmp_path / "made", monkeypatch)
    path = pathlib.Path(container.file)
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    for number in range(9 if kind == "tfds" else 60):  # TFDS takes longer to open a file
        path.write_bytes(sources.DAMAGES[list(sources.DAMAGES)[number % 9]](whole, rng))
        try:
            for listed, jpeg in container.images():
                json.dumps(listed)
                assert jpeg is None or isinstance(jpeg, bytes)
        except UserError as error:
            assert path.name in str(error)


def test_a_member_that_no_memory_holds_is_refused(tmp_path):
    write_tar(tmp_path / "tars" / "train.tar", [("a.jpg", sources.jpeg(1))])
    content = bytearray((tmp_path / "tars" / "train.tar").read_bytes())
    header = tarfile.TarInfo("a.jpg")
    header.size = 6 * 10**10
    content[:512] = header.tobuf()
    (tmp_path / "tars" / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg has 60,000,000,000 bytes; expected"):
        prepared(tmp_path, "webdataset", tmp_path / "tars")
