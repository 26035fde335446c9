"""Tests mirror the package, and what they share is in tests/support."""

import ast

from tests.support import TOP

TESTS = TOP / "tests"


def imported_modules(path):
    """Yields the full name of each module that a file imports, or may import from another."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_module_imports_another():
    for path in TESTS.rglob("*.py"):
        for name in imported_modules(path):
            parts = name.split(".")
            shared = parts[0] != "tests" or "support" in parts[1:2] or "compiled_once" in parts[1:2]
            assert shared, f"{path.relative_to(TOP)} imports {name}"


def test_every_folder_of_the_package_has_its_tests():
    package = TOP / "fne_jax"
    for folder in {path.parent.relative_to(package) for path in package.rglob("*.py")}:
        assert list((TESTS / folder).glob("test_*.py")), f"no tests/{folder}/test_*.py"


def test_every_folder_of_tests_has_its_package():
    for folder in {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}:
        assert list((TOP / "fne_jax" / folder).glob("*.py")), f"tests/{folder} mirrors nothing"
