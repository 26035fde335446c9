"""The pages of a review, and what they ask of the server."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.resources
import json
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlencode

import anyio.to_thread
import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import Route

from fne_jax.data.images.preprocessing import small_jpeg
from fne_jax.data.pairs import PairDataset
from fne_jax.data.verdicts import WORDS
from fne_jax.errors import UserError
from fne_jax.evaluation.top_k import top_k
from fne_jax.false_negatives.review_app import questions as questions_lib
from fne_jax.false_negatives.review_app.guard import Guard
from fne_jax.false_negatives.review_app.questions import FILTERS, Answers, Questions
from fne_jax.false_negatives.verdict_store import VerdictStore
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.report import html

_PACKAGE = "fne_jax.false_negatives.review_app"
# The most pixels of a side of an image, by the name of its size in an address.
SIZES = {"small": 240, "medium": 720, "large": 1600}
# Results of a search at first, how many more are shown at a time, and the most.
_FIRST_RESULTS, _MOST_RESULTS = 24, 240
_LONGEST_QUERY = 1000
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_MARKS = {"match": "✓", "no_match": "✗", "unsure": "?"}
_NAMES = {"match": "match", "no_match": "no match", "unsure": "unsure"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Review:
    """What the pages are of.

    Attributes:
      title: What is reviewed, such as the run's name.
      about: A line on where the questions come from.
      split: `train`, `val` or `test`.
      dataset: The split.
      questions: What is asked.
      store: Where the answers go.
      reviewer: Who answers.
      embedded: The split's embeddings, which are searched; None for a review without a search.
      embed_texts: Takes texts and returns their [texts, dim] L2-normalised embeddings.
    """

    title: str
    about: str
    split: str
    dataset: PairDataset
    questions: Questions
    store: VerdictStore
    reviewer: str
    embedded: EmbeddedSplit | None = None
    embed_texts: Callable[[list[str]], np.ndarray] | None = None


def create_app(review: Review, names: Collection[str] = ()) -> Starlette:
    """Returns the application.

    Browsers may call this machine by these names, beside `localhost`.
    """
    pages = _Pages(review)
    routes = [
        Route("/", lambda request: RedirectResponse("/review", 303)),
        Route("/review", pages.review),
        Route("/verdict", pages.judge, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/images/{data}/{size}/{row:int}.jpg", pages.image),
        Route("/static/{name}", _static),
    ]
    if review.embedded is not None:
        routes.append(Route("/search", pages.search))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, names={"localhost", *names})],
        exception_handlers={
            UserError: _told,
            HTTPException: lambda request, error: PlainTextResponse(
                f"{error.detail}\n", error.status_code
            ),
        },
    )


class _Pages:
    def __init__(self, review: Review):
        self._review = review
        self._reading, self._embedding = threading.Lock(), threading.Lock()
        self._answering, self._answers = threading.Lock(), self._read_answers()
        if review.embedded is not None:
            emb = review.embedded.image_emb, review.embedded.text_emb
            self._image_emb, self._text_emb = jax.device_put(emb)
        owner = review.dataset.caption_image
        order = np.argsort(owner, kind="stable")
        starts = np.searchsorted(owner[order], np.arange(len(review.dataset.image_id) + 1))
        self._own_captions = lambda image: order[starts[image] : starts[image + 1]]
        # Stands in the addresses of images and in each verdict: what a browser kept of a server of
        # other data, at the same address, is neither shown nor judged as this one's.
        self._data = f"{review.split}-{review.dataset.identity.checksum}"
        self._environment = html.environment(_PACKAGE)
        self._environment.globals |= {
            "review_title": review.title,
            "about": review.about,
            "split": review.split,
            "data": self._data,
            "reviewer": review.reviewer,
            "can_search": review.embedded is not None,
            "marks": _MARKS,
            "verdict_names": _NAMES,
        }

    def review(self, request: Request) -> Response:
        """The review of one group."""
        by = _one_of(request, "by", self._review.questions.groupings)
        show = _one_of(request, "show", FILTERS)
        row = _number(request, "group")
        with self._answering:
            self._hear_others()
            page = self._review.questions.page(self._answers, by, show, row)
            pairs = [self._pair(one, show) for one in page.answered] if page else []
            counts = dict(self._answers.counts)

        def link(**changed: Any) -> str:
            return "/review?" + urlencode({"by": by, "show": show} | changed)

        values = {
            "by": by,
            "show": show,
            "filters": {
                name: {"title": title, "count": counts[name], "link": link(show=name)}
                for name, title in FILTERS.items()
                # Disputes take two.
                if name != questions_lib.DISPUTED or counts[name] or name == show
            },
            "groupings": {name: link(by=name) for name in self._review.questions.groupings},
            "judged": counts[questions_lib.ALL] - counts[questions_lib.UNJUDGED],
            "total": counts[questions_lib.ALL],
            "page": page,
            "previous": page and page.previous is not None and link(group=page.previous),
            "following": page and page.following is not None and link(group=page.following),
            "all_link": link(show=questions_lib.ALL),
            "pairs": pairs,
            "wanted": request.query_params.get("pair", ""),
        }
        return self._html("review.html", values)

    def search(self, request: Request) -> Response:
        """Images for a text, or captions and images for an image."""
        query = request.query_params.get("q", "").strip()[:_LONGEST_QUERY]
        row = _number(request, "image")
        count = min(_number(request, "count") or _FIRST_RESULTS, _MOST_RESULTS)
        images = len(self._review.dataset.image_id)
        if row is not None and row >= images:
            raise HTTPException(404, f"There is no image {row}; the split has {images}.")
        values = {"query": query, "asked": None, "captions": [], "similar": [], "found": []}
        shown, found = 0, None
        if row is not None:
            values["asked"] = self._image(row)
            asked = self._review.embedded.image_emb[row][None]
            captions = _found(top_k(asked, self._text_emb, _FIRST_RESULTS))
            values["captions"] = [
                {
                    "text": self._review.dataset.captions[caption],
                    "similarity": similarity,
                    "own": bool(self._review.dataset.caption_image[caption] == row),
                    "link": "/search?"
                    + urlencode({"q": self._review.dataset.captions[caption]}, errors="replace"),
                }
                for caption, similarity in captions
            ]
            own = np.array([row]), np.arange(images)
            found = _found(top_k(asked, self._image_emb, count, own))
        elif query:
            with self._embedding:
                asked = self._review.embed_texts([query])
            found = _found(top_k(asked, self._image_emb, count))
        else:
            # Somewhere to begin, the same at each visit.
            rows = np.random.default_rng(0).permutation(images)[:_FIRST_RESULTS]
            values["found"] = [self._image(int(one)) for one in rows]
        if found is not None:
            shown = len(found)
            values["found"] = [
                self._image(one) | {"similarity": similarity} for one, similarity in found
            ]
        more = min(shown + _FIRST_RESULTS, _MOST_RESULTS, images - (row is not None))
        asked = {"image": row} if row is not None else {"q": query}
        values["more"] = (
            "/search?" + urlencode(asked | {"count": more}, errors="replace")
            if shown and more > shown
            else ""
        )
        return self._html("search.html", values)

    async def judge(self, request: Request) -> Response:
        """Saves a verdict: `{"data", "caption", "image", "verdict"}`, the two by rows."""
        asked, review = await self._asked(request), self._review
        pair = [asked.get(name) for name in ("caption", "image")]
        word = asked.get("verdict")
        if any(type(one) is not int for one in pair) or word not in WORDS:
            raise HTTPException(
                422, f"Expected the rows `caption` and `image`, and `verdict`, one of {WORDS}."
            )
        question = review.questions.find(*pair)
        if question is None:
            raise HTTPException(404, "That pair is not among those that are reviewed.")

        def save() -> Mapping[str, Any]:
            with self._answering:
                self._hear_others()
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                verdict = questions_lib.verdict_on(
                    question, review.dataset, review.split, word, review.reviewer, now
                )
                review.store.add(verdict)
                self._answers.add(verdict)
                return self._progress()

        return JSONResponse({"verdict": word} | await anyio.to_thread.run_sync(save))

    async def undo(self, request: Request) -> Response:
        """Takes back the reviewer's newest verdict: `{"data", "by", "show"}` say where one is."""
        asked = await self._asked(request)
        by, show = asked.get("by"), asked.get("show")
        # A list, since what JSON holds may have no hash.
        if by not in self._review.questions.groupings or show not in list(FILTERS):
            raise HTTPException(422, "Expected `by` and `show`, as in the page's address.")
        return JSONResponse(await anyio.to_thread.run_sync(functools.partial(self._undo, by, show)))

    def _undo(self, by, show):
        review = self._review
        with self._answering:
            removed = review.store.take_back(review.reviewer, review.split)
            if removed is None:
                return {"undone": None} | self._progress()
            # What was said before counts again.
            self._answers = self._read_answers()
            progress = self._progress()
        question = review.questions.of_verdict(removed)
        if question is None:  # of another list of questions
            undone = {"verdict": removed.verdict, "text": removed.caption, "link": ""}
            return {"undone": undone} | progress
        pair = question.caption, question.image
        now = self._answers.of[pair]
        if not now.fits(show):
            show = questions_lib.ALL
        row = review.questions.group_row(question, by)
        where = {"by": by, "show": show, "group": row, "pair": "{}-{}".format(*pair)}
        undone = {
            "verdict": removed.verdict,
            "text": removed.caption,
            "caption": pair[0],
            "image": pair[1],
            "now": now.own.verdict if now.own else "",
            "link": "/review?" + urlencode(where),
        }
        return {"undone": undone} | progress

    def image(self, request: Request) -> Response:
        """A small copy of an image of the split."""
        data, size, row = (request.path_params[name] for name in ("data", "size", "row"))
        known = data == self._data and size in SIZES
        if not known or row >= len(self._review.dataset.image_id):
            raise HTTPException(404, "There is no such image.")
        with self._reading:
            jpeg = small_jpeg(self._review.dataset.image(row), SIZES[size])
        return Response(
            jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"}
        )

    async def _asked(self, request):
        asked = await _json(request)
        if asked.get("data") != self._data:
            raise HTTPException(409, "This page is of other data than the server; load it again.")
        return asked

    def _hear_others(self):
        """Takes up what other servers have written since."""
        if self._review.store.changed():
            self._answers = self._read_answers()

    def _read_answers(self):
        review = self._review
        return Answers(review.questions, review.store.last(review.split), review.reviewer)

    def _progress(self):
        counts = dict(self._answers.counts)
        total = counts[questions_lib.ALL]
        return {"counts": counts, "judged": total - counts[questions_lib.UNJUDGED], "total": total}

    def _pair(self, answered, show):
        dataset, question = self._review.dataset, answered.question
        own = int(dataset.caption_image[question.caption])
        # Nobody is told what others say before having answered, but where that is the question.
        others = answered.others if show == questions_lib.DISPUTED else ()
        return {
            "question": question,
            "text": dataset.captions[question.caption],
            "image": self._image(question.image),
            "own": self._image(own),
            "nearest": dataset.captions[question.nearest] if question.nearest >= 0 else "",
            "verdict": answered.own.verdict if answered.own else "",
            "others": [(one.reviewer, _NAMES[one.verdict]) for one in others],
        }

    def _image(self, row):
        dataset = self._review.dataset
        captions = [dataset.captions[caption] for caption in self._own_captions(row)]
        return {"row": row, "name": str(dataset.source_image_id[row]), "captions": captions}

    def _html(self, template, values):
        page = self._environment.get_template(template).render(values)
        # Captions may hold half of a surrogate pair, which no encoding can.
        return HTMLResponse(page.encode(errors="replace"), headers={"cache-control": "no-store"})


