"""The documentation says what is so: its code runs, its commands and links are right."""

import argparse
import importlib
import json
import re
import sys

import pytest

from configs import base
from fne_jax import configuration
from fne_jax.configuration import flatten
from tests.support import TOP, pages_of_docs

PAGES = pages_of_docs.pages()
BLOCKS = [block for page in PAGES for block in pages_of_docs.blocks(page)]
# Languages whose blocks do something.
RUN = ("bash", "python")


class Parsed(Exception):
    """Ends a command when it has parsed its arguments."""


@pytest.fixture
def parse(monkeypatch):
    """Returns a function that lets a command parse arguments: its options, and those left over."""
    depth = []
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, *arguments, **keywords):
        depth.append(parser)
        try:
            options, rest = original(parser, *arguments, **keywords)
        finally:
            depth.pop()
        if depth:  # of a subcommand
            return options, rest
        raise Parsed(options, rest)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def parse(module, arguments):
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main(arguments)
        return parsed.value.args

    return parse


def test_every_block_runs_or_says_why_not():
    for block in BLOCKS:
        where = f"{block.page}:{block.line}"
        kind, _, rest = block.mark.partition(": ")
        if kind == "run by":
            path, _, test = rest.partition("::")
            assert f"def {test}(" in (TOP / path).read_text("utf-8"), where
        elif kind == "not run":
            assert len(rest.split()) > 2, f"{where}: say why"
            for path in re.findall(r"tests/[\w/]*(?:\.py)?", rest):
                assert (TOP / path).exists(), f"{where}: {path}"
        elif block.language in RUN and not block.title:
            assert block.language == "python", f"{where}: mark it as run by a test, or not run"


def runnable(page):
    """Returns the blocks of a page that are to run as they stand, one after the other."""
    blocks = pages_of_docs.blocks(page)
    return [one for one in blocks if one.language == "python" and not (one.title or one.mark)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name
)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in runnable(page):
        exec(compile(block.code, f"{page.name}:{block.line}", "exec"), names)
    if page.name == "README.md":
        assert names["loss"] > 0
        assert (names["queue"].image_id[:8] == names["image_id"]).all()


def test_commands_are_understood(parse, monkeypatch):
    monkeypatch.chdir(TOP)
    commands = [
        (block, words)
        for block in BLOCKS
        if block.language == "bash"
        for words in block.commands
        if words[:2] == ["python", "-m"] and words[2].startswith("fne_jax.")
    ]
    assert len(commands) > 30
    for block, (_, _, module, *arguments) in commands:
        try:
            options, overrides = parse(module, arguments)
            if getattr(options, "config", None):
                configuration.load_config(options.config, overrides)
            else:
                for override in overrides:  # of a run's config
                    assert override.removeprefix("--config.").startswith(configuration.MAY_CHANGE)
        except BaseException as error:
            raise AssertionError(f"{block.page}:{block.line}: {arguments}") from error


def test_extras_and_scripts_are_there():
    setup = (TOP / "setup.py").read_text("utf-8")
    for block in BLOCKS:
        for words in block.commands if block.language == "bash" else ():
            for word in words:
                for extra in re.findall(r"^\.\[([\w,-]+)\]$", word):
                    for name in extra.split(","):
                        assert f'"{name}": [' in setup, f"{block.page}:{block.line}: {name}"
                if word.startswith("launch/"):
                    assert (TOP / word).exists(), f"{block.page}:{block.line}: {word}"
    contributing = (TOP / "CONTRIBUTING.md").read_text("utf-8")
    table = re.findall(r"^\| (`.*?) \| .* \| (.*) \|$", contributing, re.MULTILINE)
    named = [name for extras, _ in table for name in re.findall("`(.*?)`", extras)]
    extras = re.findall(r'^        "([\w-]+)": \[', setup.split("extras_require")[1], re.MULTILINE)
    assert sorted(named) == sorted(extras)
    for path in re.findall(r"`((?:tests|launch)/.*?)`", str(table)):
        assert (TOP / path).exists(), path


def test_the_readme_is_short():
    assert len((TOP / "README.md").read_text("utf-8")) <= 10_000


def test_the_reference_names_every_field_and_says_something(monkeypatch):
    monkeypatch.syspath_prepend(str(TOP / "docs" / "hooks"))
    reference = importlib.import_module("config_reference")
    fields = reference.read_fields(reference.BASE.read_text("utf-8"))
    assert [field.name for field in fields] == sorted(
        flatten(base.get_config()), key=[field.name for field in fields].index
    )
    assert len(fields) == len(flatten(base.get_config()))
    for field in fields:
        assert len(field.comment) > 5, field.name
    text = reference.on_page_markdown((TOP / "docs" / "config.md").read_text("utf-8"))
    assert "## `config.fne`" in text and "**`margin`** = `0.2`\n:   Similarity by which" in text
    assert reference.on_page_markdown("no placeholder") == "no placeholder"
    sys.modules.pop("config_reference")


def test_the_values_of_an_evaluation_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    metrics = {"rsum": {"value": 212.5}, "i2t_r1": {"value": 12.5}}
    (tmp_path / "runs" / "shapes" / "eval_test.json").write_text(json.dumps({"metrics": metrics}))
    monkeypatch.chdir(tmp_path)
    (block,) = (
        block
        for block in pages_of_docs.blocks(TOP / "docs" / "evaluation.md")
        if "read_values" in block.code
    )
    exec(block.code, {})
    assert capsys.readouterr().out == "212.5 12.5\n"


def test_the_ways_of_an_image_and_a_caption_name_what_is_there():
    page = (TOP / "docs" / "architecture.md").read_text()
    found = re.findall(r"^\d+\. `([\w/]+\.py)` `(\w+)`", page, re.MULTILINE)
    assert len(found) == 24 + 21
    for path, name in found:
        assert re.search(
            rf"^(def|class) {name}\b", (TOP / "fne_jax" / path).read_text(), re.MULTILINE
        )
