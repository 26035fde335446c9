"""The pages by themselves: what they show, what they save, and what they refuse."""

import asyncio
import contextlib
import dataclasses
import io
import sqlite3
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from fne_jax.data.verdicts import agreed
from fne_jax.false_negatives.judged_evaluation import EvaluationSample, find_sample
from fne_jax.false_negatives.review_app.app import SIZES, create_app
from fne_jax.false_negatives.review_app.questions import Answers, Question, Questions
from fne_jax.false_negatives.verdict_store import VerdictStore
from tests.support.pages import HOSTILE, Page, hostile_split
from tests.support.reviews import data_of, some_review

ORIGIN = {"origin": "http://localhost"}


def client_of(review):
    client = TestClient(create_app(review), base_url="http://localhost")
    client.data = data_of(review)
    return client


def ask(client, path, body):
    """Returns the answer to what a page of the review sends."""
    body = body | {"data": client.data} if isinstance(body, dict) else body
    return client.post(path, json=body, headers=ORIGIN)


@pytest.fixture
def make_review():
    """Returns `some_review`, whose stores are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **keywords):
            made = some_review(*arguments, **keywords)
            stack.callback(made.store.close)
            return made

        yield make


@pytest.fixture
def review(make_review, tmp_path):
    return make_review(tmp_path / "v.sqlite", hostile_split())


@pytest.fixture
def client(review):
    return client_of(review)


def assert_harmless(page):
    """Asserts that a page runs and shows nothing but the server's own."""
    for tag, uses in page.tags.items():
        for attributes in uses:
            assert not [name for name in attributes if name.startswith("on")], tag
            for name in ("src", "href", "action"):
                assert str(attributes.get(name, "/")).startswith(("/", "#")), attributes
                assert not str(attributes.get(name, "")).startswith("//")
    assert [use.get("src") for use in page.tags["script"]] == ["/static/review.js"]
    assert all("alt" in image for image in page.tags["img"])
    assert not page.tags["style"] and len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("path", ["/review", "/review?by=image", "/search", "/search?image=3"])
def test_captions_and_names_are_text(client, path):
    answer = client.get(path)
    page = Page(answer.text)
    assert_harmless(page)
    shown = " ".join(page.text)
    assert sum(text in shown for text in HOSTILE) == 3
    for use in page.tags["link"] + page.tags["script"]:
        for name in ("href", "src"):
            assert client.get(use.get(name, "/review")).status_code == 200


def test_what_is_asked_is_text_too(client):
    for query in (*HOSTILE, "half a character: \ud800", "x" * 5000):
        answer = client.get(f"/search?q={urllib.parse.quote(query, errors='surrogatepass')}")
        page = Page(answer.text)
        assert_harmless(page)
        (box,) = (use for use in page.tags["input"] if use.get("name") == "q")
        assert box["value"] == query.encode(errors="surrogatepass").decode(errors="replace")[:1000]


def test_a_group_shows_each_pair_and_its_own_match(client, review):
    split = review.dataset
    page = Page(client.get("/review?group=1").text)
    first, second = page.tags["article"]
    assert [use["data-caption"] for use in (first, second)] == ["1", "1"]
    assert [use["data-image"] for use in (first, second)] == ["1", "2"]
    images = [use["src"] for use in page.tags["img"] if "medium" in use.get("src", "")]
    shown = [1, split.caption_image[1], 2, split.caption_image[1]]
    assert images == [f"/images/{client.data}/medium/{row}.jpg" for row in shown]
    assert all(client.get(image).status_code == 200 for image in images)
    shown = " ".join(page.text)
    assert "+0.230" in shown and "90.0" in shown and "0.270" in shown
    by_image = Page(client.get("/review?by=image&group=2").text)
    assert {use["data-image"] for use in by_image.tags["article"]} == {"2"}
    assert len(by_image.tags["article"]) > 1


def test_a_label_that_may_be_wrong_is_shown_with_its_image_alone(make_review, tmp_path):
    split = hostile_split()
    own = int(split.caption_image[5])
    review = make_review(tmp_path / "v.sqlite", split)
    asked = dataclasses.replace(review, questions=Questions(split, [Question(5, own, 0.1)]))
    client = client_of(asked)
    page = Page(client.get("/review").text)
    images = [use["src"] for use in page.tags["img"] if "medium" in use.get("src", "")]
    assert images == [f"/images/{client.data}/medium/{own}.jpg"]
    body = {"caption": 5, "image": own, "verdict": "no_match"}
    assert ask(client, "/verdict", body).json()["judged"] == 1


