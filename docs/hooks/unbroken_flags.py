"""Keeps an option of a command line in one piece, which browsers would break after its hyphens."""

from __future__ import annotations

import re


def on_page_content(html: str, **_) -> str:
    """Wraps the short options within inline code; mkdocs calls it for every page."""
    code = re.compile(r"<code>[^<]*--[^<]*</code>")
    option = re.compile(r"--[^\s<]{1,38}(?=\s|<|$)|--[\w-]+")
    return code.sub(lambda one: option.sub(r'<span class="option">\g<0></span>', one[0]), html)
