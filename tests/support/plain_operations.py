"""RandAugment's operations in plain form: PIL's, and moves one pixel at a time.

`python -m tests.support.plain_operations` writes tests/golden/images.npz from them: rendered images
in the layout of the authors' figures. Theirs are of photographs that may not be distributed;
`pytest --golden=DIR` compares with them.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from fne_jax.data.images.augmentation import ARGUMENTS, FILL
from tests.support import TOP

PIXELS_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXELS_STD = (0.26862954, 0.26130258, 0.27577711)
EVALUATION_SIZE = 96
# Our names, and those in the figures.
FIGURES = {
    "identity": "Identity",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
}
_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def with_pil(name, image, argument):
    source = Image.fromarray(image)
    return np.asarray(
        {
            "identity": lambda: source,
            "autocontrast": lambda: ImageOps.autocontrast(source),
            "equalize": lambda: ImageOps.equalize(source),
            "brightness": lambda: ImageEnhance.Brightness(source).enhance(argument),
            "sharpness": lambda: ImageEnhance.Sharpness(source).enhance(argument),
        }[name]()
    )


def slow_move(image, name, argument):
    """Bilinear, one pixel at a time, the fill outside."""
    height, width, _ = image.shape
    cos, sin = math.cos(math.radians(argument)), math.sin(math.radians(argument))
    cx, cy = width / 2, height / 2
    came_from = {
        "shear_x": lambda x, y: (x - argument * y, y),
        "shear_y": lambda x, y: (x, y - argument * x),
        "translate_x": lambda x, y: (x + argument, y),
        "translate_y": lambda x, y: (x, y + argument),
        "rotate": lambda x, y: (
            cos * (x - cx) - sin * (y - cy) + cx,
            sin * (x - cx) + cos * (y - cy) + cy,
        ),
    }[name]

    def at(x, y):
        inside = 0 <= x < width and 0 <= y < height
        return image[y, x].astype(float) if inside else np.full(3, FILL, float)

    out = np.empty(image.shape)
    for y in range(height):
        for x in range(width):
            fx, fy = came_from(x, y)
            left, top = math.floor(fx), math.floor(fy)
            a, b = fx - left, fy - top
            upper = (1 - a) * at(left, top) + a * at(left + 1, top)
            lower = (1 - a) * at(left, top + 1) + a * at(left + 1, top + 1)
            out[y, x] = (1 - b) * upper + b * lower
    return out


def render_pixels(seed):
    """Returns [160, 170, 3] uint8: soft light and a few hard-edged shapes."""
    rng = np.random.default_rng(seed)
    light = Image.fromarray(rng.integers(30, 226, (6, 7, 3)).astype(np.uint8))
    image = light.resize((170, 160), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = (int(value) for value in rng.integers(0, 130, 2))
        fill = tuple(int(value) for value in rng.integers(10, 246, 3))
        canvas.ellipse([x, y, x + 40, y + 25], fill=fill)
    return np.asarray(image) // 16 * 16  # few levels, for a small file


def write_figures(path):
    """Writes the figures of two rendered images."""
    figures = {}
    for image in ("image0", "image1"):
        pixels = render_pixels(int(image[-1]))
        figures[image] = pixels
        for name, title in FIGURES.items():
            argument = ARGUMENTS.get(name, 0.0)
            for number, value in enumerate(
                (argument, -argument) if name in _MOVES else (argument,)
            ):
                figures[f"args_{title}_{number}"] = np.float64(value)
                apply = slow_move if name in _MOVES else lambda p, n, v: with_pil(n, p, v)
                result = np.round(apply(pixels, name, value)).astype(np.uint8)
                figures[f"{image}_{title}_{number}"] = result
        size = (EVALUATION_SIZE, EVALUATION_SIZE)
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        figures[f"{image}_eval96_uint8"] = np.asarray(resized)
        normalised = (np.asarray(resized) / 255 - PIXELS_MEAN) / PIXELS_STD
        figures[f"{image}_eval96_normalised"] = normalised.astype(np.float32)
    np.savez_compressed(path, **figures)


if __name__ == "__main__":
    write_figures(TOP / "tests" / "golden" / "images.npz")