def test_every_verdict_is_on_the_disk_when_it_is_answered(client, review):
    split = review.dataset
    judged = [(0, 1, "match"), (0, 2, "no_match"), (1, 1, "unsure"), (0, 1, "no_match")]
    for number, (caption, image, verdict) in enumerate(judged):
        body = {"caption": caption, "image": image, "verdict": verdict}
        answer = ask(client, "/verdict", body).json()
        assert answer["judged"] == min(number + 1, 3) and answer["total"] == 14
        # Another connection, and thus another process, sees it.
        with VerdictStore(review.store.path) as other:
            last = other.last("train")[-1]
        assert (last.caption_id, last.image_id) == (
            split.caption_id[caption], split.image_id[image],
        )  # fmt: skip
        assert (last.verdict, last.reviewer, last.model) == (verdict, "anna", "run step 3")
        assert last.caption == split.captions[caption] and last.score == 0.9
        assert last.source_image_id == split.source_image_id[image]
        assert last.time.endswith("+00:00")
    assert answer["counts"] == {
        "unjudged": 11, "all": 14, "match": 0, "no_match": 2, "unsure": 1, "disputed": 0,
    }  # fmt: skip
    pressed = [
        use for use in Page(client.get("/review?show=all").text).tags["button"]
        if use.get("aria-pressed") == "true"
    ]  # fmt: skip
    assert [use["data-verdict"] for use in pressed] == ["no_match", "no_match"]


def test_who_changes_their_mind_answers_for_the_sample_that_asked(review, client):
    drawn = Question(0, 1, None, None, 0.25, model="run step 3", sample="strata", weight=7.5)
    asked = dataclasses.replace(review, questions=Questions(review.dataset, [drawn]))
    page = client_of(asked).get("/review").text
    assert "Posterior" not in page and "25" not in Page(page).text  # nothing leads who answers
    body = {"caption": 0, "image": 1, "verdict": "match"}
    ask(client, "/verdict", body)
    assert ask(client_of(asked), "/verdict", body).json()["judged"] == 1
    ask(client, "/verdict", body | {"verdict": "no_match"})
    last = review.store.last()
    drawn = [("match", "strata", 7.5), ("no_match", "", None)]
    assert [(one.verdict, one.sample, one.weight) for one in last] == drawn
    assert [one.verdict for one in agreed(last)] == ["no_match"]
    pressed = Page(client_of(asked).get("/review?show=all").text).tags["button"]
    assert [use["data-verdict"] for use in pressed if use.get("aria-pressed") == "true"] == [
        "no_match"
    ]


def test_an_evaluation_takes_no_pair_out_of_its_weighted_sample(review):
    name = EvaluationSample(1, 7, 0).name
    drawn = [Question(0, 1, sample="strata", weight=7.5)]
    pooled = [Question(0, 1, sample=name), Question(0, 2, sample=name)]
    for questions, verdict in ((drawn, "match"), (pooled, "no_match")):
        asked = dataclasses.replace(review, questions=Questions(review.dataset, questions))
        for one in questions:
            body = {"caption": one.caption, "image": one.image, "verdict": verdict}
            ask(client_of(asked), "/verdict", body)
    last = review.store.last("train")
    said = [(one.verdict, one.sample, one.weight) for one in last]
    evaluated = [("no_match", name, None)] * 2
    assert said == [("match", "strata", 7.5), *evaluated]
    # The sample has the new answer to the first pair as well.
    (answered,) = Answers(Questions(review.dataset, drawn), last, "anna").of.values()
    assert answered.own.verdict == "no_match"
    assert find_sample(last).name == name


def test_taking_back(client, review):
    for image, verdict in ((1, "match"), (2, "unsure"), (1, "no_match")):
        body = {"caption": 0, "image": image, "verdict": verdict}
        ask(client, "/verdict", body)

    def undo():
        return ask(client, "/undo", {"by": "image", "show": "unjudged"}).json()

    first = undo()
    undone = first["undone"]
    assert (undone["verdict"], undone["now"], undone["image"]) == ("no_match", "match", 1)
    assert first["judged"] == 2
    # It is judged still, and so only to be found among all.
    assert undone["link"] == "/review?by=image&show=all&group=1&pair=0-1"
    assert Page(client.get(undone["link"]).text).tags["main"][0]["data-wanted"] == "0-1"
    assert undo()["undone"]["link"] == "/review?by=image&show=unjudged&group=2&pair=0-2"
    assert undo()["judged"] == 0 and undo()["undone"] is None
    assert review.store.last() == []


