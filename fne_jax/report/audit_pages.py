"""An audit's pairs as CSV, as JSON lines and as pages to browse."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.report import example_cards, html
from fne_jax.report.suspects import RANKINGS, JudgedSplit, Suspects
from fne_jax.retrieval.unlabelled import UnlabelledPairs

CSV_NAME, JSONL_NAME = "likely_false_negatives.csv", "likely_false_negatives.jsonl"
_ROWS_A_PAGE = 50

Row = dict[str, Any]


def write_audit(folder: pathlib.Path, judged: JudgedSplit, suspects: Suspects, limit: int) -> int:
    """Writes the first pairs of an audit, and returns how many these are.

    Args:
      folder: The folder to write into; it is created if need be.
      judged: The split.
      suspects: All its suspects.
      limit: The most pairs that are written.

    Raises:
      UserError: if a file cannot be written.
    """
    about = {
        "run": judged.name,
        "step": judged.step,
        "split": judged.split_name,
        "suspected": len(suspects.posterior),
        "least": suspects.least,
        "per_query": suspects.per_query,
        "rank_by": RANKINGS[suspects.rank_by],
        "prior": judged.config.fne.prior,
    }
    listed = rows(judged.dataset, suspects.pairs[:limit], suspects.posterior[:limit])
    write(folder, judged.dataset, listed, about)
    return len(listed)


def rows(dataset: PairDataset, pairs: UnlabelledPairs, posterior: np.ndarray) -> list[Row]:
    """Returns a row for each pair, as CSV and JSON lines hold it.

    Args:
      dataset: The split.
      pairs: Pairs of its captions and images.
      posterior: [pairs] probability that each is a match.
    """
    own = dataset.caption_image[pairs.caption]
    in_truth = None
    if dataset.truth is not None:
        in_truth = dataset.truth.is_true(pairs.caption, pairs.image)
    found = []
    for index, (caption, image) in enumerate(zip(pairs.caption, pairs.image, strict=True)):
        row = {
            "rank": index + 1,
            "posterior": round(float(posterior[index]), 6),
            "similarity": round(float(pairs.similarity[index]), 6),
            "labelled_similarity": round(float(pairs.own_similarity[index]), 6),
            "caption_index": int(caption),
            "caption_id": int(dataset.caption_id[caption]),
            "caption": dataset.captions[caption],
            "image_index": int(image),
            "image_id": int(dataset.image_id[image]),
            "source_image_id": dataset.source_image_id[image],
            "labelled_image_index": int(own[index]),
            "labelled_image_id": int(dataset.image_id[own[index]]),
            "labelled_source_image_id": dataset.source_image_id[own[index]],
        }
        if in_truth is not None:
            row["in_truth"] = bool(in_truth[index])
        found.append(row)
    return found


def write(
    folder: pathlib.Path, dataset: PairDataset, found: Sequence[Row], about: Mapping[str, Any]
) -> None:
    """Writes the CSV, the JSON lines and the pages; pages of a longer audit before it go.

    Args:
      folder: The folder to write into; it is created if need be.
      dataset: The split, for its images.
      found: What `rows` returned.
      about: What the pages' heading tells, by the template's names.

    Raises:
      UserError: if a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error}") from error
    html.write_text(folder / CSV_NAME, _csv_text(found))
    html.write_text(folder / JSONL_NAME, "".join(json.dumps(row) + "\n" for row in found))
    pages = max(-(-len(found) // _ROWS_A_PAGE), 1)
    for page in range(1, pages + 1):
        shown = found[(page - 1) * _ROWS_A_PAGE : page * _ROWS_A_PAGE]
        values = {
            **about,
            "rows": [_card(dataset, row) for row in shown],
            "total": len(found),
            "page": page,
            "names": [page_name(number) for number in range(1, pages + 1)],
            "csv": CSV_NAME,
            "jsonl": JSONL_NAME,
        }
        html.write_text(folder / page_name(page), html.render("audit.html", values))
    for old in folder.glob("page_*.html"):
        number = old.stem.removeprefix("page_")
        if number.isdigit() and int(number) > pages:
            old.unlink()


def page_name(number: int) -> str:
    """Returns the file name of a page, from 1."""
    return "index.html" if number == 1 else f"page_{number}.html"


def _card(dataset, row):
    return {
        **row,
        "image": example_cards.show_image(dataset, row["image_index"]),
        "labelled": example_cards.show_image(dataset, row["labelled_image_index"]),
        "in_truth": row.get("in_truth"),
    }


def _csv_text(found):
    stream = io.StringIO()
    writer = csv.writer(stream)
    if found:
        writer.writerow(found[0])
        writer.writerows(row.values() for row in found)
    return stream.getvalue()
