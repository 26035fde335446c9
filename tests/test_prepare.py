"""Preparing: what is left out, what survives an interruption, and damage after the build."""

import concurrent.futures
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from fne_jax import prepare
from fne_jax.data.batches import BatchOrder, evaluation_images, training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import SPLITS
from fne_jax.data.preparation import image_shards, preparing, storage
from fne_jax.data.preparation.storage import SplitSummary
from fne_jax.data.sources.image_files import likely_reason
from fne_jax.data.sources.registry import load_split
from fne_jax.errors import Interrupted, UserError
from fne_jax.training.interruption import stop_signals
from fne_jax.training.loop import train_and_evaluate
from tests.support import TOP, sources
from tests.support.tiny import LinearTowers, tiny_config


def config_of(folder, **fields):
    return tiny_config(
        data__source="jsonl",
        data__dir=str(folder / "source"),
        data__cache_dir=str(folder / "cache"),
        **fields,
    )


def write_damaged(folder):
    """Writes good images and ten of each damaged kind; returns the kinds by image."""
    rows = sources.table_rows(folder)
    kinds = {}
    for kind, content in sources.DAMAGED_IMAGES.items():
        for number in range(10):
            name = f"images/{kind} {number}.jpg"
            kinds[name] = kind
            (folder / name).write_bytes(content(number))
            row = {"image": name, "caption": "Some words.", "split": "train"}
            rows.insert(7 * number, row | {"image_id": 1000 + len(kinds)})
    sources.write_jsonl(folder, rows)
    return kinds


def skipped(config):
    return [dataclasses.asdict(one) for one in preparing.prepare(config.data).skipped()]


def record_files(folder):
    files = (folder / "cache").rglob("*.array_record*")
    return sorted(file for file in files if "unfinished" not in file.parts)


def test_a_hundred_damaged_images(tmp_path):
    kinds = write_damaged(tmp_path / "source")
    assert len(kinds) == 100 and len(set(kinds.values())) == 10
    with pytest.raises(UserError) as error:
        load_split(config_of(tmp_path, data__max_skipped=99).data, 8, "train")
    message = str(error.value)
    assert "100 images or captions cannot be used" in message and "and 95 more" in message
    assert "line 1: " in message
    listing = next((tmp_path / "cache").rglob("skipped.json"))
    assert str(listing) in message and len(json.loads(listing.read_text())) == 100
    assert not record_files(tmp_path), "nothing half-built stays behind"

    config = config_of(tmp_path, data__max_skipped=100)
    listed = skipped(config)
    assert {entry["image"] for entry in listed} == {
        str(tmp_path / "source" / name) for name in kinds
    }
    assert all(entry["reason"] and "line " in entry["where"] for entry in listed)
    train = load_split(config.data, 8, "train")
    assert len(train.image_id) == 24 and "Some words." not in train.captions
    assert not list((tmp_path / "cache").rglob("unfinished/*/"))
    with pytest.raises(UserError, match=r"more than config.data.max_skipped, 99"):
        load_split(config_of(tmp_path, data__max_skipped=99).data, 8, "train")


