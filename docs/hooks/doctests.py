"""Shows the examples of docstrings as code, which Markdown would take for quotations."""

from __future__ import annotations

import re

import griffe

# From a line that begins with >>> to the next empty line.
_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*\n?(?:.*\S.*\n?)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts fences around the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Changes the docstring of an object that griffe has read."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example):
    indent, text = example["indent"], example[0].rstrip("\n")
    return f"{indent}```pycon\n{text}\n{indent}```\n"