def _found(result):
    """Returns the row and the similarity of each item that a single query finds."""
    (rows,), (similarity,) = result
    there = np.isfinite(similarity)  # not the query's own image
    return list(zip(rows[there].tolist(), similarity[there].tolist(), strict=True))


@functools.cache
def _static_files() -> dict[str, bytes]:
    package = importlib.resources.files(_PACKAGE)
    files = {file.name: file.read_bytes() for file in (package / "static").iterdir()}
    return files | {"palette.css": html.palette().encode()}


def _static(request):
    name = request.path_params["name"]
    if name not in _static_files():
        raise HTTPException(404, "There is no such file.")
    kind = _TYPES[name.rpartition(".")[2]]
    # Asked for again, since another version of the program may be listening next time.
    return Response(_static_files()[name], media_type=kind, headers={"cache-control": "no-cache"})


def _told(request, error):
    _log.error("error: %s", error)
    return PlainTextResponse(f"{error}\n", 500)


def _one_of(request, name, values):
    """Returns a value of the address, by default the first that it may have."""
    value = request.query_params.get(name, next(iter(values)))
    if value not in values:
        raise HTTPException(404, f"`{name}` is one of {', '.join(values)}.")
    return value


def _number(request, name):
    value = request.query_params.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > 12:
        raise HTTPException(404, f"`{name}` is a number.")
    return int(value)


async def _json(request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Expected JSON.")
    try:
        value = json.loads(await request.body())
    except ClientDisconnect:  # nobody is there to be told, and nothing is wrong here
        raise HTTPException(400, "The body ended early.") from None
    except (ValueError, RecursionError):
        raise HTTPException(422, "Expected JSON.") from None
    if not isinstance(value, dict):
        raise HTTPException(422, "Expected a JSON object.")
    return value
