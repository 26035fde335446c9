"""Other packages beside this one: MTEB scores its runs, and it scores models of theirs.

They are not among the suite's own packages; .ci/run installs them for these tests.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fne_jax import configuration, convert, evaluate
from fne_jax.errors import UserError
from fne_jax.evaluation.results import read_values
from fne_jax.model.model import load_workdir
from fne_jax.training.loop import train_and_evaluate
from tests.support import TOP, pages_of_docs
from tests.support.tiny import write_karpathy

pytestmark = pytest.mark.slow
# torchvision's operators lack their code beside a torch without CUDA, and its import fails then.
OPERATORS = """
import importlib.util, torch
if importlib.util.find_spec("torchvision") and not torch.version.cuda:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
exec(OPERATORS)
REASON = "not among the suite's own packages: .ci/run"
mteb = pytest.importorskip("mteb", reason=REASON)
MtebEncoder = pytest.importorskip("fne_jax.conversion.mteb_encoder").MtebEncoder

CONFIG = """
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(
        data__source="karpathy", data__dir="{0}/data", data__cache_dir="{0}/cache",
        data__text_length=16, num_epochs=2.0, checkpoint__every_steps=1,
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, its images' files of the test split, and the captions of each.

    Beside it lie its config.py, and what evaluation wrote.
    """
    folder = tmp_path_factory.mktemp("run")
    content = write_karpathy(folder / "data", (40, 4, 17))
    (folder / "config.py").write_text(CONFIG.format(folder))
    train_and_evaluate(configuration.load_config(str(folder / "config.py"), []), folder / "run")
    evaluate.main([f"--workdir={folder / 'run'}", f"--out={folder / 'ours.json'}"])
    test = [entry for entry in content["images"] if entry["split"] == "test"]
    paths = [str(folder / "data" / "images" / entry["filename"]) for entry in test]
    return folder / "run", paths, [[one["raw"] for one in entry["sentences"]] for entry in test]


def values(path):
    return read_values(json.loads(path.read_text()))


def task(category, queries, corpus, matches):
    """Returns a retrieval task in memory, of columns of queries and documents."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    def table(prefix, columns):
        ids = [f"{prefix}{n}" for n in range(len(next(iter(columns.values()))))]
        made = datasets.Dataset.from_dict({"id": ids, **columns})
        return made.cast_column("image", datasets.Image()) if "image" in columns else made

    class MadeUp(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name=f"MadeUp{category}",
            description="Made up.",
            dataset={"path": "none", "revision": "none"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=sorted({*queries, *corpus}),
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **_):
            relevant = {f"q{q}": {f"d{d}": 1 for d in found} for q, found in enumerate(matches)}
            split = {"queries": table("q", queries), "corpus": table("d", corpus)}
            split |= {"relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return MadeUp()


def scores_of(model, *of_task, **options):
    results = mteb.evaluate(model, task(*of_task), show_progress_bar=False, **options)
    return results.task_results[0].scores["test"][0]


def test_recalls_are_those_of_our_own_evaluation(run, tmp_path):
    workdir, paths, captions = run
    model = MtebEncoder(workdir)
    assert isinstance(model, mteb.EncoderProtocol)
    ours = values(workdir.parent / "ours.json")
    owner = np.repeat(np.arange(len(paths)), [len(of_image) for of_image in captions])
    texts = [caption for of_image in captions for caption in of_image]
    own = [np.flatnonzero(owner == row) for row in range(len(paths))]
    cache = mteb.ResultCache(tmp_path)
    i2t = scores_of(model, "i2t", {"image": paths}, {"text": texts}, own, cache=cache)
    t2i = scores_of(model, "t2i", {"text": texts}, {"image": paths}, owner[:, None], cache=cache)
    assert 0 < ours["i2t_r1"] < ours["t2i_r5"] < 100
    for k in (1, 5, 10):
        # Of an image any caption counts; MTEB rounds to five places.
        assert 100 * i2t[f"hit_rate_at_{k}"] == pytest.approx(ours[f"i2t_r{k}"], abs=1e-3)
        assert 100 * t2i[f"recall_at_{k}"] == pytest.approx(ours[f"t2i_r{k}"], abs=1e-3)
    run = load_workdir(workdir)
    similarity = run.embed_texts(texts) @ run.embed_images(paths).T
    rank = (similarity > similarity[np.arange(len(owner)), owner][:, None]).sum(1)
    ndcg = np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()
    assert t2i["ndcg_at_10"] == pytest.approx(ndcg, abs=1e-5)


def test_texts_alone_images_alone_and_both_in_one(run):
    workdir, paths, captions = run
    model, first = MtebEncoder(workdir), [of_image[0] for of_image in captions]
    for kind, items in (("t", {"text": first}), ("i", {"image": paths})):
        itself = [[row] for row in range(len(paths))]
        scores = scores_of(model, f"{kind}2{kind}", items, items, itself, cache=None)
        assert scores["recall_at_1"] == 1
    batches = [
        {"text": first[rows], "image": paths[rows]} for rows in (slice(0, 9), slice(9, None))
    ]
    own = load_workdir(workdir)
    both = own.embed_images(paths) + own.embed_texts(first)
    np.testing.assert_allclose(model.encode(batches), both, atol=1e-6)
    with pytest.raises(UserError, match=r"encode_kwargs\['precision'\] is 'int8'"):
        model.encode(batches, precision="int8")


def test_another_checkpoint_has_results_of_its_own(run):
    steps = (path.name for path in (run[0] / "checkpoints").iterdir() if path.name.isdigit())
    metas = [MtebEncoder(run[0], step).mteb_model_meta for step in [*steps, "latest"]]
    assert {meta.name for meta in metas} == {"fne-jax/run"}
    assert len({meta.revision for meta in metas}) == len(metas) - 1 > 1


# What a block of the page names, and what is named here instead.
INSTEAD = {
    "sentence_transformers": {'"clip-ViT-B-32"': '"exported", trust_remote_code=True'},
    "open_clip": {'"ViT-B-32", "laion2b_s34b_b79k"': '"tiny", None', '"ViT-B-32"': '"tiny"'},
}
# A model of random weights.
TINY = "import open_clip\nopen_clip.add_model_config('tiny.json')\n"
SIZES = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("package", list(INSTEAD))
def test_a_model_of_another_package_is_scored(run, package):
    pytest.importorskip(package, reason=REASON)
    folder = run[0].parent
    out, scores = folder / package, folder / f"{package}.json"
    convert.main(["order", f"--config={folder / 'config.py'}", f"--out={out}"])
    if package == "open_clip":
        (folder / "tiny.json").write_text(json.dumps(SIZES))
    else:
        convert.main(["export", f"--workdir={run[0]}", f"--out={folder / 'exported'}"])
    blocks = pages_of_docs.blocks(TOP / "docs" / "evaluation.md")
    code = "\n".join(b.code for b in blocks if "names.json" in b.code or package in b.code)
    instead = {'"theirs"': f'"{package}"', '"DIR/images"': '"data/images"', **INSTEAD[package]}
    for name, here in instead.items():
        assert name in code
        code = code.replace(name, here)
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", OPERATORS + TINY * (package == "open_clip") + code]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    evaluate.main([f"--embeddings={out}", f"--out={scores}"])
    if package == "sentence_transformers":
        assert values(scores) == values(folder / "ours.json")
    assert np.std(np.load(out / "image_embeddings.npy"), axis=0).min() > 0
