"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from fne_jax.errors import (
    EnvironmentFailure,
    UserError,
    first_line,
    is_environment_failure,
)

_INCOMPLETE = ".incomplete"
# What the Hugging Face hub's client downloads, and gives again to whoever asks for that commit.
_SNAPSHOT = re.compile(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{7})[0-9a-f]{33}(?=/|$)")
_ONLY_READ = "the cache of the Hugging Face hub is only read"
AnyPath = pathlib.Path | epath.Path
AnyError = type[Exception] | tuple[type[Exception], ...]
_log = logging.getLogger(__name__)
# What file systems answer that know no locks, such as some mounts of buckets.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def as_user_error(where: str, advice: str = "", errors: AnyError = OSError) -> Iterator[None]:
    """Turns errors of the block into a UserError in one line: `where: what the error says; advice`.

    Args:
      where: The file, field or flag, and what could not be done with it.
      advice: What to do; "" where that is plain.
      errors: Which errors; others pass.

    Raises:
      UserError: From such an error, which tells whether the machine failed.
    """
    try:
        yield
    except errors as error:
        said = str(error) if isinstance(error, UserError) else first_line(error)
        # By its class, since a process that gives it to another loses what it came from.
        failed = is_environment_failure(error) or isinstance(error, EnvironmentFailure)
        kind = EnvironmentFailure if failed else UserError
        raise kind(f"{where}: {said}{advice and f'; {advice}'}") from error


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes a file under another name first, so that a reader finds the old one or the new one.

    A device or a pipe is written to.

    Args:
      path: a local file, or a remote one as far as epath reaches.
      content: the whole file.

    Raises:
      OSError: if it cannot be written; whatever was there before still is.
    """
    content = content if isinstance(content, bytes) else content.encode()
    # A device or a pipe, as /dev/null, which root would replace by a file.
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        path.write_bytes(content)
        return
    scratch = _scratch_beside(path)
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # not the scratch file, nor none where the disk is full
            error.filename = str(path)
            del error.filename2
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder that takes the given name once the block has ended without an error.

    Args:
      folder: a local folder that does not exist yet, or is empty.

    Raises:
      OSError: if it cannot be created or renamed.
    """
    scratch = _scratch_beside(folder)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def remove_leftovers(path: pathlib.Path) -> None:
    """Removes what killed writers of a file or folder left beside it, as far as that is possible.

    Args:
      path: a path that nobody writes meanwhile.

    Raises:
      OSError: if the folder cannot be listed.
    """
    for scratch in path.parent.glob(f"{path.name}.*{_INCOMPLETE}"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                scratch.unlink()


@contextlib.contextmanager
def locked(path: pathlib.Path, on_held: Callable[[str], None], no_locks: str) -> Iterator[None]:
    """Holds an operating-system lock on a file, which is created, while the block runs.

    The lock ends with the process, so none is left behind.

    Args:
      path: The file, whose folder exists; it tells which process holds it.
      on_held: Called with what the file tells if another process holds it. Unless this raises, that
        process is waited for.
      no_locks: What to do, for the warning where the file system has no locks.

    Raises:
      OSError: If the file cannot be opened, locked or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_held(os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "just begun")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: no locks here (%s): %s", path.parent, error, no_locks)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def files_below(folder: str | os.PathLike) -> Iterator[str]:
    """Yields the paths of the files in a folder and those below it, also in folders that are links.

    Each folder counts once, though links lead to it from several places or in a circle. Files and
    folders whose names begin with a dot are left out: they are programs' own, as the `._photo.jpg`
    that macOS leaves on cards.

    Raises:
      OSError: If a folder cannot be listed.
    """

    def refuse(error):
        raise error

    tops, seen = [os.fspath(folder)], set()  # links come after all others
    for parent, folders, names in (found for top in tops for found in os.walk(top, onerror=refuse)):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tops += filter(os.path.islink, (os.path.join(parent, name) for name in folders))
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def expand_home(path: str | os.PathLike) -> str:
    """Returns a path with the home folder of a user in place of a leading `~` or `~name`.

    Raises:
      UserError: If there is no such user, or the path is empty, which pathlib would take for the
        working directory.
    """
    if not os.fspath(path):
        raise UserError("'' is no path; expected that of a file or folder")
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(
            f"{os.fspath(path)!r}: there is no user of that name, whose home folder {user} "
            f"would be; for a file or folder of that name write ./{user}"
        )
    return expanded


def local_folder(text: str, flag: str) -> pathlib.Path:
    """Returns the folder that a flag names, `~` being the user's home.

    Args:
      text: What was given.
      flag: The flag, for the message.

    Raises:
      UserError: If it is no path of this machine's file systems, or `~` stands for nobody's home.
    """
    if "://" in text:
        raise UserError(
            f"{flag}={text}: expected a folder on a mounted file system; mount the bucket, or "
            "train on a disk and copy the folder afterwards"
        )
    if not text or "\0" in text:
        raise UserError(f"{flag}={text!r}: expected the path of a folder")
    return pathlib.Path(expand_home(text))


def check_writable(path: pathlib.Path, flag: str, *, folder: bool = False) -> None:
    """Checks that a file or folder can be written, before hours are spent on what it will hold.

    Args:
      path: The file or folder; it and folders above it may not exist yet.
      flag: The flag that gives another, for the message.
      folder: Whether it is to be a folder.

    Raises:
      UserError: If it is a file where it should be a folder, or the reverse, below a file, or this
        process must not write there, as into the hub's cache.
    """
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there.is_dir() != (folder or there is not path):
        kinds = ("file", "folder") if there.is_file() else ("folder", "file")
        raise UserError(f"{flag}={path}: {there} is a {kinds[0]}; expected a {kinds[1]}")
    cached = _SNAPSHOT.search(os.path.abspath(path))
    if cached or not os.access(there, os.W_OK):
        why = _ONLY_READ if cached else f"no permission for {there}"
        raise UserError(f"{path} cannot be written: {why}; give another {flag}")


def folder_name(folder: pathlib.Path) -> str:
    """Returns the name of a folder, OWNER/NAME@COMMIT of one in the Hugging Face hub's cache."""
    cached = _SNAPSHOT.search(os.path.abspath(folder))
    return cached.expand(r"\1/\2@\3") if cached else folder.resolve().name


def refuse_snapshot(path: AnyPath) -> None:
    """Raises PermissionError if a path is in the cache of the Hugging Face hub."""
    if _SNAPSHOT.search(os.path.abspath(path)):
        raise PermissionError(errno.EACCES, _ONLY_READ, str(path))


def check_new_folder(path: pathlib.Path, flag: str) -> None:
    """Checks that a folder can be made, or is there and empty, before any work for it.

    Args:
      path: The folder.
      flag: The flag that gives another, for the message.

    Raises:
      UserError: If it holds anything, or as for `check_writable`.
    """
    check_writable(path, flag, folder=True)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{flag}={path} already exists and is not empty; give another")


def _scratch_beside(path):
    refuse_snapshot(path)
    # A name of its own for each writer: processes that share a file system may write at once.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_INCOMPLETE}")
