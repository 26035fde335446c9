"""Files appear whole or not at all, and nothing half-written stays behind."""

import os

import pytest
from etils import epath

from fne_jax.errors import UserError
from fne_jax.files import (
    as_user_error,
    check_writable,
    folder_name,
    whole_folder,
    write_atomically,
)


@pytest.mark.parametrize(
    ("advice", "error", "message", "exit_code"),
    [
        ("make room", OSError(28, "No space"), "a.txt: [Errno 28] No space; make room", 74),
        ("", FileNotFoundError(2, "No such file"), "a.txt: [Errno 2] No such file", 2),
        ("", ValueError("\nno JSON\nat all"), "a.txt: no JSON", 2),
        ("", UserError("two\nlines"), "a.txt: two\nlines", 2),
    ],
)
def test_an_error_is_told_with_its_file(advice, error, message, exit_code):
    with (
        pytest.raises(UserError) as told,
        as_user_error("a.txt", advice, (OSError, ValueError, UserError)),
    ):
        raise error
    assert str(told.value) == message and told.value.exit_code == exit_code


def test_other_errors_pass():
    with pytest.raises(ValueError, match="other"), as_user_error("a.txt"):
        raise ValueError("other")


@pytest.mark.parametrize("content", ["new\n", b"\x00new"])
@pytest.mark.parametrize("kind", [lambda path: path, epath.Path])
def test_a_file_is_replaced(tmp_path, content, kind):
    path = kind(tmp_path / "a.txt")
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a character \ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_pipe_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "a.csv", tmp_path / "folder"):
        with pytest.raises(OSError) as error:
            write_atomically(path, "x")
        assert str(error.value).endswith(f": {str(path)!r}")


def test_what_cannot_be_written_is_told_before_it_is_made(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "page.html", "--out")
    (tmp_path / "file").write_text("")
    for path, folder, told in (
        (tmp_path, False, "is a folder; expected a file"),
        (tmp_path / "file", True, "is a file; expected a folder"),
        (tmp_path / "file" / "page.html", False, "/file is a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=f"--out={path}: .*{told}"):
            check_writable(path, "--out", folder=folder)
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path
    )  # root may write anywhere
    with pytest.raises(UserError, match=r"page.html cannot be written: no permission for .*--out"):
        check_writable(tmp_path / "new" / "page.html", "--out")


def test_the_cache_of_the_hub_is_only_read(tmp_path):
    snapshot = tmp_path / "models--anna--run" / "snapshots" / ("0123456" + 33 * "c")
    snapshot.mkdir(parents=True)
    assert folder_name(snapshot) == "anna/run@0123456"
    told = "the cache of the Hugging Face hub is only read"
    with pytest.raises(UserError, match=f"a.json cannot be written: {told}; give another --out"):
        check_writable(snapshot / "a.json", "--out")
    with pytest.raises(PermissionError, match=told):
        write_atomically(snapshot / "a.json", "{}")
    assert not list(snapshot.iterdir())


def test_a_folder_appears_when_its_block_ends(tmp_path):
    with whole_folder(tmp_path / "new") as scratch:
        (scratch / "inside").write_text("x")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "inside").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_block_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="inside"), whole_folder(tmp_path / "new") as scratch:
        (scratch / "inside").write_text("x")
        raise ValueError("inside")
    assert not list(tmp_path.iterdir())
