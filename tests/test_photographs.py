"""The main job on photographs: published encoders, frozen and kept, learn to find them.

It takes `--weights` (dinov2_small, minilm_l6) and `--photographs` (Flickr8K in Karpathy's layout).
"""

import json

import numpy as np
import pytest

from fne_jax import evaluate, load_workdir, train
from fne_jax.evaluation.results import read_values
from tests.support import TOP

SPLITS = {"train": 300, "val": 40, "test": 60}


@pytest.fixture
def few_photographs(photographs, tmp_path):
    """A folder with some of each split."""
    entries = json.loads((photographs / "dataset_flickr8k.json").read_text())["images"]
    kept = [
        entry
        for split, count in SPLITS.items()
        for entry in [one for one in entries if one["split"] == split][:count]
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "images").symlink_to((photographs / "images").resolve())
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": kept}))
    return folder


@pytest.mark.slow
def test_published_encoders_learn_to_find_photographs(few_photographs, weights, tmp_path, capsys):
    workdir = tmp_path / "run"
    train.main(
        [
            f"--config={TOP}/configs/photographs.py",
            f"--workdir={workdir}",
            f"--config.data.dir={few_photographs}",
            f"--config.data.cache_dir={tmp_path / 'cache'}",
            f"--config.encoder.image.pretrained={weights / 'dinov2_small'}",
            f"--config.encoder.text.pretrained={weights / 'minilm_l6'}",
            "--config.encoder.image.image_size=98",
            "--config.global_batch_size=64",
            "--config.queue_size=64",
            "--config.num_epochs=3",
            "--config.compile_cache=",
        ]
    )
    evaluate.main([f"--workdir={workdir}", "--split=test"])
    capsys.readouterr()
    found = read_values(json.loads((workdir / "eval_test.json").read_text()))
    # By chance 1 / 60 and 10 / 60.
    assert found["t2i_r1"] > 10 and found["t2i_r10"] > 50
    kept = {path.name.partition("-")[0] for path in (tmp_path / "cache" / "frozen").iterdir()}
    assert kept == {"image", "text"}

    # Photographs by themselves go through all layers, and are embedded as those of the split.
    model = load_workdir(workdir)
    test = model.load_split("test")
    names = [few_photographs / "images" / name for name in test.source_image_id[:3]]
    split = model.embed_split(test)
    np.testing.assert_allclose(model.embed_images(names), split.image_emb[:3], atol=2e-3)
