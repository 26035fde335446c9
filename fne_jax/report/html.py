"""Self-contained pages from the templates: everything escaped, images and figures inside."""

from __future__ import annotations

import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from fne_jax.files import as_user_error, write_atomically

_SPACE = "\N{NO-BREAK SPACE}"
# Of this machine (/home/..., ~/..., C:\\...) or of a bucket (gs://...).
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:[/\\]|\\\\|[a-z0-9]+://")


def environment(package: str) -> jinja2.Environment:
    """Returns what renders the templates of a package, which share their settings and filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["posterior"] = posterior_text
    environment.filters["short_path"] = short_path
    return environment


_reports = functools.cache(lambda: environment("fne_jax.report"))


def render(template: str, values: Mapping[str, Any]) -> str:
    """Returns a page.

    Text in the values is escaped, unless it is `markupsafe.Markup`.
    """
    return _reports().get_template(template).render(values)


def palette() -> str:
    """Returns the style sheet of the pages' colours."""
    return _reports().get_template("palette.css").render()


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically, its line ends as they are.

    Raises UserError if it cannot be written.
    """
    with as_user_error(f"{path}: cannot be written"):
        # Captions may hold half of a surrogate pair, which no encoding can.
        write_atomically(path, text.encode(errors="replace"))


def _percent(share):
    return f"{100 * share:.1f}{_SPACE}%"


def posterior_text(probability: float) -> str:
    """Returns a probability in percent, its ends told apart from certainty.

    Small ones have two digits: where the prior is 1e-4, hardly any is as large as 0.1 %.
    """
    if probability > 0.999:
        return "> " + _percent(0.999)
    if probability >= 0.001:
        return _percent(probability)
    if probability < 1e-6:
        return f"< 0.0001{_SPACE}%"
    decimals = 1 - math.floor(math.log10(100 * probability))
    return f"{100 * probability:.{decimals}f}".rstrip("0").rstrip(".") + f"{_SPACE}%"


def short_path(value: Any) -> Any:
    """Returns an absolute path as its last part, since pages are given away; all else as it is."""
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return "…/" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
