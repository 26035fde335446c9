"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

from fne_jax.errors import UserError

_INCOMPLETE = ".incomplete"
AnyPath = pathlib.Path | epath.Path
# What file systems answer that know no locks, such as some mounts of buckets.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes a file under another name first, so that a reader finds the old one or the new one.

    Args:
      path: a local file, or a remote one as far as epath reaches.
      content: the whole file.

    Raises:
      OSError: if it cannot be written; whatever was there before still is.
    """
    scratch = _scratch_beside(path)
    try:
        if isinstance(content, bytes):
            scratch.write_bytes(content)
        else:
            scratch.write_text(content, encoding="utf-8")
        scratch.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # of a disk that is full, Python does not say the file
            error.filename = error.filename or str(path)
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


def local_folder(text: str, flag: str) -> pathlib.Path:
    """Returns the folder that a flag names, `~` being the user's home.

    Args:
      text: What was given.
      flag: The flag, for the message.

    Raises:
      UserError: If it is no path of this machine's file systems.
    """
    if "://" in text:
        raise UserError(
            f"{flag}={text}: expected a folder on a mounted file system; mount the bucket, or "
            "train on a disk and copy the folder afterwards"
        )
    if not text or "\0" in text:
        raise UserError(f"{flag}={text!r}: expected the path of a folder")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # `~nobody`
        raise UserError(f"{flag}={text}: {error}") from error


def _scratch_beside(path):
    # A name of its own for each writer: processes that share a file system may write at once.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_INCOMPLETE}")
