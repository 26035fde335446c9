import io

import numpy as np
from PIL import Image

from fne_jax.data.pairs import PairDataset
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.training.retrieved_images import retrieved_images

COLOURS = np.array([(200, 0, 0), (0, 0, 200), (250, 250, 0), (0, 0, 0)], np.uint8)


def test_captions_stand_above_what_is_found_in_order_and_framed():
    images = np.tile(COLOURS[:, None, None, :], (1, 9, 16, 1))
    dataset = PairDataset(
        captions=["a", "b", "c"],
        caption_image=np.array([0, 3, 2], np.int32),
        image_id=np.arange(4, dtype=np.int32),
        images=images,
        caption_id=np.arange(3),
        source_image_id=list("wxyz"),
    )
    similarity = np.array([[0.1, 0.9, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1], [0.0, 0.2, 0.8, 0.6]])
    truth = np.zeros((4, 3), bool)
    truth[dataset.caption_image, np.arange(3)] = True
    truth[2, 0] = True
    split = EmbeddedSplit(
        np.eye(4, dtype=np.float32), similarity.astype(np.float32), dataset.caption_image,
        dataset.image_id, dataset.caption_id, truth, dataset,
    )  # fmt: skip
    page = retrieved_images(split)
    assert page.dtype == np.uint8 and page.shape == (1, 3 * 142, 5 * 120, 3)
    blue, green, grey = (59, 130, 196), (47, 158, 98), (225, 226, 230)
    frames = [[grey, blue, grey, green], [grey, grey, grey, green], [green, grey, grey, grey]]
    for row, order in enumerate(np.argsort(-similarity, axis=1)):
        for place, image in enumerate(order):
            top, left = row * 142 + 22, place * 120
            assert tuple(page[0, top, left]) == frames[row][place]
            centre = page[0, top + 60, left + 60].astype(int)
            assert np.abs(centre - COLOURS[image]).max() < 12  # a JPEG's
        assert (page[0, row * 142 : row * 142 + 22] != 255).any()  # the caption


def test_records_that_are_jpegs_are_shown_too():
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 160, 0)).save(stream, "JPEG")
    dataset = PairDataset(
        captions=["one"],
        caption_image=np.zeros(1, np.int32),
        image_id=np.zeros(1, np.int32),
        images=[{"image": stream.getvalue()}],
        caption_id=np.zeros(1, int),
        source_image_id=["x"],
    )
    one = np.ones((1, 1), np.float32)
    ids = dataset.caption_image, dataset.image_id, dataset.caption_id
    split = EmbeddedSplit(one, one, *ids, dataset=dataset)
    page = retrieved_images(split)
    assert page.shape == (1, 142, 600, 3)
    assert np.abs(page[0, 82, 60].astype(int) - (0, 160, 0)).max() < 12
