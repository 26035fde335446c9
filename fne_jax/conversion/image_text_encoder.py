"""The encoders of this folder as a PyTorch module, which is also that of SentenceTransformer.

    encoder = ImageTextEncoder.load("path/of/this/folder")
    encoder.embed_images(["beach.jpg"]) @ encoder.embed_texts(["a dog on a beach"]).T

It takes PyTorch, transformers 5 and Pillow. `python -m fne_jax.convert export` wrote the folder.
"""

from __future__ import annotations

import functools
import io
import json
import pathlib
import shutil

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image, ImageOps

from fne_jax.data.captions import clean_caption

SETTINGS, HEADS = "image_text_encoder.json", "heads.safetensors"
_LAYERS = {
    "linear": torch.nn.Linear,
    "norm": functools.partial(torch.nn.LayerNorm, eps=1e-12),
    "gelu": functools.partial(torch.nn.GELU, approximate="tanh"),
    "tanh": torch.nn.Tanh,
    "identity": torch.nn.Identity,
}


def _mean(hidden, mask):
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


# Of [batch, tokens, width] hidden states, and the [batch, tokens, 1] mask, 0 at padding.
_POOLINGS = {
    "mean": _mean,
    "mean_with_padding": lambda hidden, mask: hidden.mean(1),
    "mean_to_longest": lambda hidden, mask: _mean(hidden, mask.amax(0, keepdim=True)),
    "first": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -1e9).amax(1),
    "first_and_mean": lambda hidden, mask: torch.cat(
        [hidden[:, 0], _mean(hidden[:, 1:], mask[:, 1:])], -1
    ),
}


class ImageTextEncoder(torch.nn.Module):
    """Embeds images and sentences into one unit sphere, as the run that it comes from.

    Attributes:
      settings: What is done around the two models. If the run's objective had logits, these are
        exp(`logit_scale`) * similarity, plus `logit_bias` if there is one.
    """

    # What sentence-transformers asks.
    modalities, save_in_root = ("text", "image"), True

    def __init__(self, folder):
        super().__init__()
        self.folder = pathlib.Path(folder)
        self.settings = json.loads((self.folder / SETTINGS).read_text("utf-8"))
        image, text = (self.folder / self.settings[tower]["folder"] for tower in ("image", "text"))
        self.pixels = json.loads((image / "preprocessor_config.json").read_text("utf-8"))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(text)
        self.image = transformers.AutoModel.from_pretrained(image)
        self.text = self.image if image == text else transformers.AutoModel.from_pretrained(text)
        self.heads = torch.nn.ModuleDict()
        for tower in ("image", "text"):
            head = (_LAYERS[kind](*sizes) for kind, *sizes in self.settings[tower]["head"])
            self.heads[tower] = torch.nn.Sequential(*head)
        if self.heads.state_dict():
            self.heads.load_state_dict(safetensors.torch.load_file(self.folder / HEADS))
        self.eval()

    @classmethod
    def load(cls, folder, **_):
        """Returns the module of a folder."""
        return cls(folder)

    def save(self, folder, **_):
        """Writes the module, which may have been trained further, into another folder."""
        folder = pathlib.Path(folder)
        programs = shutil.ignore_patterns("*.onnx*", "*.stablehlo")  # of the weights before
        shutil.copytree(self.folder, folder, ignore=programs, dirs_exist_ok=True)
        for tower, model in (("image", self.image), ("text", self.text)):
            model.save_pretrained(folder / self.settings[tower]["folder"])
        if heads := self.heads.state_dict():
            safetensors.torch.save_file(heads, folder / HEADS)

    def embed_texts(self, texts):
        """Returns the [texts, dim] unit embeddings of sentences, or of a single one."""
        return self._embed([texts] if isinstance(texts, str) else list(texts))

    def embed_images(self, images):
        """Returns the [images, dim] unit embeddings of images, the paths of files or PIL's."""
        images = [images] if isinstance(images, str | pathlib.Path | Image.Image) else images
        return self._embed([x if isinstance(x, Image.Image) else Image.open(x) for x in images])

    @torch.no_grad()
    def _embed(self, inputs):
        device = next(self.parameters()).device
        features = {name: part.to(device) for name, part in self.preprocess(inputs).items()}
        return self(features)["sentence_embedding"]

    def get_embedding_dimension(self):
        """Returns the dimension of the embeddings."""
        return self.settings["dim"]

    def preprocess(self, inputs, prompt=None, **_):
        """Returns what `forward` takes: of sentences, or of images of PIL."""
        if not isinstance(inputs[0], str):
            pixels = np.stack([self._pixels(image) for image in inputs])
            return {"pixel_values": torch.tensor(pixels, dtype=torch.float32)}
        texts = [self._cleaned((prompt or "") + text) for text in inputs]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens["input_ids"]
        mask = tokens.get("attention_mask", torch.ones_like(ids))
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, features, **_):
        """Returns the features with `sentence_embedding`, [inputs, dim]."""
        tower = "text" if "input_ids" in features else "image"
        settings, model = self.settings[tower], getattr(self, tower)
        count = settings["pooled_layers"]
        # CLIP and SigLIP are one model of both.
        encode = getattr(model, f"get_{tower}_features", model)
        out = encode(**features, output_hidden_states=count > 1)
        hidden = out.last_hidden_state
        if count > 1:
            norm = getattr(model, "layernorm", getattr(model, "norm", torch.nn.Identity()))
            hidden = torch.cat([*map(norm, out.hidden_states[-count:-1]), hidden], -1)
        if settings["pooling"] == "checkpoint":
            pooled = out.pooler_output
        else:
            mask = features.get("attention_mask", hidden.new_ones(hidden.shape[:2]))
            pooled = _POOLINGS[settings["pooling"]](hidden, mask[..., None])
        embedding = torch.nn.functional.normalize(self.heads[tower](pooled), dim=-1)
        return features | {"sentence_embedding": embedding}

    def _cleaned(self, text):
        text = clean_caption(text, self.settings["max_words"], self.settings["cleaning"])
        return f"{self.settings['prompt']}{text}".strip() if self.settings["prompt"] else text

    def _pixels(self, image):
        """Returns the [3, side, side] normalised pixels of an image of PIL."""
        side = self.pixels["size"]["height"], self.pixels["size"]["width"]
        resized = _stored(image, self.settings["resize_to"]).resize(side, Image.Resampling.BICUBIC)
        pixels = np.asarray(resized) / 255 - self.pixels["image_mean"]
        return (pixels / self.pixels["image_std"]).transpose(2, 0, 1)


def _stored(image, resize_to):
    """Returns an image as the run read it: an upright RGB JPEG, of quality 95 unless it was one."""
    upright, large = image.getexif().get(0x0112, 1) == 1, 0 < resize_to < min(image.size)
    if image.format in ("JPEG", "MPO") and image.mode == "RGB" and upright and not large:
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.round(np.clip(np.asarray(image), 0, 65535) / 257)
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    if large:
        scale = resize_to / min(image.size)
        size = [max(resize_to, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=95)
    return Image.open(stored)
