"""A run's encoders as ONNX files, which are checked against the run."""

from __future__ import annotations

import logging
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import onnx_ir.passes.common
import onnxruntime
import onnxscript  # noqa: F401 (torch.onnx imports it as late as at the export)
import torch
import transformers

from fne_jax.conversion.image_text_encoder import ImageTextEncoder
from fne_jax.encoders.freezing import TOWERS
from fne_jax.encoders.inputs import embed_one, normalize_pixels
from fne_jax.errors import UserError
from fne_jax.model.model import Model

# The most by which an element of an embedding may differ from the run's.
TOLERANCE = 1e-4
_TEXTS = ("a dog runs along the beach, and a man in red throws it a ball", "two dogs", "a man")
_log = logging.getLogger(__name__)


def write_onnx(model: Model, out: pathlib.Path) -> None:
    """Writes `image.onnx` and `text.onnx`, with heads, pooling and normalisation.

    They return `embeddings`, [n, dim] float32 of length 1: one of `pixel_values`, [n, 3, side,
    side] float32 and normalised, the other of `input_ids` and `attention_mask`, [n, tokens] int64.
    n and tokens may be any. What is larger than 2 GB keeps its weights in `*.onnx.data`.

    Args:
      model: The model.
      out: The folder that holds its PyTorch module, with all files of this.

    Raises:
      UserError: If onnxruntime gives other embeddings than the run in float32.
    """
    cases, worst = _cases(model), 0.0
    logging.disable(logging.WARNING)  # of a pooler that is not used, and of no torchvision
    try:
        encoder = ImageTextEncoder.load(out)
        for tower, ((inputs, _), _) in cases.items():
            _write(encoder, out / f"{tower}.onnx", inputs)
    finally:
        logging.disable(logging.NOTSET)
    for tower, both in cases.items():
        path = out / f"{tower}.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for inputs, expected in both:
            difference = float(np.abs(session.run(None, inputs)[0] - expected).max())
            if not difference <= TOLERANCE:
                shapes = " and ".join(f"{name} {x.shape}" for name, x in inputs.items())
                raise UserError(
                    f"--onnx: the embeddings of {path.name} differ from the run's by up to "
                    f"{difference:.2g} for {shapes}, expected at most {TOLERANCE:g}; nothing was "
                    "written. Leave out --onnx, or take other versions than torch "
                    f"{torch.__version__}, transformers {transformers.__version__} and onnxruntime "
                    f"{onnxruntime.__version__}"
                )
            worst = max(worst, difference)
    _log.info("onnxruntime's embeddings differ from the run's by at most %.1g", worst)


class _Tower(torch.nn.Module):
    """Embeds by the part of an encoder that takes inputs of some names."""

    def __init__(self, encoder, names):
        super().__init__()
        self.encoder, self.names = encoder, names

    def forward(self, *inputs):
        return self.encoder(dict(zip(self.names, inputs, strict=True)))["sentence_embedding"]


def _cases(model):
    """Returns pairs of the inputs of each tower, for two numbers of rows, and the run's embeddings.

    The texts have two lengths as well.
    """
    config, rng = model.config, np.random.default_rng(0)
    side, length = config.encoder.image.image_size, config.evaluation.text_length
    statistics = config.image_mean, config.image_std
    # As PyTorch computes: in float32, on any device.
    portable = {
        name: getattr(model.module, name).clone(dtype=jnp.float32, attention="xla", mesh=None)
        for name in TOWERS
    }
    module, cases = model.module.clone(**portable), {tower: [] for tower in TOWERS}

    def add(tower, inputs, batch):
        embed = jax.jit(lambda *given: embed_one(module.apply, *given, statistics, tower))
        cases[tower].append((inputs, jax.device_get(embed(model.params, batch))))

    for rows, tokens in ((3, length), (1, (length + 1) // 2)):
        image = rng.integers(0, 256, (rows, side, side, 3), np.uint8)
        pixels = np.asarray(normalize_pixels(image, *statistics)).transpose(0, 3, 1, 2)
        add("image", {"pixel_values": pixels}, {"image": image})
        ids, mask = model.tokenize(_TEXTS[:rows], tokens)
        batch = {"input_ids": ids, "attention_mask": mask}
        add("text", {name: array.astype(np.int64) for name, array in batch.items()}, batch)
    return cases


def _write(encoder, path, inputs):
    """Writes a tower, any number of rows and tokens free, without paths of this machine's files."""
    axes = {0: "batch"} | ({1: "length"} if "input_ids" in inputs else {})
    # Two rows, since PyTorch takes an axis of one for a constant.
    tensors = tuple(torch.tensor(array[:2]) for array in inputs.values())
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            _Tower(encoder, list(inputs)),
            tensors,
            input_names=list(inputs),
            output_names=["embeddings"],
            dynamic_shapes=((axes,) * len(inputs),),
            verbose=False,
        )
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    program.save(path)
