"""The registry of sources is what the documentation says."""

import re

import pytest

from fne_jax.data.sources.registry import SOURCES, find_source, load_split
from fne_jax.errors import UserError
from tests.support import pages_of_docs
from tests.support.tiny import tiny_config


def test_the_docs_name_every_source_and_what_it_expects():
    section = pages_of_docs.section("data.md", "## Sources")
    table = next(part for part in section.split("\n\n") if part.startswith("|")).splitlines()[2:]
    listed = {}
    for line in table:
        names, in_dir = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            assert name not in listed
            listed[name] = in_dir
    assert listed == {name: source.in_dir for name, source in SOURCES.items()}


def test_an_unknown_source_lists_the_choices():
    with pytest.raises(UserError) as error:
        find_source("karpaty")
    for part in ("config.data.source is 'karpaty'", *SOURCES):
        assert part in str(error.value)


def test_what_need_not_be_prepared():
    ready = {name for name, source in SOURCES.items() if source.load is not None}
    assert ready == {"npz", "prepared", "synthetic"}


@pytest.mark.parametrize("source", sorted(SOURCES.keys() - {"shapes", "synthetic"}))
def test_no_folder_is_not_the_working_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("train.npz", "dataset_flickr8k.json", "a.csv", "a.tar", "a.parquet"):
        (tmp_path / name).touch()
    config = tiny_config(data__source=source, data__cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"config\.data\.dir(=| is )''"):
        load_split(config.data, 8, "train")
    assert not (tmp_path / "cache").exists()
