"""What is installed works without the clone: sdist, wheel from it, and what the wheel can do."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import numpy as np
import pytest

from tests.support import TOP, pages_of_docs

pytestmark = pytest.mark.slow
BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind, source, out):
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)],
        cwd=source, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it alone."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    # A copy: a build leaves folders behind, and takes files from those that it finds.
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    shutil.copytree(
        TOP / "fne_jax", source / "fne_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder)


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """Returns a function that runs the installed package in an environment without the clone.

    The environment is new and has the wheel; what it depends on is taken from the suite's, by a
    path on which `.pth` files, such as that of an editable install, do nothing.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder / "new"], check=True)
    python = folder / "new" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[1]], check=True
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (folder / "empty").mkdir()

    def run(*arguments):
        done = subprocess.run(
            [python, *arguments],
            cwd=folder / "empty",
            env=variables | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder / "dependencies")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Links, so that the suite's own `fne_jax` and what makes it editable stay out.
    (folder / "dependencies").mkdir()
    for path in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        if "fne_jax" not in path.name and not path.name.startswith("__editable__"):
            (folder / "dependencies" / path.name).symlink_to(path)
    return run


def test_the_wheel_has_all_of_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        about = email.message_from_bytes(wheel.read(metadata))
        assert any(name.endswith("LICENSE") for name in wheel.namelist())
    package = [path.relative_to(TOP) for path in (TOP / "fne_jax").rglob("*") if path.is_file()]
    assert names == {str(path) for path in package if "__pycache__" not in path.parts}
    assert {"test", "wandb", "review"} <= set(about.get_all("Provides-Extra"))
    assert about["Requires-Python"].startswith(">=3.11")


def test_the_loss_of_the_readme_runs(run):
    (example,) = (
        block.code
        for block in pages_of_docs.blocks(TOP / "README.md")
        if block.language == "python" and not block.mark
    )
    out = run("-c", f"{example}\nprint(fne_jax.__file__, float(loss))")
    path, loss = out.split()
    assert str(TOP) not in path and float(loss) > 0


def test_pretrained_files_are_read(run, tmp_path):
    make = f"""
import transformers
config = transformers.BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=24)
import torch
torch.manual_seed(0)
transformers.BertModel(config).save_pretrained({str(tmp_path)!r})
"""
    run("-c", make)
    out = run("-c", f"import fne_jax; print(type(fne_jax.load_pretrained({str(tmp_path)!r})))")
    assert out.strip()


def test_embeddings_are_evaluated(run, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(7, 5)).astype(np.float32)
    owner = np.repeat(np.arange(7), 2)
    np.save(tmp_path / "image_embeddings.npy", images)
    np.save(tmp_path / "text_embeddings.npy", images[owner])
    np.save(tmp_path / "caption_image.npy", owner)
    page = tmp_path / "page.html"
    out = run(
        "-m", "fne_jax.evaluate", f"--embeddings={tmp_path}", f"--out={tmp_path / 'of.json'}",
        f"--report={page}",
    )  # fmt: skip
    assert "7 images, 14 captions" in out and "rSum 600.0" in out
    assert "<style" in page.read_text()  # its template came with the package


def test_the_page_of_review_comes_with_the_package(run):
    out = run("-c", """
import importlib.resources as r
page = "false_negatives/review_app/"
for part in ("report/templates", page + "templates", page + "static"):
    print(*sorted(path.name for path in r.files("fne_jax").joinpath(part).iterdir()))
""")  # fmt: skip
    assert all(line for line in out.splitlines()) and len(out.splitlines()) == 3
