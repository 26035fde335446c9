"""The Markdown of README.md and docs/: its blocks of code, and what marks say of them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex

from tests.support import TOP

# A fence with its language and title, and what a comment on the line before says of the block.
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>(?:not run|run by): .*?) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
      page: The page's path below the top level.
      line: The line on which it begins.
      language: What stands behind the fence, e.g. `bash`.
      title: The file that it belongs to, or "".
      code: What stands in it.
      mark: `not run: REASON`, `run by: TEST`, or "" without a mark.
    """

    page: str
    line: int
    language: str
    title: str
    code: str
    mark: str

    @property
    def commands(self) -> list[list[str]]:
        """Its commands, split into words, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> list[pathlib.Path]:
    """Returns README.md and the pages that mkdocs.yml names."""
    nav = (TOP / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    return [
        TOP / "README.md",
        *(TOP / "docs" / name for name in re.findall(r"(\S+\.md)$", nav, re.MULTILINE)),
    ]


def blocks(page: pathlib.Path) -> list[Block]:
    """Returns the blocks of a page, from the top."""
    text = page.read_text("utf-8")
    return [
        Block(
            page=str(page.relative_to(TOP)),
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            title=found["title"] or "",
            code=found["code"],
            mark=found["mark"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def section(page: str, heading: str) -> str:
    """Returns what stands below a heading of docs/, up to the next of its level or a higher one."""
    text = (TOP / "docs" / page).read_text("utf-8")
    below = text[text.index(f"\n{heading}\n") + len(heading) + 2 :]
    # A comment in a block of code is no heading.
    plain = re.sub(r"^```.*?^```$", lambda code: " " * len(code[0]), below, flags=re.M | re.S)
    level = len(heading) - len(heading.lstrip("#"))
    end = re.search(rf"^#{{1,{level}}} ", plain, re.MULTILINE)
    return below[: end.start()] if end else below


def patched(source: str, diff: str) -> str:
    """Returns a text with a diff applied; its hunks are parted by lines that begin with @@."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        # Editors strip the space that stands before an empty line.
        lines = [line if line != "\n" else " \n" for line in hunk.splitlines(keepends=True)]
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        if source.count(old) != 1:
            raise AssertionError(f"expected once, found {source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source
