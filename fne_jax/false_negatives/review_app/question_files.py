"""Questions as JSON lines, with their images as files, for whoever answers them elsewhere."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

from fne_jax.data.images.preprocessing import small_jpeg
from fne_jax.data.pairs import PairDataset
from fne_jax.false_negatives.review_app.questions import Question, verdict_on
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.files import as_user_error, write_atomically

# What is told of a question. The model, the score and the weight would tell how likely a match is.
_TOLD = ("split", "image_id", "caption_id", "source_image_id", "caption", "sample")
# The most pixels of a side of an image.
_SIDE = 1600


def write_questions(
    path: pathlib.Path,
    images: pathlib.Path | None,
    questions: Sequence[Question],
    dataset: PairDataset,
    split: str,
    store: VerdictStore,
) -> None:
    """Writes questions, one object a line, and keeps in the store what these do not tell.

    Images are written as JPEG into their folder, if there is one, each once; `image` of a question
    is the path of its own, seen from the file's folder. Raises UserError if something cannot be
    written.
    """
    for folder in (path.parent, images or path.parent):
        with as_user_error(f"{folder}: cannot be created"):
            folder.mkdir(parents=True, exist_ok=True)
    lines, written = [], set()
    asked = [verdict_on(one, dataset, split) for one in questions]
    for question, one in zip(questions, asked, strict=True):
        row = {name: getattr(one, name) for name in _TOLD}
        if images is not None:
            file = images / f"{one.image_id}.jpg"
            row["image"] = os.path.relpath(file, path.parent)
            if file not in written:
                written.add(file)
                with as_user_error(f"{file}: cannot be written"):
                    write_atomically(file, small_jpeg(dataset.image(question.image), _SIDE))
        lines.append(json.dumps(row) + "\n")
    store.keep_asked(asked)
    with as_user_error(f"{path}: cannot be written"):
        write_atomically(path, "".join(lines))
