"""Writes the page config.md from the comments beside the fields of configs/base.py."""

from __future__ import annotations

import ast
import dataclasses
import io
import pathlib
import tokenize

BASE = pathlib.Path(__file__).parents[2] / "configs" / "base.py"
PLACEHOLDER = "<!-- every field -->"


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      name: Its dotted name, without `config.`.
      default: Its default as Python spells it.
      comment: What the comments above and beside it say.
    """

    name: str
    default: str
    comment: str


def read_fields(source: str) -> list[Field]:
    """Returns the fields that `get_config` sets, in its order, with their comments.

    Args:
      source: The text of configs/base.py: assignments to `config` or to a name that one of them
        gave to a group, each with comments above it or behind it.
    """
    comments, behind = _comments(source)
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    groups = {"config": ""}
    fields = []
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        if not isinstance(target, ast.Attribute):
            continue
        name = groups[target.value.id] + target.attr
        if len(statement.targets) == 2:  # config.group = group = ConfigDict()
            groups[statement.targets[1].id] = f"{name}."
            continue
        parts = [*_above(comments, statement.lineno), behind.get(statement.lineno, "")]
        # What stands for a number that is left open.
        default = ast.unparse(statement.value).replace("config_dict.placeholder(float)", "None")
        fields.append(Field(name, default, " ".join(filter(None, parts))))
    return fields


def _comments(source):
    """Returns the comments on lines of their own and those behind code, by line number."""
    alone, behind = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            is_alone = not token.line[: token.start[1]].strip()
            (alone if is_alone else behind)[token.start[0]] = text
    return alone, behind


def _above(comments, line):
    """Returns the comments on the lines right above a line, from the top."""
    first = line
    while first - 1 in comments:
        first -= 1
    return [comments[number] for number in range(first, line)]


def reference(fields: list[Field]) -> str:
    """Returns the fields as Markdown: a list of definitions for each group, under a heading."""
    groups: dict[str, list[Field]] = {}
    for field in fields:
        groups.setdefault(field.name.rpartition(".")[0], []).append(field)
    lines = []
    for group, members in groups.items():
        heading = f"config.{group}" if group else "config"
        lines += ["", f"## `{heading}`"]
        for field in members:
            leaf = field.name.rpartition(".")[2]
            lines += ["", f"**`{leaf}`** = `{field.default}`", f":   {field.comment}"]
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_) -> str:
    """Puts the reference in place of the placeholder; mkdocs calls it for every page."""
    if PLACEHOLDER not in markdown:
        return markdown
    return markdown.replace(PLACEHOLDER, reference(read_fields(BASE.read_text("utf-8"))))