def test_damaged_captions_and_missing_images(tmp_path, caplog):
    rows = sources.table_rows(tmp_path / "source")
    bad = list(sources.DAMAGED_CAPTIONS.values())
    assert rows[0]["image"] == "images/image0.jpg"
    rows += [rows[0] | {"caption": caption} for caption in bad]
    rows.append(rows[2])
    # An image all of whose captions are bad goes as well.
    sources.write_jsonl(
        tmp_path / "source", [row | {"caption": ""} if row["image"].endswith("e5.jpg") else row
                              for row in rows]
    )  # fmt: skip
    (tmp_path / "source" / "images" / "image7.jpg").unlink()
    listed = skipped(config_of(tmp_path, data__max_skipped=20))
    reasons = [entry["reason"] for entry in listed if entry["image"].endswith("e0.jpg")]
    starts = ["not text", "not text", "empty", "empty", "too long: 2002", "not text"]
    starts += ["'NaN', which stands for no value", "' #NAME? ', which", "a list written as text"]
    assert len(reasons) == len(starts)
    for reason, start in zip(reasons, starts, strict=True):
        assert reason.startswith(f"the caption is {start}")
    assert "1 captions repeat one of their image, such as" in caplog.text
    of_five = [entry["reason"] for entry in listed if entry["image"].endswith("e5.jpg")]
    assert of_five == ["the caption is empty: ''"] * 4 + ["no caption is left"]
    of_seven = [entry["reason"] for entry in listed if entry["image"].endswith("e7.jpg")]
    assert len(of_seven) == 1 and of_seven[0].startswith("there is no image")
    assert len(listed) == 15
    train = load_split(config_of(tmp_path, data__max_skipped=20).data, 8, "train")
    first = [c for c, o in zip(train.captions, train.caption_image, strict=True) if o == 0]
    assert len(train.image_id) == 22
    assert first == ["Image 0, seen 0 times.", "Image 0, seen 1 times."]


def test_a_split_that_is_lost(tmp_path):
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    for number in range(24, 29):
        (tmp_path / "source" / "images" / f"image{number}.jpg").write_bytes(b"")
    reasons = r"'val' can be used:(\n  .*line \d+: the file is empty){5}\nAll are listed in .*json"
    with pytest.raises(UserError, match=reasons):
        load_split(config_of(tmp_path, data__max_skipped=99).data, 8, "train")


