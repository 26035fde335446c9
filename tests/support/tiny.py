"""A run small enough to repeat, and made-up datasets in the real layouts."""

import json

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from configs import base
from fne_jax import configuration
from fne_jax.encoders.dual_encoder import unit


class LinearTowers(nn.Module):
    """Compiles in a fraction of the transformers' time, for tests of what surrounds the towers."""

    dim: int = 16
    text_pooling: str = "mean"

    def setup(self):
        self.image, self.text = nn.Dense(self.dim), nn.Dense(self.dim)

    def __call__(self, pixels, input_ids, attention_mask, *, deterministic=True):
        del deterministic
        return self.encode_image(pixels), self.encode_text(input_ids, attention_mask)

    def encode_image(self, pixels):
        return unit(self.image(pixels.reshape(pixels.shape[0], -1)))

    def encode_text(self, input_ids, attention_mask):
        words = jax.nn.one_hot(input_ids, 40) * attention_mask[..., None]
        return unit(self.text(words.sum(axis=1)))


def smooth_config(**fields):
    """Returns a tiny config whose steps pass rounding on as small as it is.

    Adam divides each gradient by its own size, and so makes 4e-5 of a difference of 1e-10 where
    a gradient is tiny; with an epsilon above all gradients it is momentum SGD. Runs that sum in
    another order stay together then, and choose the same negatives.
    """
    return tiny_config(optimizer__eps=1.0, optimizer__learning_rate=0.3, **fields)


def tiny_config(**fields):
    """Returns a config of one-layer towers on synthetic pairs; fields as `a__b=value`."""
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {
                "num_epochs": 2.0,
                "compile_cache": "",
                "global_batch_size": 16,
                "queue_size": 40,
                "data.source": "synthetic",
                "data.synthetic.images": 60,
                "data.text_length": 8,
                "encoder.image.image_size": 8,
                "encoder.image.patch_size": 4,
                "encoder.compute_dtype": "float32",
                "evaluation.batch_size": 32,
                "evaluation.per_epoch": 1,
                "logging.every_steps": 3,
                "warmup.objective": "infonce",
                "optimizer.learning_rate": 1e-3,
                "fne.min_count": 5,
            }
        )
        for tower in ("image", "text"):
            config.encoder[tower].update(width=16, layers=1, heads=2, mlp_width=16)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return configuration.resolve(config)[0]


def write_karpathy(folder, counts=(7, 3, 4), captions=lambda i: 1 + i % 3):
    """Writes a Karpathy dataset of made-up images of many sizes; returns its JSON content."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for _ in range(count):
            index = len(entries)
            name = f"image{index}.jpg"
            pixels = rng.integers(0, 255, (20 + index % 9, 33 - index % 7, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name, quality=95)
            first = sum(len(entry["sentids"]) for entry in entries)
            raw = [f"Image number {index}, seen {n} times." for n in range(captions(index))]
            entries.append(
                {
                    "filename": name,
                    "split": "restval" if split == "train" and index == 1 else split,
                    "imgid": index,
                    "sentids": list(range(first, first + len(raw))),
                    "sentences": [{"raw": r, "sentid": n} for n, r in enumerate(raw, first)],
                }
            )
    content = {"images": entries, "dataset": "made-up"}
    (folder / "dataset_made-up.json").write_text(json.dumps(content))
    return content
