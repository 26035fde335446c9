"""The examples in the docstrings run as they stand, and every public loss has one."""

import doctest
import importlib
import pkgutil
import re

import pytest

import fne_jax
from fne_jax import objectives

MODULES = [module.name for module in pkgutil.iter_modules(objectives.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"{objectives.__name__}.{name}")
    assert doctest.testmod(module).failed == 0


def test_every_public_name_has_an_example():
    finder = doctest.DocTestFinder()
    sources = {
        name: "".join(
            example.source
            for test in finder.find(importlib.import_module(f"{objectives.__name__}.{name}"))
            for example in test.examples
        )
        for name in MODULES
    }
    for name in fne_jax.__all__:
        module = getattr(getattr(fne_jax, name), "__module__", "")
        if module.startswith(objectives.__name__):
            assert re.search(rf"\b{name}\b", sources[module.rpartition(".")[2]]), name