def test_two_reviewers_of_one_store(make_review, client, review, tmp_path):
    berts = make_review(tmp_path / "v.sqlite", review.dataset, reviewer="bert")
    bert = client_of(berts)
    for one, verdict in ((client, "match"), (bert, "no_match")):
        body = {"caption": 0, "image": 1, "verdict": verdict}
        assert ask(one, "/verdict", body).json()["judged"] == 1
    # Nobody is told what others said, but where that is the question.
    for address, told in (("/review?show=all", False), ("/review?show=disputed", True)):
        text = " ".join(Page(client.get(address).text).text)
        assert ("bert" in text) == told
    undone = ask(client, "/undo", {"by": "caption", "show": "all"}).json()["undone"]
    assert undone["verdict"] == "match"
    assert [one.reviewer for one in review.store.last()] == ["bert"]
    berts.store.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"caption": 0, "image": 1, "verdict": "maybe"}, 422),
        ({"caption": 0, "image": 1}, 422),
        ({"caption": "0", "image": 1, "verdict": "match"}, 422),
        ({"caption": True, "image": 1, "verdict": "match"}, 422),
        ({"caption": 0, "image": 0, "verdict": "match"}, 404),  # labelled
        ({"caption": 10**30, "image": -1, "verdict": "match"}, 404),
        ([1], 422),
    ],
)
def test_verdicts_on_nothing(client, review, body, status):
    assert ask(client, "/verdict", body).status_code == status
    assert review.store.last() == []


def test_what_is_no_json(client, review):
    kind = {"content-type": "application/json"}
    for show in ({}, [], None, 1):
        assert ask(client, "/undo", {"by": "caption", "show": show}).status_code == 422
    for content in (b"", b"{", b"\xff", b"[" * 9000):
        answer = client.post("/verdict", content=content, headers=ORIGIN | kind)
        assert answer.status_code == 422
    form = {"caption": "0", "image": "1", "verdict": "match"}
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/verdict", content=b"a=1", headers=ORIGIN | kind).status_code == 415
    assert client.post("/verdict", json=form).status_code == 403  # without an origin
    assert review.store.last() == []


