import jax
import numpy as np
import pytest

from fne_jax.data.sources import shapes_scenes
from fne_jax.errors import UserError
from fne_jax.model.model import load_workdir
from tests.support import pretraining
from tests.support.runs import content_of
from tests.support.tiny import tiny_config


def config_of(cache, **fields):
    return tiny_config(
        **{
            "data__source": "shapes",
            "data__cache_dir": str(cache),
            "data__augmentation": "none",
            "data__shapes__train_images": 140,
            "data__shapes__val_images": 5,
            "data__shapes__test_images": 5,
            "encoder__image__image_size": 64,
            "encoder__image__patch_size": 32,
            **fields,
        }
    )


def test_attributes_against_a_plain_version():
    vocabulary = shapes_scenes.Vocabulary(shapes=4, colours=3)
    rng = np.random.default_rng(0)
    scenes = np.stack([shapes_scenes.random_scene(rng, vocabulary) for _ in range(50)])
    found = pretraining.attributes(scenes, 4, 3)
    assert found.shape == (50, 4 * 9) and found.dtype == bool
    for scene, row in zip(scenes, found.reshape(50, 4, 9), strict=True):
        expected = np.zeros((4, 9), bool)
        for shape, colour, size, x, y in scene:
            if shape >= 0:
                quarter = 2 * (y >= 32) + (x >= 32)
                expected[quarter, [shape, 4 + colour, 7 + size]] = True
        np.testing.assert_array_equal(row, expected)


@pytest.mark.slow
def test_towers_learn_apart_and_are_stored_as_a_run(tmp_path, caplog):
    config, folder = config_of(tmp_path / "cache"), tmp_path / "towers"
    with caplog.at_level("INFO", logger=pretraining.__name__):
        pretraining.pretrain_towers(config, folder, 60)
    told = [r.getMessage() for r in caplog.records if r.name == pretraining.__name__]
    losses = [float(message.split()[-1]) for message in told]
    assert len(losses) == 4
    assert losses[1] < 0.8 * losses[0] and losses[3] < 0.8 * losses[2]
    model = load_workdir(folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, model.momentum_params)
    stored = content_of(folder)
    pretraining.pretrain_towers(config, folder, 60)
    assert content_of(folder) == stored


def test_images_that_nobody_can_name_are_refused(tmp_path):
    config = config_of(tmp_path / "cache", data__source="synthetic")
    with pytest.raises(UserError, match=r"config.data.source is 'synthetic'; only the scenes"):
        pretraining.pretrain_towers(config, tmp_path / "towers", 3)
    assert not (tmp_path / "towers").exists()
