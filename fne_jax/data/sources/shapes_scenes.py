"""Scenes of coloured shapes, their images, captions that state part of them, and the truth.

A scene is an int array [MAX_OBJECTS, SCENE_FIELDS], one row an object: shape, colour, size (0
small, 1 large), and the x and y of its centre in pixels of a 64-pixel image; rows of -1 are absent
objects. A caption's facts are an int array [FACT_FIELDS]: shape, colour, size and cell of a first
object, the same of a second, and how the two relate; -1 where the caption says nothing. Because
both are known, so is whether any caption is true of any image, which `is_true` tells.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
MAX_OBJECTS = 3
SCENE_FIELDS = 5
FACT_FIELDS = 9
CAPTIONS_PER_IMAGE = 5

# How many facts captions state: as it falls out, or four each, of scenes of three objects.
VARIED, FOUR = "varied", "four"
FACTS = (VARIED, FOUR)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "arrow")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 60, 170),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "pink": (250, 130, 190),
    "cyan": (40, 210, 220),
}
SIZES = (("small", "little"), ("large", "big"))
RADII = ((6.5, 8.0), (11.5, 12.5))
# What shapes but the ring are filled with: boxes of ellipses, and corners, from -1 to 1.
_ELLIPSES = {
    "circle": [((-1, -1), (1, 1))],
    "heart": [((-1, -0.9), (0, 0.1)), ((0, -0.9), (1, 0.1))],
}
_POLYGONS = {
    "square": [((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))],
    "triangle": [((0, -1), (1, 0.8), (-1, 0.8))],
    "star": [
        [
            (reach * math.sin(math.pi * step / 5), -reach * math.cos(math.pi * step / 5))
            for step, reach in enumerate((1.05, 0.42) * 5)
        ]
    ],
    "cross": [
        ((-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)),
        ((-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)),
    ],
    "heart": [((-0.95, -0.2), (0.95, -0.2), (0, 1))],
    "arrow": [((-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3))],
}
# One object at most stands in each quarter of the image, near its middle.
CELLS = ("top left", "top right", "bottom left", "bottom right")
JITTER = 3  # pixels, either way
UNSTATED = -1
TOGETHER, LEFT_OF, ABOVE = 0, 1, 2
# Two centres must differ by this many pixels before one is called left of or above the other.
RELATION_GAP = 12

_OPENINGS = ("{}", "{}", "{}", "there is {}")
_RELATIONS = {
    (TOGETHER, False): ("{a} and {b}", "{a} together with {b}"),
    (TOGETHER, True): ("{b} and {a}", "{b} together with {a}"),
    (LEFT_OF, False): ("{a} left of {b}", "{a} to the left of {b}"),
    (LEFT_OF, True): ("{b} right of {a}", "{b} to the right of {a}"),
    (ABOVE, False): ("{a} above {b}", "{a} over {b}"),
    (ABOVE, True): ("{b} below {a}", "{b} under {a}"),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How varied the scenes are, and how much their captions say.

    Attributes:
      shapes: How many of `SHAPES` are used.
      colours: How many of `COLOURS` are used.
      max_objects: The largest number of objects in a scene, 1 to `MAX_OBJECTS`.
      facts: `VARIED`, captions of one fact to seven; or `FOUR`, of four each, so that none is true
        of many more images than another because it says less. Scenes then have three objects.
    """

    shapes: int = 5
    colours: int = 7
    max_objects: int = 3
    facts: str = VARIED


