"""The truth of `shapes`, against hand-made scenes and over sampled ones."""

import io

import numpy as np
import pytest
from PIL import Image

from fne_jax.data.sources import shapes_scenes as scenes

CIRCLE, SQUARE, STAR = (scenes.SHAPES.index(name) for name in ("circle", "square", "star"))
RED, BLUE = (list(scenes.COLOURS).index(name) for name in ("red", "blue"))
SMALL, LARGE = 0, 1
NONE = scenes.UNSTATED
TOP_LEFT, BOTTOM_RIGHT = scenes.CELLS.index("top left"), scenes.CELLS.index("bottom right")

# A large red circle at the top left, a small blue square at the bottom right.
SCENE = np.array(
    [[CIRCLE, RED, LARGE, 15, 15], [SQUARE, BLUE, SMALL, 50, 50], [NONE] * scenes.SCENE_FIELDS]
)


def facts(first, second=(NONE,) * 4, relation=NONE):
    return np.array([*first, *second, relation])


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (facts((CIRCLE, NONE, NONE, NONE)), True),
        (facts((CIRCLE, RED, LARGE, TOP_LEFT)), True),
        (facts((CIRCLE, RED, SMALL, NONE)), False),
        (facts((CIRCLE, BLUE, NONE, NONE)), False),  # blue is there, but not the circle
        (facts((CIRCLE, NONE, NONE, BOTTOM_RIGHT)), False),
        (facts((STAR, NONE, NONE, NONE)), False),
        (facts((NONE, NONE, NONE, NONE)), True),
        (facts((CIRCLE, RED, NONE, NONE), (SQUARE, NONE, SMALL, NONE), scenes.LEFT_OF), True),
        (facts((SQUARE, NONE, NONE, NONE), (CIRCLE, NONE, NONE, NONE), scenes.LEFT_OF), False),
        (facts((CIRCLE, NONE, NONE, NONE), (SQUARE, NONE, NONE, NONE), scenes.ABOVE), True),
        (facts((SQUARE, NONE, NONE, NONE), (CIRCLE, NONE, NONE, NONE), scenes.ABOVE), False),
        (facts((SQUARE, NONE, NONE, NONE), (CIRCLE, NONE, NONE, NONE), scenes.TOGETHER), True),
        # One circle is not two.
        (facts((CIRCLE, NONE, NONE, NONE), (CIRCLE, NONE, NONE, NONE), scenes.TOGETHER), False),
    ],
)
def test_is_true_of_a_hand_made_scene(stated, expected):
    assert bool(scenes.is_true(stated, SCENE)) is expected


def test_relations_need_a_clear_gap():
    near = SCENE.copy()
    near[1, 3] = near[0, 3] + scenes.RELATION_GAP - 1
    stated = facts((CIRCLE, NONE, NONE, NONE), (SQUARE, NONE, NONE, NONE), scenes.LEFT_OF)
    assert not scenes.is_true(stated, near)
    near[1, 3] += 1
    assert scenes.is_true(stated, near)


@pytest.fixture(scope="module")
def rendered():
    vocabulary = scenes.Vocabulary()
    result = []
    for index in range(300):
        rng = np.random.default_rng([7, index])
        scene = scenes.random_scene(rng, vocabulary)
        result.append((scene, *scenes.random_captions(rng, scene), scenes.render_image(rng, scene)))
    return result


def test_all_captions_are_true_of_their_image(rendered):
    for scene, captions, stated, _ in rendered:
        assert scenes.is_true(stated, scene).all(), (captions, scene)
        assert len(captions) == len(np.unique(stated, axis=0)) == scenes.CAPTIONS_PER_IMAGE


def test_captions_say_what_their_facts_say(rendered):
    for _, captions, stated, _ in rendered:
        for caption, row in zip(captions, stated, strict=True):
            assert (scenes.SHAPES[row[0]] in caption) and not caption.endswith(" ")
            if row[1] != NONE:
                assert list(scenes.COLOURS)[row[1]] in caption
            if row[3] != NONE:
                assert scenes.CELLS[row[3]] in caption
            assert (row[8] == NONE) == (sum(caption.count(n) for n in scenes.SHAPES) == 1)


def test_density_of_false_negatives_is_as_stated(rendered):
    truth = scenes.truth_matrix(
        np.concatenate([d[2] for d in rendered]), np.stack([d[0] for d in rendered])
    )
    own = np.repeat(np.eye(len(rendered), dtype=bool), scenes.CAPTIONS_PER_IMAGE, axis=1)
    assert truth[own].all()
    assert 0.003 < truth[~own].mean() < 0.02


def test_truth_matrix_is_is_true(rendered):
    stated, all_scenes = (
        np.concatenate([d[2] for d in rendered[:20]]),
        np.stack([d[0] for d in rendered[:7]]),
    )
    truth = scenes.truth_matrix(stated, all_scenes)
    slow = [[bool(scenes.is_true(f, s)) for f in stated] for s in all_scenes]
    np.testing.assert_array_equal(truth, slow)


def test_the_truth_of_a_split_and_of_some_of_its_captions(rendered):
    truth = scenes.SceneTruth(
        scenes=np.stack([one[0] for one in rendered[:7]]),
        facts=np.concatenate([one[2] for one in rendered[:7]]),
    )
    matrix = truth.matrix()
    assert matrix.shape == (7, 35)
    caption, image = np.array([0, 34, 7, 7]), np.array([0, 6, 1, 5])
    np.testing.assert_array_equal(truth.is_true(caption, image), matrix[image, caption])
    kept = [3, 0, 34]
    np.testing.assert_array_equal(truth.of_captions(kept).matrix(), matrix[:, kept])


def test_objects_are_rendered_where_the_scene_says(rendered):
    red = np.array(scenes.COLOURS["red"])
    circles = 0
    for scene, _, _, jpeg in rendered:
        image = Image.open(io.BytesIO(jpeg))
        assert image.size == (scenes.IMAGE_SIZE,) * 2 and image.mode == "RGB"
        for shape, colour, _, x, y in scene:
            if (shape, colour) == (CIRCLE, RED):
                circles += 1
                assert np.abs(np.array(image)[y, x] - red).max() < 60
    assert circles > 0


def test_images_and_captions_are_a_function_of_the_seed(rendered):
    rng = np.random.default_rng([7, 0])
    scene = scenes.random_scene(rng, scenes.Vocabulary())
    captions, _ = scenes.random_captions(rng, scene)
    assert (captions, scenes.render_image(rng, scene)) == (rendered[0][1], rendered[0][3])


def test_vocabulary_out_of_range():
    with pytest.raises(ValueError, match="shapes: expected a number from 1 to 8, got 9"):
        scenes.Vocabulary(shapes=9)
