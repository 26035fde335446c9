"""Datasets of many files, on disk or elsewhere: which files there are, and of which splits."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import fsspec

from fne_jax.errors import UserError
from fne_jax.files import as_user_error, expand_home, files_below

_SPLIT_WORD = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|test)(?:$|[^a-z])")
_SPLIT_OF = {"train": "train", "test": "test"}  # all other words mean val
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def named_by(pattern: str, endings: Sequence[str]) -> list[str]:
    """Returns the files that `config.data.dir` names, in the order of their names.

    Args:
      pattern: A folder, whose files and those below it are taken by their endings in any case; or a
        path or an URL of files, in which `*`, `?`, `{a,b}` and `{000..009}` stand for several.
      endings: The endings, such as ".tar".

    Raises UserError if there is none, and with what fsspec asks for where it cannot read an URL.
    """
    where, kinds = f"config.data.dir is {pattern!r}", " or ".join(endings)
    found: list[str] = []
    with as_user_error(where, errors=(OSError, ValueError, ImportError)):
        remote = "://" in pattern
        whole = pattern if remote else os.path.abspath(expand_home(pattern))
        for one in [whole] if os.path.exists(whole) else _without_braces(whole):
            system, path = fsspec.core.url_to_fs(one)
            if system.isdir(path):
                there = system.find(path) if remote else files_below(path)
                some = [name for name in there if name.lower().endswith(tuple(endings))]
            elif system.isfile(path):  # whatever characters its name has
                some = [path]
            else:
                literal = path.replace("[", "[[]")  # part of a name, not of a pattern
                some = [name for name in system.glob(literal) if system.isfile(name)]
            if not some:
                raise UserError(f"there is no {kinds} file {one}")
            found += [system.unstrip_protocol(name) if remote else name for name in some]
    return sorted(set(found))


def splits_of(paths: Sequence[str]) -> dict[str, str]:
    """Returns the split of each file by its name, or its folder's; "" for all where none tells one.

    Folders that all of them lie in tell nothing. Raises UserError if only some tell a split.
    """
    shared = len(os.path.commonpath([os.path.dirname(path) for path in paths]))
    splits = {}
    for path in paths:
        folder, name = os.path.split(path[shared:].lower())
        words = _SPLIT_WORD.findall(name) or _SPLIT_WORD.findall(folder)
        splits[path] = _SPLIT_OF.get(words[-1], "val") if words else ""
    told = [path for path in paths if splits[path]]
    if told and len(told) < len(paths):
        untold = next(path for path in paths if not splits[path])
        raise UserError(
            f"{untold}: its name tells no split, while that of {told[0]} does; name all files by "
            "train, val or test, or none"
        )
    return splits


def _without_braces(pattern: str) -> list[str]:
    """Returns the patterns that braces stand for: `{a,b}`, `{000..009}`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = numbers.groups()
        if int(first) > int(last):
            raise UserError(f"{match[0]} stands for no number; give the smaller one first")
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [one for part in parts for one in _without_braces(before + part + after)]