@pytest.fixture
def checked(monkeypatch):
    """The contents that were looked at, in no order."""
    contents = []
    real = image_shards.usable_jpeg

    def spy(content, resize_to):
        contents.append(content)
        return real(content, resize_to)

    monkeypatch.setattr(image_shards, "usable_jpeg", spy)
    return contents


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Calls `prepare` in this process on a table of its own; its signal handlers do not stay."""
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    old = {number: signal.getsignal(number) for number in stop_signals()}
    monkeypatch.setattr(image_shards, "IMAGES_PER_SHARD", 10)

    def call(*arguments):
        prepare.main(
            [
                f"--config={TOP / 'configs' / 'base.py'}",
                "--config.data.source=jsonl",
                f"--config.data.dir={tmp_path / 'source'}",
                f"--config.data.cache_dir={tmp_path / 'cache'}",
                "--processes=1",
                *arguments,
            ]
        )

    yield call
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hangup_is_heard")
def test_an_interrupted_build_goes_on_where_it_was(
    tmp_path, command, checked, monkeypatch, capsys, number
):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    spy = image_shards.usable_jpeg

    def stop_in_the_fourth_shard(content, resize_to):
        if len(checked) == 25:
            os.kill(os.getpid(), number)
        return spy(content, resize_to)

    monkeypatch.setattr(image_shards, "usable_jpeg", stop_in_the_fourth_shard)
    with pytest.raises(Interrupted) as stop:
        command()
    assert stop.value.exit_code == 128 + number
    assert not record_files(tmp_path)

    monkeypatch.setattr(image_shards, "usable_jpeg", spy)
    command()
    assert "train        24 images        72 captions" in capsys.readouterr().out
    command()
    assert len(set(checked)) == 35 and len(set(checked[:24])) == 24
    assert not set(checked[:24]) & set(checked[24:]), "of finished shards nothing is done twice"


def test_only_shards_of_images_that_have_changed_are_made_again(tmp_path, command, checked):
    images = tmp_path / "source" / "images"
    good = (images / "image3.jpg").read_bytes()
    (images / "image3.jpg").write_bytes(good[:300])
    with pytest.raises(UserError, match="1 images or captions cannot be used"):
        command()
    assert len(checked) == 35
    (images / "image3.jpg").write_bytes(good)
    (images / "image9.jpg").write_bytes(sources.jpeg(99, width=50))
    command()
    assert checked[35:] == [(images / f"image{n}.jpg").read_bytes() for n in range(10)]


def test_a_mended_caption_has_no_image_looked_at(tmp_path, command, checked):
    command()
    rows = sources.table_rows(tmp_path / "same" / "source")
    rows[0]["caption"] = "Mended."
    sources.write_jsonl(tmp_path / "source", rows)
    command()
    assert len(checked) == 35
    train = load_split(config_of(tmp_path).data, 8, "train")
    assert train.captions[0] == "Mended." and train.images[0]["image"] == sources.jpeg(0, width=30)
    folders = [path.parent for path in (tmp_path / "cache").rglob("prepared.json")]
    files = [{file.stat().st_ino for file in folder.glob("*.array_record*")} for folder in folders]
    assert files[0] == files[1], "both datasets have the same files"


@pytest.mark.parametrize("outcomes", [None, "", "[]", '[["00", "", null]]'])
def test_damaged_notes_of_a_shard_have_it_made_again(tmp_path, command, checked, outcomes):
    command()
    path = next(path for path in (tmp_path / "cache").rglob("*.json") if len(path.stem) == 32)
    count = len(json.loads(path.read_text()))
    path.unlink()
    if outcomes is not None:
        path.write_text(outcomes)
    rows = sources.table_rows(tmp_path / "same" / "source")
    sources.write_jsonl(tmp_path / "source", [rows[0] | {"caption": "Mended."}, *rows[1:]])
    command()
    assert len(checked) == 35 + count
    assert len(load_split(config_of(tmp_path).data, 8, "train").image_id) == 24


def test_a_table_that_changes_while_it_is_prepared_is_read_by_the_next_command(
    tmp_path, command, monkeypatch
):
    rows = sources.table_rows(tmp_path / "same" / "source")
    real = image_shards.usable_jpeg

    def change_table(content, resize_to):
        sources.write_jsonl(tmp_path / "source", [rows[0] | {"caption": "Mended."}, *rows[1:]])
        return real(content, resize_to)

    with monkeypatch.context() as patch:
        patch.setattr(image_shards, "usable_jpeg", change_table)
        command()
    assert load_split(config_of(tmp_path).data, 8, "train").captions[0] == "Mended."


def test_a_second_table_in_the_folder_is_noticed(tmp_path, command):
    command()
    shutil.copy(tmp_path / "source" / "pairs.jsonl", tmp_path / "source" / "more.jsonl")
    with pytest.raises(UserError, match=r"expected one \*.jsonl .* found more.jsonl, pairs.jsonl"):
        command()


def test_a_disk_that_is_full_at_the_end_loses_no_shard(tmp_path, command, checked, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_notes", full)
        with pytest.raises(UserError, match="No space left"):
            command()
    command()
    assert len(checked) == 35


def test_copies_of_images_are_told(tmp_path, command, capsys, monkeypatch):
    images = tmp_path / "source" / "images"
    for copy, of in ((30, 2), (3, 2), (5, 4)):
        (images / f"image{copy}.jpg").write_bytes((images / f"image{of}.jpg").read_bytes())
    command()
    said = capsys.readouterr().out
    assert "5 images are byte-for-byte copies of 2, 1 of which occur in several splits" in said
    monkeypatch.setattr(prepare, "write_atomically", None)  # of a disk that can only be read
    command()
    assert capsys.readouterr().out == said
    (path,) = (tmp_path / "cache").rglob("copies.json")
    expected = [[("train", 2), ("train", 3), ("test", 30)], [("train", 4), ("train", 5)]]
    assert json.loads(path.read_text()) == [
        [[split, str(images / f"image{number}.jpg")] for split, number in group]
        for group in expected
    ]


@pytest.mark.parametrize(
    ("listed", "file", "reason"),
    [
        ("images\\a.jpg", "images/a.jpg", "with / in place of \\: "),
        ("images/a.jpg ", "images/a.jpg", "without the spaces around its name: "),
        ("images/caf\u00e9.jpg", "images/cafe\u0301.jpg", "in another Unicode form (NFC, or NFD"),
        ("images/cafe\u0301.jpg", "images/caf\u00e9.jpg", "in another Unicode form (NFC, or NFD"),
        ("~/a.jpg", None, "; write ~ out as the home folder"),
        ("https://example.org/a.jpg", None, "; it is a URL: download the image"),
        ("images/none.jpg", None, ""),
    ],
)
def test_the_likely_reason_for_a_missing_image_is_named(tmp_path, listed, file, reason):
    (tmp_path / "images").mkdir()
    if file is not None:
        (tmp_path / file).write_bytes(b"")
    said = likely_reason(str(tmp_path / listed))
    assert reason in said and bool(reason) == bool(said)
    assert file is None or repr(str(tmp_path / file)) in said


def test_two_at_once_prepare_once_and_remove_what_a_killed_one_left(tmp_path, checked, caplog):
    """Locks are of open files, so threads that open them each are as good as processes."""
    folder = tmp_path / "data [1]"
    sources.write_jsonl(folder / "source", sources.table_rows(folder / "source"))
    data = config_of(folder).data
    prepared = preparing.prepare(data).folder
    shutil.rmtree(prepared)
    leftover = prepared.with_name(f"{prepared.name}.12345678.incomplete")
    other = prepared.parent / "unfinished" / "other"
    for path in (leftover, other):
        path.mkdir()
    checked.clear()
    with (
        caplog.at_level(logging.INFO, logger="fne_jax"),
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        first, second = pool.map(preparing.prepare, [data] * 2)
    assert first == second and len(checked) == 35 and not leftover.exists()
    assert f"{other}: of another dataset, not finished; may be deleted" in caplog.text
    assert load_split(data, 8, "val").images[0]["image"] == sources.jpeg(24, width=32)


def test_a_full_disk_is_one_line(tmp_path, command, monkeypatch):
    class Full:
        def __init__(self, *arguments):
            pass

        def is_open(self):
            return True

        def close(self, record=b""):
            raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device\nand more")

        write = close

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(UserError, match=r"cannot be written: .* on device; make room") as error:
            command()
    assert error.value.exit_code == 74 and "\n" not in str(error.value)
    command()


def test_a_test_split_alone_is_enough_to_evaluate_on(tmp_path):
    rows = [row | {"split": "test"} for row in sources.table_rows(tmp_path / "source")]
    sources.write_jsonl(tmp_path / "source", rows)
    config = config_of(tmp_path)
    assert len(load_split(config.data, 8, "test").image_id) == 35
    with pytest.raises(UserError, match="no image of the split 'train'; it has test alone"):
        load_split(config.data, 8, "train")


def test_an_image_that_changes_while_it_is_prepared(tmp_path, command, monkeypatch):
    changing = tmp_path / "source" / "images" / "image12.jpg"
    real = image_shards.read_bytes

    def read_then_change(image):
        content = real(image)
        if os.fspath(image) == str(changing):
            changing.write_bytes(sources.jpeg(77))
        return content

    with monkeypatch.context() as patch:
        patch.setattr(image_shards, "read_bytes", read_then_change)
        with pytest.raises(UserError, match=r"image12.jpg: has changed since it was listed"):
            command()
    assert not record_files(tmp_path)
    command()
    assert load_split(config_of(tmp_path).data, 8, "train").images[12]["image"] == sources.jpeg(77)


def test_the_checksum_depends_on_the_records_alone(tmp_path, monkeypatch):
    rows = sources.table_rows(tmp_path / "source")
    for row in rows:
        del row["image_id"]
    sources.write_jsonl(tmp_path / "source", rows)
    summaries = []
    for workers, shard in ((1, 100), (5, 7)):
        monkeypatch.setattr(os, "cpu_count", lambda workers=workers: workers)
        monkeypatch.setattr(image_shards, "IMAGES_PER_SHARD", shard)
        config = config_of(tmp_path)
        config.data.cache_dir = str(tmp_path / f"cache{workers}")
        prepared = preparing.prepare(config.data)
        for split in SPLITS:
            prepared.check(split)
        summaries.append(prepared.summaries)
        assert len(prepared.shards) == (3 if shard == 100 else 6)
    assert summaries[0] == summaries[1]
    # As when captions lay in the records themselves.
    assert summaries[0]["val"] == SplitSummary(5, 14, "5178a056fe942bd0")
    assert len({summary.checksum for summary in summaries[0].values()}) == 3


def test_the_same_table_beside_other_images_is_another_dataset(tmp_path):
    config = {}
    for number, name in enumerate(("one", "two")):
        rows = sources.table_rows(tmp_path / name / "source")
        sources.write_jsonl(tmp_path / name / "source", rows)
        (tmp_path / name / "source" / "images" / "image0.jpg").write_bytes(sources.jpeg(number))
        for path in sorted((tmp_path / name / "source" / "images").iterdir()):
            os.utime(path, ns=(0, 0))  # as copies have that keep the times
        config[name] = config_of(tmp_path / name)
        config[name].data.cache_dir = str(tmp_path / "cache")
    for number, name in enumerate(("one", "two")):
        assert load_split(config[name].data, 8, "train").images[0]["image"] == sources.jpeg(number)
    before = record_files(tmp_path)
    load_split(config["one"].data, 8, "train")
    assert record_files(tmp_path) == before, "what has not changed is not prepared again"


def test_changed_and_deleted_images_are_never_served_as_they_were(tmp_path, command):
    command()
    path = tmp_path / "source" / "images" / "image12.jpg"
    size = len(path.read_bytes())
    other = sources.jpeg(3, width=20)
    other += bytes(size - len(other))  # after the end, where nothing is read
    path.write_bytes(other)
    assert path.stat().st_size == size
    assert load_split(config_of(tmp_path).data, 8, "train").images[12]["image"] == other
    path.unlink()
    with pytest.raises(UserError, match=r"there is no image .*image12\.jpg"):
        load_split(config_of(tmp_path).data, 8, "train")


def test_a_mended_image_is_taken_up(tmp_path, command):
    path = tmp_path / "source" / "images" / "image3.jpg"
    good = path.read_bytes()
    path.write_bytes(good[:300])
    command("--config.data.max_skipped=1")
    path.write_bytes(good)
    command("--config.data.max_skipped=0")
    train = load_split(config_of(tmp_path).data, 8, "train")
    assert len(train.image_id) == 24 and train.images[3]["image"] == good


def test_an_image_that_cannot_be_read_for_now_is_not_left_out(tmp_path, command, monkeypatch):
    real = type(epath.Path("/")).read_bytes

    def read(path):
        if path.name == "image3.jpg":
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("/")), "read_bytes", read)
        with pytest.raises(UserError, match=r"image3.jpg: cannot be read: .*Input/output error"):
            command("--config.data.max_skipped=9")
    assert not record_files(tmp_path)
    command()
    assert len(load_split(config_of(tmp_path).data, 8, "train").image_id) == 24


def test_the_identity_is_that_of_the_data(tmp_path):
    def identity(name, image=0, split="train", **change):
        rows = sources.table_rows(tmp_path / name / "source")
        sources.write_jsonl(tmp_path / name / "source", [rows[0] | change, *rows[1:]])
        (tmp_path / name / "source" / "images" / "image0.jpg").write_bytes(sources.jpeg(image))
        return load_split(config_of(tmp_path / name).data, 8, split).identity

    first = identity("first")
    assert (first.pairs, first.images, len(first.checksum)) == (72, 24, 16)
    assert identity("elsewhere") == first
    others = [
        identity("pixels", image=1),
        identity("words", caption="Other words."),
        identity("validation", split="val"),
    ]
    assert len({first, *others}) == 4


def test_prepared_data_stand_by_themselves_wherever_they_are_copied(tmp_path):
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    data = config_of(tmp_path).data
    before = {split: load_split(data, 8, split) for split in SPLITS}
    preparing.prepare(data).folder.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "source")
    data.update(source="prepared", dir=str(tmp_path / "moved"), cache_dir=str(tmp_path / "none"))
    for split, made in before.items():
        opened = load_split(data, 8, split)
        assert (opened.identity, opened.image_names) == (made.identity, made.image_names)
        assert Image.open(io.BytesIO(opened.image(2))).size
    assert not (tmp_path / "none").exists()
    data.dir = str(tmp_path / "cache")
    with pytest.raises(UserError, match="cache: expected a folder that `prepare` has"):
        load_split(data, 8, "test")


def test_smaller_images_are_another_dataset(tmp_path, command, capsys):
    command()
    full = capsys.readouterr().out
    command("--config.data.resize_to=16")
    small = capsys.readouterr().out
    assert "checksum" in full and set(full.split()) != set(small.split())
    train = load_split(config_of(tmp_path, data__resize_to=16).data, 8, "train")
    for record in train.images:
        with Image.open(io.BytesIO(record["image"])) as image:
            assert min(image.size) == 16
    assert len(record_files(tmp_path)) == 10, "training has found it"


def test_a_table_may_have_any_name(tmp_path):
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    name = "größte Paare [1] 100% ~*" + "x" * 150
    (tmp_path / "source" / "pairs.jsonl").rename(tmp_path / "source" / f"{name}.jsonl")
    assert len(load_split(config_of(tmp_path).data, 8, "train").image_id) == 24


def test_preparing_needs_no_accelerator(command, monkeypatch):
    def start():
        raise RuntimeError("the accelerator is started")

    monkeypatch.setattr(jax, "device_count", start)
    monkeypatch.setattr(jax, "devices", start)
    command("--config.global_batch_size=7")


def test_captions_that_training_cuts_are_told(tmp_path, command, capsys):
    (table,) = (tmp_path / "source").glob("*.jsonl")
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row, end in zip(rows, "ab", strict=False):
        row["caption"] = f"{'word ' * 30}{end}"
    sources.write_jsonl(tmp_path / "source", rows)
    command()
    told = capsys.readouterr().out
    assert f"2 of {len(rows)} captions" in told and "equal to another in what is left" in told
    assert "val has 5 images only: by chance alone its recall at 10 is 100 %" in told


def test_there_is_nothing_to_prepare_in_memory(command):
    with pytest.raises(UserError, match="nothing to prepare"):
        command("--config.data.source=synthetic")


def tokens_of(dataset):
    ids = np.zeros((len(dataset.captions), 3), np.int32)
    return ids, np.ones_like(ids)


def test_a_flipped_byte_in_a_prepared_file_names_the_record(tmp_path, command, capsys):
    command()
    file = record_files(tmp_path)[1]
    content = bytearray(file.read_bytes())
    place = content.index(sources.jpeg(17, width=36)[-200:-100])
    content[place] ^= 0xFF
    file.write_bytes(bytes(content))

    def read():
        list(load_split(config_of(tmp_path).data, 8, "train").images)

    for call in (read, lambda: command("--check")):
        named = r"record 17 of the split train in .*, made of .*/image17\.jpg, is damaged"
        with pytest.raises(UserError, match=named) as e:
            call()
        assert "\n" not in str(e.value)


def test_files_that_were_exchanged_are_noticed(tmp_path, command, monkeypatch):
    command()
    (tmp_path / "cache").rename(tmp_path / "other")
    (tmp_path / "source" / "images" / "image5.jpg").write_bytes(sources.jpeg(5, width=60))
    command()
    for path in record_files(tmp_path):
        path.write_bytes(next((tmp_path / "other").rglob(path.name)).read_bytes())
    with pytest.raises(UserError, match=r"record 5 of the split train .*not the image that was"):
        command("--check")
    next((tmp_path / "cache").rglob("train.arrow")).write_bytes(
        next((tmp_path / "cache").rglob("val.arrow")).read_bytes()
    )
    with pytest.raises(UserError, match=r"train\.arrow: is damaged: not as it was written; delete"):
        command("--check")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        # Arrow would crash, or read whatever it finds.
        ("train.arrow", lambda c: c.replace(b"Image 0,", b"Image \xff,"), "not as it was written"),
        ("inputs.arrow", lambda c: c[:-9] + b"\0" + c[-8:], "not as it was written"),
        ("prepared.json", lambda c: c.replace(b'"val"', b'"vol"'), "is damaged: 'val'"),
        ("prepared.json", lambda c: c.replace(b'"images": 5', b'"images": 6'), "val was written w"),
        ("captioned_images-images.array_record-00003-of-00005", lambda c: c[: len(c) // 2],
         r"record 0 of the split val in .* is damaged \(it is empty\); delete that folder, and"),
    ],
)  # fmt: skip
def test_damage_to_each_file_is_noticed(tmp_path, command, name, damage, message):
    command()
    (path,) = (tmp_path / "cache").rglob(name)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(UserError, match=message):
        command("--check")


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A dataset whose record 11 of train and 2 of val hold JPEGs that end early."""
    sources.write_jsonl(tmp_path / "source", sources.table_rows(tmp_path / "source"))
    bad = [sources.jpeg(n, width=30 + n % 11) for n in (11, 26)]
    monkeypatch.setattr(
        image_shards,
        "usable_jpeg",
        lambda content, _: content[:300] if content in bad else content,
    )
    return config_of(tmp_path, global_batch_size=8, evaluation__batch_size=8)


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_a_damaged_jpeg_in_a_record_is_named_while_reading(damaged, augmentation):
    train = load_split(damaged.data, 8, "train")
    rows = BatchOrder(0, len(train.captions), 8).rows(range(9))
    batches = training_batches(train, tokens_of(train), rows, TrainingImages(8, augmentation, 0))
    with pytest.raises(UserError, match=r"record 11 .*made of .*/image11\.jpg, is damaged"):
        list(batches)
    with pytest.raises(UserError, match=r"record 2 of .*made of .*/image26\.jpg, is damaged"):
        list(evaluation_images(load_split(damaged.data, 8, "val"), 8, 8))