def test_a_client_that_leaves_within_a_body_is_no_error_of_the_server(review):
    headers = {
        "host": "localhost", "origin": "http://localhost",
        "content-type": "application/json", "content-length": "100",
    }  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": "/verdict", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    received = [{"type": "http.request", "body": b"{", "more_body": True}]
    received.append({"type": "http.disconnect"})

    async def receive():
        return received.pop(0)

    async def send(message):
        del message

    asyncio.run(create_app(review)(scope, receive, send))
    assert not received and review.store.last() == []


@pytest.mark.parametrize(
    "path",
    [
        "/images/DATA/large/99.jpg",
        "/images/DATA/huge/0.jpg",
        "/images/DATA/large/-1.jpg",
        "/images/DATA/large/..%2f..%2fsetup.py",
        "/images/DATA/../../setup.py",
        "/images/train-0123456789abcdef/large/0.jpg",
        "/images/DATA/large/0.jpg%00.png",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/",
        "/etc/passwd",
        "/review?by=other",
        "/review?show=none",
        "/review?group=-1",
        "/review?group=1e9",
        "/review?group=" + "9" * 99,
        "/search?image=7",
        "/search?image=%C2%B2",
        "/search?image=1&count=x",
        "/verdict",
    ],
)
def test_there_is_no_such_page(client, path):
    answer = client.get(path.replace("DATA", client.data), follow_redirects=False)
    assert answer.status_code in (404, 405)
    assert "import" not in answer.text and "root:" not in answer.text


def test_a_page_of_other_data_judges_nothing(make_review, client, review, tmp_path):
    other = hostile_split()
    other = dataclasses.replace(other, captions=[text + "!" for text in other.captions])
    others = make_review(tmp_path / "other.sqlite", other)
    client.data = data_of(others)
    for path, body in (
        ("/verdict", {"caption": 0, "image": 1, "verdict": "match"}),
        ("/undo", {"by": "caption", "show": "all"}),
    ):
        answer = ask(client, path, body)
        assert answer.status_code == 409 and "load it again" in answer.text
    assert review.store.last() == []
    others.store.close()


def test_images_are_small_jpegs_of_the_split(make_review, tmp_path):
    pixels = np.zeros((7, 3, 2000, 3), np.uint8)
    pixels[4, :, :, 0] = 255
    split = dataclasses.replace(hostile_split(), images=pixels)
    review = make_review(tmp_path / "v.sqlite", split)
    for size, side in SIZES.items():
        answer = client_of(review).get(f"/images/{data_of(review)}/{size}/4.jpg")
        image = Image.open(io.BytesIO(answer.content))
        assert answer.headers["content-type"] == "image/jpeg" and image.size[0] == side
        assert np.asarray(image).mean(axis=(0, 1)).round() == pytest.approx([254, 0, 0], abs=1)
    review.store.close()


def test_search_finds_what_a_plain_search_finds(client, review):
    images, captions = review.embedded.image_emb, review.embedded.text_emb
    similarity = images @ review.embed_texts(["a dog"])[0]
    page = Page(client.get("/search?q=a+dog").text)
    links = [use["href"] for use in page.tags["a"] if "image=" in use["href"]]
    assert links == [f"/search?image={row}" for row in np.argsort(-similarity)]
    assert f"{similarity.max():.2f}" in " ".join(page.text)

    page = Page(client.get("/search?image=2").text)
    links = [use["href"] for use in page.tags["a"]]
    similar = [row for row in np.argsort(-(images @ images[2])) if row != 2]
    assert [link for link in links if "image=" in link] == [f"/search?image={r}" for r in similar]
    texts = [review.dataset.captions[row] for row in np.argsort(-(captions @ images[2]))]
    queries = [urllib.parse.urlencode({"q": text}, errors="replace") for text in texts]
    assert [link for link in links if "?q=" in link] == [f"/search?{query}" for query in queries]
    text = " ".join(Page(client.get("/search?image=2").text).text)
    assert text.count("its own \n") + text.count("its own\n") == 2


def test_a_search_shows_more_when_asked(client):
    page = Page(client.get("/search?q=a&count=2").text)
    (more,) = (use["href"] for use in page.tags["a"] if "count=" in use["href"])
    assert len(page.tags["img"]) == 2 + 1  # and the one that enlarges
    everything = Page(client.get(more).text)
    assert len(everything.tags["img"]) == 7 + 1
    assert not [use for use in everything.tags["a"] if "count=" in use["href"]]


def test_a_verdict_that_cannot_be_saved_is_not_said_to_be(client, review):
    with sqlite3.connect(review.store.path) as connection:
        connection.execute("DROP TABLE verdicts")
    connection.close()
    body = {"caption": 0, "image": 1, "verdict": "match"}
    answer = ask(client, "/verdict", body)
    assert answer.status_code == 500 and "v.sqlite: no such table" in answer.text


def test_a_verdict_for_a_deleted_store_is_not_said_to_be_saved(client, review):
    body = {"caption": 0, "image": 1, "verdict": "match"}
    assert ask(client, "/verdict", body).status_code == 200
    review.store.path.unlink()
    for path, what in (("/verdict", body), ("/undo", {"by": "caption", "show": "all"})):
        answer = ask(client, path, what)
        assert answer.status_code == 500
        assert "v.sqlite is no longer the file that was opened" in answer.text


def test_nothing_to_review_is_a_page_too(make_review, tmp_path):
    review = make_review(tmp_path / "v.sqlite", hostile_split(), count=0)
    review = dataclasses.replace(review, embedded=None)
    client = client_of(review)
    assert "There is nothing to review" in client.get("/").text
    assert client.get("/search").status_code == 404
    review.store.close()


def test_the_last_page_says_that_all_is_done(make_review, tmp_path):
    review = make_review(tmp_path / "v.sqlite", hostile_split(), count=1)
    client = client_of(review)
    body = {"caption": 0, "image": 1, "verdict": "match"}
    ask(client, "/verdict", body)
    assert "Every pair is judged" in client.get("/review").text
    review.store.close()
