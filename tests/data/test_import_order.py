"""What TensorFlow must not be loaded before is loaded before it."""

import os
import subprocess
import sys

import pytest

from tests.support import TOP

IMPORTERS = sorted(
    str(path.relative_to(TOP).with_suffix("")).replace(os.sep, ".")
    for path in (TOP / "fne_jax").rglob("*.py")
    if "\nimport tensorflow" in path.read_text("utf-8")
)


@pytest.fixture
def stand_ins(tmp_path):
    """A folder with a triton, and with a TensorFlow that says whether triton was loaded."""
    (tmp_path / "triton.py").write_text("")
    for name in ("tensorflow", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text(
            "import sys; print('triton' in sys.modules); sys.exit()\n"
        )
    return tmp_path


def test_who_imports_tensorflow_is_below_data():
    assert IMPORTERS and all(name.startswith("fne_jax.data.") for name in IMPORTERS)


@pytest.mark.parametrize("module", IMPORTERS)
def test_triton_is_loaded_before_tensorflow(module, stand_ins):
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(stand_ins), str(TOP)])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr
