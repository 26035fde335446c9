"""A run as an encoder of MTEB, for its benchmarks of texts and, as MIEB, of images and texts.

    mteb.evaluate(MtebEncoder("runs/flickr30k"), mteb.get_tasks(["Flickr30kT2IRetrieval"]))

It takes the extra `mteb`.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from fne_jax.errors import UserError
from fne_jax.files import expand_home
from fne_jax.model.model import load_workdir


class MtebEncoder(AbsEncoder):
    """What `mteb.evaluate` takes, of MTEB 2: a run embeds each task's texts and images.

    It prepares them as its own data, in batches of `config.evaluation.batch_size`, whatever MTEB's
    size is, and with `config.data.prompt` in place of a task's instructions.

    Args:
      workdir: The folder of the run.
      checkpoint: `best`, `latest` or a step.

    Attributes:
      model: The run.
      mteb_model_meta: What MTEB files results under: the folder's name, and as the revision a
        checksum of weights and config, so that those of another run are never taken for them.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint is missing or damaged.
    """

    def __init__(self, workdir: str | os.PathLike, checkpoint: str | int = "best"):
        self.model = load_workdir(workdir, checkpoint)
        name = pathlib.Path(expand_home(workdir)).resolve().name
        revision = hashlib.sha256(repr(self.model.identity()).encode()).hexdigest()[:16]
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"fne-jax/{name}",
                "revision": revision,
                "modalities": ["image", "text"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["JAX"],
            }
        )

    def encode(self, inputs: Any, *, precision: str = "float32", **_: Any) -> np.ndarray:
        """Returns the [items, dim] float32 embeddings of all batches of a task.

        Args:
          inputs: The batches, dicts with `text`, sentences, or `image`, images of PIL, or both;
            an item of both has the sum of the two unit embeddings, as with MTEB's own CLIP.
          precision: MTEB's request for quantized embeddings, which are not supported.

        Raises:
          UserError: Naming the image or the text that cannot be embedded, or the precision.
        """
        if precision != "float32":
            raise UserError(f"encode_kwargs['precision'] is {precision!r}; only 'float32' is there")
        texts: list[str] = []

        def images():
            for batch in inputs:
                texts.extend(batch.get("text", ()))
                yield from batch.get("image", ())

        image_emb = self.model.embed_images(images())  # reads the batches, a few at a time
        text_emb = self.model.embed_texts(texts)
        if len(image_emb) and len(text_emb):
            return image_emb + text_emb
        return image_emb if len(image_emb) else text_emb
