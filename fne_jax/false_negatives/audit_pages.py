"""An audit's pairs as CSV, as JSON lines and as pages to browse."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.data.tables import safe_cell
from fne_jax.false_negatives.detectors import DETECTORS
from fne_jax.false_negatives.judged_split import JudgedSplit
from fne_jax.false_negatives.suspects import Suspects, heeded, precision_text
from fne_jax.false_negatives.wrong_labels import SCORE
from fne_jax.files import as_user_error
from fne_jax.report import example_cards, html

CSV_NAME, JSONL_NAME = "likely_false_negatives.csv", "likely_false_negatives.jsonl"
LABEL_NAMES = "likely_wrong_labels.csv", "likely_wrong_labels.jsonl"
# How good the detectors are; written where the truth is known.
QUALITY_NAME = "detectors.json"
# Pairs after which a page ends, with the last of them all pairs of its image.
_ROWS_A_PAGE = 50
# Pairs of an image that are shown before one asks for more.
_ROWS_SHOWN = 4

Row = dict[str, Any]


def write_audit(
    folder: pathlib.Path,
    judged: JudgedSplit,
    suspects: Suspects,
    limit: int,
    quality: Mapping[str, Any],
) -> int:
    """Writes the first pairs of an audit, and returns how many these are.

    The folder is created if need be. `quality` is what `detector_quality` returned; an older
    audit's goes where it is empty. Raises UserError if a file cannot be written.
    """
    about = {
        "run": judged.name,
        "step": judged.step,
        "split": judged.split_name,
        "suspected": len(suspects.pairs),
        "heeded": heeded(suspects),
        "of_run": judged.step is not None,
        "of_labels": suspects.of_labels,
    }
    if suspects.of_labels:
        about |= {"rank_by": SCORE, "precision": ""}
    else:
        about |= {
            "least": suspects.least,
            "per_query": suspects.per_query,
            "rank_by": "by the detector's probability, then by its score",
            "detector": suspects.detector,
            "description": DETECTORS[suspects.detector].description,
            "score": DETECTORS[suspects.detector].score,
            "prior": judged.config.fne.prior,
            "precision": precision_text(judged.dataset, suspects.pairs),
        }
    pairs = suspects.pairs[:limit]
    listed = rows(judged, pairs, suspects.detector)
    for row, confirmed in zip(listed, suspects.confirmed.tolist(), strict=False):
        row["confirmed"] = confirmed
    write(folder, judged.dataset, listed, about)
    if quality:
        html.write_text(folder / QUALITY_NAME, json.dumps(quality, indent=2) + "\n")
    else:
        (folder / QUALITY_NAME).unlink(missing_ok=True)
    return len(listed)


def rows(split: JudgedSplit, pairs: Pairs, detector: str) -> list[Row]:
    """Returns a row for each pair, as CSV and JSON lines hold it."""
    dataset = split.dataset
    own = dataset.caption_image[pairs.caption]
    in_truth = None
    if dataset.truth is not None:
        in_truth = dataset.truth.is_true(pairs.caption, pairs.image)
    found = []
    for index, (caption, image) in enumerate(zip(pairs.caption, pairs.image, strict=True)):
        row = {
            "rank": index + 1,
            **_probability(pairs, index),
            "score": round(float(pairs.score[index]), 6),
            "detector": detector,
            "similarity": round(float(pairs.similarity[index]), 6),
            "labelled_similarity": round(float(split.own_similarity[caption]), 6),
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
        if pairs.nearest is not None:
            nearest = int(pairs.nearest[index])
            row["nearest_own_caption"] = dataset.captions[nearest] if nearest >= 0 else ""
        if in_truth is not None:
            row["in_truth"] = bool(in_truth[index])
        found.append(row)
    return found


def _probability(pairs, index):
    """Returns the probability with six digits, for most are tiny; nothing of labelled pairs."""
    if pairs.probability is None:
        return {}
    return {"probability": float(f"{pairs.probability[index]:.6g}")}


def write(
    folder: pathlib.Path, dataset: PairDataset, found: Sequence[Row], about: Mapping[str, Any]
) -> None:
    """Writes the CSV, the JSON lines and the pages; pages of a longer audit before it go.

    The folder is created if need be; `about` is what the pages' heading tells, by the template's
    names. Raises UserError if a file cannot be written.
    """
    with as_user_error(f"{folder}: cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
    # With a byte order mark, without which Excel reads UTF-8 as the system's own encoding.
    csv_name, jsonl_name = LABEL_NAMES if about["of_labels"] else (CSV_NAME, JSONL_NAME)
    html.write_text(folder / csv_name, "\N{BYTE ORDER MARK}" + _csv_text(found))
    html.write_text(folder / jsonl_name, "".join(json.dumps(row) + "\n" for row in found))
    pages = _pages(found)
    names = [page_name(number) for number in range(1, len(pages) + 1)]
    for number, groups in enumerate(pages, start=1):
        values = {
            **about,
            "groups": [_group(dataset, group) for group in groups],
            "total": len(found),
            "page": number,
            "names": names,
            "csv": csv_name,
            "jsonl": jsonl_name,
        }
        html.write_text(folder / page_name(number), html.render("audit.html", values))
    for old in folder.glob("page_*.html"):
        number = old.stem.removeprefix("page_")
        if number.isdecimal() and int(number) > len(pages):
            old.unlink()


def _pages(found: Sequence[Row]) -> list[list[list[Row]]]:
    """Returns the pages, each a list of groups of rows that suspect the same image.

    The groups come in the order of their first rows, so that an image that many captions seem to
    fit is looked at once.
    """
    groups: dict[int, list[Row]] = {}
    for row in found:
        groups.setdefault(row["image_index"], []).append(row)
    pages: list[list[list[Row]]] = [[]]
    for group in groups.values():
        if sum(map(len, pages[-1])) >= _ROWS_A_PAGE:
            pages.append([])
        pages[-1].append(group)
    return pages


def page_name(number: int) -> str:
    """Returns the file name of a page, from 1."""
    return "index.html" if number == 1 else f"page_{number}.html"


def _group(dataset, rows):
    cards = [
        {
            **row,
            "labelled": example_cards.show_image(dataset, row["labelled_image_index"]),
            "in_truth": row.get("in_truth"),
            "confirmed": row.get("confirmed", False),
            "nearest_own_caption": row.get("nearest_own_caption", ""),
        }
        for row in rows
    ]
    return {
        "image": example_cards.show_image(dataset, rows[0]["image_index"]),
        "source_image_id": rows[0]["source_image_id"],
        "first": cards[:_ROWS_SHOWN],
        "further": cards[_ROWS_SHOWN:],
    }


def _csv_text(found):
    stream = io.StringIO()
    writer = csv.writer(stream)
    if found:
        writer.writerow(found[0])
        writer.writerows([safe_cell(value) for value in row.values()] for row in found)
    return stream.getvalue()
