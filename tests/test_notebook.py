"""The notebook of the quickstart runs from its first cell to its last."""

import os

import nbclient
import nbformat
import pytest

from tests.support import TOP

NOTEBOOK = TOP / "docs" / "quickstart.ipynb"


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    # What the cells take from the clone; what they write stays out of it.
    (tmp_path / "docs").mkdir()
    for name in ("setup.py", "configs"):
        (tmp_path / name).symlink_to(TOP / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute(env=os.environ | {"PYTHONPATH": str(TOP)})

    def outputs(start):
        """Returns the texts and the kinds of what the cell that begins so showed."""
        (cell,) = (
            cell
            for cell in notebook.cells
            if cell.cell_type == "code" and cell.source.startswith(start)
        )
        kinds = [kind for output in cell.outputs for kind in output.get("data", ())]
        return "".join(output.get("text", "") for output in cell.outputs), kinds

    assert "the run is complete: 780 steps" in outputs("!{sys.executable} -m fne_jax.train")[0]
    assert "against the complete truth" in outputs("!{sys.executable} -m fne_jax.evaluate")[0]
    assert "are in truth matches" in outputs("!{sys.executable} -m fne_jax.audit")[0]
    assert "text/html" in outputs("import html")[1]
    assert "image/png" in outputs("import io")[1]
    assert (tmp_path / "runs" / "notebook" / "audit_test" / "index.html").exists()