@dataclasses.dataclass(frozen=True)
class SceneTruth:
    """Which captions of a split of scenes are true of which of its images, labelled or not.

    Attributes:
      scenes: The [images, MAX_OBJECTS, SCENE_FIELDS] int scenes of the images.
      facts: The [pairs, FACT_FIELDS] int facts of the captions.
    """

    scenes: np.ndarray
    facts: np.ndarray

    def is_true(self, caption: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Returns [n] bool for the [n] indices of captions and of images."""
        return is_true(self.facts[caption], self.scenes[image])

    def of_captions(self, rows: Sequence[int]) -> SceneTruth:
        """Returns the truth of some of the captions, which are renumbered in that order."""
        return SceneTruth(self.scenes, self.facts[rows])

    def matrix(self) -> np.ndarray:
        """Returns the truth of all captions, [images, pairs] bool."""
        images = len(self.scenes)
        bits = np.unpackbits(self.packed(), axis=1, count=images, bitorder="little")
        return np.ascontiguousarray(bits.T).view(bool)

    def packed(self, block: int = 1000) -> np.ndarray:
        """Returns the truth of all captions, eight images a byte, without ever holding `matrix`.

        `is_true` on the 10,000 scenes and 50,000 captions of the default training split takes
        minutes; rows of bits, one for each property that an object may have, give the same within
        seconds.

        Args:
          block: How many captions are judged at a time.

        Returns:
          [pairs, ceil(images / 8)] uint8; bit i % 8 (0 is the lowest) of byte i // 8 in a caption's
          row tells whether it is true of image i.
        """
        scenes, facts = self.scenes, self.facts
        present = scenes[:, :, 0] != UNSTATED
        actual = _properties(scenes)
        # By field: [values + 1, objects, bytes]; the last row is that of UNSTATED, which all fit.
        rows = []
        for field in range(actual.shape[-1]):
            largest = max(actual[..., field].max(), facts[:, [field, 4 + field]].max(), 0)
            fits = [present & (actual[..., field] == value) for value in range(largest + 1)]
            rows.append(_packed_images(np.stack([*fits, present])))
        related = _packed_images(
            np.stack([_related(scenes, kind) for kind in (TOGETHER, LEFT_OF, ABOVE)])
        )

        def fitting(stated):
            fits = rows[0][stated[:, 0]]
            for field in range(1, len(rows)):
                fits = fits & rows[field][stated[:, field]]
            return fits

        packed = np.empty((len(facts), (len(scenes) + 7) // 8), np.uint8)
        for start in range(0, len(facts), block):
            part = facts[start : start + block]
            first, second = fitting(part[:, 0:4]), fitting(part[:, 4:8])
            single = np.bitwise_or.reduce(first, axis=1)
            double = np.zeros_like(single)
            for a, b in np.argwhere(~np.eye(MAX_OBJECTS, dtype=bool)):
                double |= first[:, a] & second[:, b] & related[part[:, 8], a, b]
            packed[start : start + block] = np.where(part[:, 8:] == UNSTATED, single, double)
        return packed


def is_true(facts: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Returns whether captions are true of scenes, broadcasting over leading axes.

    A caption about one object is true if some object of the scene has all the stated properties;
    one about two if two different objects do and relate as stated.

    Args:
      facts: The [..., FACT_FIELDS] int facts of the captions.
      scene: The [..., MAX_OBJECTS, SCENE_FIELDS] int scenes.

    Returns:
      [...] bool.
    """
    first = _fits(facts[..., 0:4], scene)
    second = _fits(facts[..., 4:8], scene)
    relation = facts[..., 8, None, None]
    related = np.select(
        [relation == LEFT_OF, relation == ABOVE],
        [_related(scene, LEFT_OF), _related(scene, ABOVE)],
        _related(scene, TOGETHER),
    )
    pair = (first[..., :, None] & second[..., None, :] & related).any(axis=(-1, -2))
    return np.where(facts[..., 8] == UNSTATED, first.any(axis=-1), pair)


def _packed_images(truth):
    """Packs the first axis after the kinds, [kinds, images, ...] bool, to [kinds, ..., bytes]."""
    return np.packbits(np.moveaxis(truth, 1, -1), axis=-1, bitorder="little")


def _related(scene, relation):
    """Returns which two different objects [..., a, b] of scenes stand in one relation."""
    x, y = scene[..., 3], scene[..., 4]
    different = ~np.eye(MAX_OBJECTS, dtype=bool)
    gaps = {LEFT_OF: x[..., None, :] - x[..., :, None], ABOVE: y[..., None, :] - y[..., :, None]}
    if relation not in gaps:
        return np.broadcast_to(different, (*x.shape, MAX_OBJECTS))
    return different & (gaps[relation] >= RELATION_GAP)


def _fits(stated, scene):
    """Returns which objects have the stated properties: [..., 4], [..., objects, 5] -> bool."""
    stated = stated[..., None, :]
    agrees = (stated == UNSTATED) | (stated == _properties(scene))
    return agrees.all(axis=-1) & (scene[..., 0] != UNSTATED)


def _cell(scene):
    """Returns the index of `CELLS` in which objects [..., SCENE_FIELDS] have their centres."""
    half = IMAGE_SIZE // 2
    return (scene[..., 4] >= half) * 2 + (scene[..., 3] >= half)


def random_scene(rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
    """Returns a scene of objects in different quarters of the image.

    They are one to `max_objects`, and always as many where each caption states four facts.
    """
    weights = np.array([1.0, 3.0, 2.0])[: vocabulary.max_objects]
    if vocabulary.facts == FOUR:
        count = vocabulary.max_objects
    else:
        count = 1 + rng.choice(vocabulary.max_objects, p=weights / weights.sum())
    scene = np.full((MAX_OBJECTS, SCENE_FIELDS), UNSTATED, np.int32)
    for row, cell in enumerate(rng.permutation(len(CELLS))[:count]):
        quarter = IMAGE_SIZE // 4
        x, y = (2 * np.array([cell % 2, cell // 2]) + 1) * quarter
        x, y = np.array([x, y]) + rng.integers(-JITTER, JITTER + 1, 2)
        shape, colour = rng.integers(vocabulary.shapes), rng.integers(vocabulary.colours)
        scene[row] = (shape, colour, rng.integers(len(SIZES)), x, y)
    return scene


def random_captions(
    rng: np.random.Generator, scene: np.ndarray, kind: str = VARIED
) -> tuple[list[str], np.ndarray]:
    """Returns five captions of different facts, and the facts [5, FACT_FIELDS].

    Args:
      rng: Where the choices come from.
      scene: The [MAX_OBJECTS, SCENE_FIELDS] int scene; of three objects for `FOUR`.
      kind: One of `FACTS`.
    """
    random_facts = {VARIED: _varied_facts, FOUR: _four_facts}[kind]
    captions, facts = [], []
    while len(captions) < CAPTIONS_PER_IMAGE:
        stated = random_facts(rng, scene)
        if any((stated == other).all() for other in facts):
            continue
        facts.append(stated)
        captions.append(_phrase(rng, stated))
    return captions, np.stack(facts)


def _varied_facts(rng, scene):
    """States some facts of one object or of two, at least their shapes."""
    objects = scene[scene[:, 0] != UNSTATED]
    facts = np.full((FACT_FIELDS,), UNSTATED, np.int32)
    if len(objects) == 1 or rng.random() < 0.2:
        a = objects[rng.integers(len(objects))]
        facts[:4] = _state(rng, a)
        return facts
    a, b = objects[rng.permutation(len(objects))[:2]]
    relations = [TOGETHER, *_clear_relations(a, b)]
    relation = relations[rng.integers(len(relations))]
    a, b = _in_order(relation, a, b)
    facts[:4] = _state(rng, a, with_cell=False)
    facts[4:8] = _state(rng, b, with_cell=False)
    facts[8] = relation
    return facts


def _four_facts(rng, scene):
    """States four facts: all of one object, or the shapes of two and two more of the pair."""
    facts = np.full((FACT_FIELDS,), UNSTATED, np.int32)
    if rng.random() < 0.25:
        facts[:4] = _properties(scene[rng.integers(len(scene))])
        return facts
    a, b = scene[rng.permutation(len(scene))[:2]]
    # Of colour a, colour b, size a, size b and the relation.
    told = np.isin(np.arange(5), rng.permutation(5)[:2])
    relation = TOGETHER
    if told[4]:
        relations = _clear_relations(a, b)
        relation = relations[rng.integers(len(relations))]
        a, b = _in_order(relation, a, b)
    stated = [
        np.where([True, colour, size, False], _properties(one), UNSTATED)
        for one, colour, size in ((a, told[0], told[2]), (b, told[1], told[3]))
    ]
    if relation == TOGETHER:
        # In one order: turned round they would be the same facts, and count as others.
        stated.sort(key=tuple)
    facts[:4], facts[4:8] = stated
    facts[8] = relation
    return facts


def _clear_relations(a, b):
    """Returns which of `LEFT_OF` and `ABOVE` two objects' centres are far enough apart for.

    Objects in different quarters have at least one of them.
    """
    apart = ((LEFT_OF, abs(a[3] - b[3])), (ABOVE, abs(a[4] - b[4])))
    return [relation for relation, gap in apart if gap >= RELATION_GAP]


def _in_order(relation, a, b):
    """Returns two objects in the order in which the relation is true of them."""
    turned = (relation == LEFT_OF and a[3] > b[3]) or (relation == ABOVE and a[4] > b[4])
    return (b, a) if turned else (a, b)


def _state(rng, obj, with_cell=True):
    """States the shape of an object, mostly its colour, and its size and cell or not."""
    left_out = rng.random(4) < [0, 0.1, 0.5, 0.3 if with_cell else 1]
    return np.where(left_out, UNSTATED, _properties(obj))


def _properties(obj):
    """Returns shape, colour, size and cell of objects: [..., SCENE_FIELDS] -> [..., 4]."""
    return np.stack([obj[..., 0], obj[..., 1], obj[..., 2], _cell(obj)], axis=-1)


def _phrase(rng, facts):
    def noun(stated):
        shape, colour, size, cell = (int(value) for value in stated)
        words = []
        if size != UNSTATED:
            words.append(SIZES[size][rng.integers(len(SIZES[size]))])
        if colour != UNSTATED:
            words.append(list(COLOURS)[colour])
        words.append(SHAPES[shape])
        article = "an" if words[0][0] in "aeiou" else "a"
        where = "" if cell == UNSTATED else f" in the {CELLS[cell]}"
        return f"{article} {' '.join(words)}{where}"

    subject = noun(facts[:4])
    if facts[8] != UNSTATED:
        phrasings = _RELATIONS[int(facts[8]), bool(rng.integers(2))]
        phrasing = phrasings[rng.integers(len(phrasings))]
        subject = phrasing.format(a=subject, b=noun(facts[4:8]))
    return _OPENINGS[rng.integers(len(_OPENINGS))].format(subject)


def render_image(rng: np.random.Generator, scene: np.ndarray) -> bytes:
    """Returns a 64-pixel JPEG of a scene, its background, shades and sizes jittered."""
    scale = 3  # rendered larger and averaged down, so that edges are smooth
    side = IMAGE_SIZE * scale
    image = Image.fromarray(_background(rng)).resize((side, side), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image)
    for shape, colour, size, x, y in scene[scene[:, 0] != UNSTATED]:
        shade = np.array(list(COLOURS.values())[colour]) + rng.normal(0, 8, 3)
        fill = tuple(int(value) for value in np.clip(shade, 0, 255))
        radius = rng.uniform(*RADII[size]) * scale
        _render_shape(canvas, SHAPES[shape], (x * scale, y * scale), radius, fill)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def _background(rng):
    """Returns a few muted pixels that, enlarged, make a soft gradient."""
    base = rng.uniform(110, 190)
    pixels = base + rng.normal(0, 14, (4, 4, 1)) + rng.normal(0, 7, (4, 4, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _render_shape(canvas, shape, centre, radius, fill):
    def corners(points):
        return [(x + radius * px, y + radius * py) for px, py in points]

    x, y = centre
    for box in _ELLIPSES.get(shape, ()):
        canvas.ellipse(corners(box), fill=fill)
    for points in _POLYGONS.get(shape, ()):
        canvas.polygon(corners(points), fill=fill)
    if shape == "ring":
        canvas.ellipse(corners(((-1, -1), (1, 1))), outline=fill, width=round(0.38 * radius))
