"""What COCO's test split is scored by beside its own labels: folds, ECCV Caption and CxC."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from fne_jax.errors import UserError, needs_extra
from fne_jax.evaluation.metrics import QueryScores, match_scores
from fne_jax.evaluation.ranks import check_embeddings
from fne_jax.model.embedded_split import EmbeddedSplit

TEST_IMAGES = 5000
FOLDS = 5


def check_five_thousand(images: int, protocol: str) -> None:
    """Raises UserError unless there are as many images as in COCO's test split."""
    if images != TEST_IMAGES:
        raise UserError(
            f"the protocol {protocol} is for COCO's {TEST_IMAGES:,} test images; this split has "
            f"{images:,}"
        )


def folds(split: EmbeddedSplit) -> Iterator[EmbeddedSplit]:
    """Yields the five thousands of images, in order, each with its captions.

    Raises UserError if there are not 5,000 images.
    """
    check_five_thousand(len(split.image_emb), "coco_1k")
    size = TEST_IMAGES // FOLDS
    for fold in range(FOLDS):
        images = np.arange(fold * size, (fold + 1) * size)
        yield split.part(images, np.flatnonzero(split.caption_image // size == fold))


def extended_scores(split: EmbeddedSplit, source: str) -> dict[str, QueryScores]:
    """Returns both directions' scores against the matches that `eccv_caption` lists.

    Candidates are the 5,000 images and 25,000 captions that the package ranks; further captions
    of the split are left out. Matches that are not among them count as not found.

    The split is COCO's test split, with COCO's ids, in any order, and the source `eccv` or `cxc`.
    Raises UserError if the package is not installed, or any of its images or captions is missing.

    References:
      Chun et al., ECCV Caption, ECCV 2022; Parekh et al., Crisscrossed Captions, EACL 2021.
    """
    truth = _package()
    matching = {"eccv": truth.eccv_gts, "cxc": truth.cxc_gts}[source]
    split = split.part(*test_rows(split.image_id, split.caption_id, source))
    check_embeddings(split.image_emb, split.text_emb)
    rows, mask, count = _matches(matching["i2t"], split.image_id, split.caption_id)
    i2t = match_scores(split.image_emb[rows], split.text_emb, mask, rows, count)
    rows, mask, count = _matches(matching["t2i"], split.caption_id, split.image_id)
    image = split.caption_image[rows]
    return {
        "i2t": i2t,
        "t2i": match_scores(split.text_emb[rows], split.image_emb, mask, image, count),
    }


def test_rows(
    image_id: np.ndarray, caption_id: np.ndarray, protocol: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the images and captions that `eccv_caption` ranks.

    The ids are [images] and [captions]; the protocol is named in errors. Raises UserError if the
    package is not installed, or any of its images or captions is missing.
    """
    coco = _package().coco_gts
    images = _rows("image", image_id, coco["i2t"], protocol)
    return images, _rows("caption", caption_id, coco["t2i"], protocol)


@functools.cache
def _package() -> Any:
    """Returns `eccv_caption.Metrics`, which holds the matches of all benchmarks."""
    with warnings.catch_warnings():
        # It warns that it reads JSON without ujson, and counts without tqdm.
        warnings.simplefilter("ignore", UserWarning)
        with needs_extra("eccv", "--protocol=eccv or cxc"):
            import eccv_caption
        return eccv_caption.Metrics()


def _rows(kind, ids, wanted, protocol):
    """Returns the rows of the wanted ids, in the order of the rows."""
    rows = np.flatnonzero(np.isin(ids, np.fromiter(wanted, int)))
    found = ids[rows]
    if len(np.unique(found)) != len(found):
        raise UserError(f"the protocol {protocol}: {kind} ids of COCO are in this split twice")
    if len(rows) < len(wanted):
        missing = sorted(set(wanted) - set(found.tolist()))
        raise UserError(
            f"the protocol {protocol} is for COCO's test split with COCO's ids: {len(missing)} of "
            f"{len(wanted)} {kind} ids are not in this one, first {missing[:3]}; "
            "a split read from dataset_coco.json has them"
        )
    return rows


def _matches(matching, query_ids, item_ids):
    """Returns the rows of the queries that have matches, these as a mask, and their numbers.

    The mask is [queries, items] bool, and the numbers count matches that are no items as well.
    """
    row = {number: index for index, number in enumerate(item_ids.tolist())}
    queries = [index for index, number in enumerate(query_ids.tolist()) if number in matching]
    mask = np.zeros((len(queries), len(item_ids)), bool)
    lists = [set(matching[number]) for number in query_ids[queries].tolist()]
    for query, ids in enumerate(lists):
        mask[query, [row[one] for one in ids if one in row]] = True
    return np.array(queries), mask, np.array([len(ids) for ids in lists])