def test_a_damaged_record_ends_training_with_its_name(damaged, tmp_path):
    with pytest.raises(UserError, match=r"record 11 of the split train in .* is damaged"):
        train_and_evaluate(damaged, tmp_path / "run", module=LinearTowers())


# What a run does, in a process of its own: it reads batches until something ends it.
READS = """
import sys
import numpy as np
from fne_jax import command_line
from fne_jax.data import batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.sources.registry import load_split
from fne_jax.data.preparation.storage import RecordSource
from tests.support.tiny import tiny_config

class Damaged(RecordSource):
    def __getitems__(self, indices):
        read = super().__getitems__(indices)
        return [r | {"image": r["image"][:300]} if i == 11 else r for i, r in zip(indices, read)]

def main(arguments):
    source, cache, what = arguments
    config = tiny_config(data__source="jsonl", data__dir=source, data__cache_dir=cache)
    train = load_split(config.data, 8, "train")
    if what == "a damaged record":
        train.images.__class__ = Damaged
    tokens = np.zeros((len(train.captions), 3), np.int32)
    rows = batches.BatchOrder(0, len(tokens), 8).rows(range(9000))
    make_image = TrainingImages(128, "crop_flip", 0)
    for batch in batches.training_batches(train, (tokens, tokens), rows, make_image):
        if what == "another error":
            raise command_line.UserError("another error")

command_line.run(main)
"""


def assert_ends_with_one_line(folder, what, message):
    arguments = [str(folder / "source"), str(folder / "cache"), what]
    ended = subprocess.run(
        [sys.executable, "-c", READS, *arguments],
        cwd=TOP, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ") and message in lines[0]


def test_an_error_while_reading_ends_the_process_with_one_line(tmp_path, command):
    command()
    assert_ends_with_one_line(tmp_path, "a damaged record", "images/image11.jpg, is damaged")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_errors_while_reading_end_the_process_each_time(tmp_path, command, number):
    command()
    assert_ends_with_one_line(tmp_path, "a damaged record", "images/image11.jpg, is damaged")
    assert_ends_with_one_line(tmp_path, "another error", "another error")
