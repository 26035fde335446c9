"""A review in Chromium, as a person uses it: by mouse, by key, on a phone, in the dark."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest

from fne_jax.data.verdicts import Verdict
from fne_jax.false_negatives.verdict_store import VerdictStore
from tests.support import TOP
from tests.support.pages import hostile_split
from tests.support.ports import free_port
from tests.support.reviews import data_of, some_review

pytestmark = pytest.mark.browser
KEYS = ["y", "n", "u", "y", "y", "n", "y", "u", "n", "y"]
WORDS = {"y": "match", "n": "no_match", "u": "unsure"}


@pytest.fixture(scope="module")
def chromium():
    # Kept out of the module's imports: all but these tests run without it.
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "there is no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        # Without its sandbox, which the root user of a container cannot have.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Server:
    """A review's server that can be killed and started again at the same place."""

    def __init__(self, store, questions=24):
        self.store, self.port, self.process = store, free_port(), None
        self.questions = questions
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "tests.support.review_server"]
        self.process = subprocess.Popen(
            [*command, self.store, "anna", str(self.port), str(self.questions)],
            cwd=TOP, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline().strip() == self.url + "/"

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def verdicts(self):
        with VerdictStore(self.store, read_only=True) as store:
            return store.last("train")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("reviews") / "v.sqlite")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def server(running):
    """A server without any verdicts."""
    with contextlib.closing(sqlite3.connect(running.store)) as connection:
        connection.execute("DELETE FROM verdicts")
        connection.commit()
    return running


@contextlib.contextmanager
def opened(chromium, server, path="/review", **options):
    """Yields a page of the server; fails on whatever the browser complains of."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, **options)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    page.on(
        "console",
        lambda message: complaints.append(message.text) if message.type == "error" else None,
    )
    page.goto(server.url + path)
    yield page
    context.close()
    # That the server was gone for a while, or could not save, is what some tests are about.
    expected = "ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "500 (Internal Server Error)"
    assert not [text for text in complaints if not any(part in text for part in expected)]


def judged(page, count):
    """Waits until so many pairs are judged."""
    page.wait_for_function(
        "count => document.getElementById('judged').textContent === String(count)", arg=count
    )


def shown_pair(page):
    pair = page.locator("article.pair.current")
    return int(pair.get_attribute("data-caption")), int(pair.get_attribute("data-image"))


def press(page, key, count):
    """Presses a verdict's key and waits for the next pair; returns what was judged."""
    pair = shown_pair(page)
    page.keyboard.press(key)
    judged(page, count)
    page.wait_for_function(
        "pair => { const now = document.querySelector('article.pair.current');"
        " return !now || now.dataset.caption + '-' + now.dataset.image !== pair }",
        arg="{}-{}".format(*pair),
    )
    return pair


def test_ten_verdicts_by_key_survive_a_reload_and_a_kill(chromium, server):
    with opened(chromium, server) as page:
        pairs = [press(page, key, number) for number, key in enumerate(KEYS, start=1)]
        assert len(set(pairs)) == 10
        kept = [(one.caption_id, one.image_id, one.verdict) for one in server.verdicts()]
        assert kept == [(*pair, WORDS[key]) for pair, key in zip(pairs, KEYS, strict=True)]
        page.reload()
        judged(page, 10)

        server.kill()
        page.keyboard.press("y")
        page.wait_for_selector("#status.failed")
        assert "NOT saved" in page.inner_text("#status")
        before = shown_pair(page)
        server.start()
        page.goto(server.url + "/review?show=all")
        judged(page, 10)
        shown = dict.fromkeys(pairs)
        for caption in sorted({caption for caption, _ in pairs}):
            page.goto(f"{server.url}/review?show=all&group={caption}")
            for pair in page.locator("article.pair").all():
                key = tuple(int(pair.get_attribute(f"data-{of}")) for of in ("caption", "image"))
                shown[key] = pair.get_attribute("data-verdict")
        assert [shown[pair] for pair in pairs] == [WORDS[key] for key in KEYS]
        assert before not in pairs and not shown.get(before)


def test_quick_keys_are_for_the_pairs_that_they_saw(chromium, server):
    with opened(chromium, server) as page:
        held, statuses = [], [None]

        def hold(route):
            status = statuses.pop(0) if statuses else 200
            if status is None:
                held.append(route)
            elif status == 200:
                route.continue_()
            else:
                route.fulfill(status=status, body="full")

        def press_all(keys):
            """Presses keys while the first verdict is on its way, through several groups."""
            pairs = []
            for key in keys:
                page.wait_for_function(
                    "() => { const next = document.getElementById('following');"
                    " return !next || performance.getEntriesByName(next.href).length }"
                )
                page.wait_for_timeout(50)
                pairs.append(shown_pair(page))
                page.keyboard.press(key)
            assert len(set(pairs)) == len(keys)
            held.pop().continue_()
            return pairs

        page.route("**/verdict", hold)
        pairs = press_all("ynuyyn")
        judged(page, 6)
        said = [(one.caption_id, one.image_id, one.verdict) for one in server.verdicts()]
        assert said == [(*pair, WORDS[key]) for pair, key in zip(pairs, "ynuyyn", strict=True)]
        # What cannot be saved is shown again, without its verdict, and nothing after it is saved.
        statuses += [None, 500]
        pairs = press_all("yny")
        page.wait_for_selector("#status.failed")
        assert "NOT saved. full" in page.inner_text("#status")
        assert shown_pair(page) == pairs[1] and len(server.verdicts()) == 7
        assert page.locator("article.current button[aria-pressed=true]").count() == 0
        page.unroute_all()
        assert press(page, "u", 8) == pairs[1]


@pytest.mark.slow
def test_ten_keys_a_second_among_ten_thousand_questions(chromium, tmp_path):
    server = Server(tmp_path / "v.sqlite", 10_000)
    with VerdictStore(server.store) as store:  # what another reviewer has said of all
        store.import_verdicts(
            Verdict("train", 1, caption, "", "", "match", "bert") for caption in range(10_000)
        )
    server.start()
    try:
        with opened(chromium, server) as page:
            page.evaluate(
                "() => { performance.setResourceTimingBufferSize(100_000); window.seen = [];"
                " window.addEventListener('keydown', event => seen.push("
                "[document.querySelector('article.pair.current').id, event.key]), true) }"
            )
            began = time.monotonic()
            for number in range(600):
                page.wait_for_timeout(max(0, 1000 * (began + number / 10 - time.monotonic())))
                page.keyboard.press(KEYS[number % len(KEYS)])
            seen = page.evaluate("seen")
            page.wait_for_function("() => document.getElementById('status').textContent === ''")
            took = page.evaluate(
                "() => performance.getEntriesByType('resource')"
                ".filter(one => one.name.endsWith('/verdict')).map(one => one.duration)"
            )
        # Each key found another pair: the groups come before the keys.
        shown = dict(seen)
        said = {f"pair-{one.caption_id}-{one.image_id}": one.verdict for one in server.verdicts()
                if one.reviewer == "anna"}  # fmt: skip
        print(len(seen), len(shown), sorted(took)[len(took) // 2], max(took))
        assert said == {pair: WORDS[key] for pair, key in shown.items()}
        assert len(said) == 600 and sorted(took)[len(took) // 2] < 50
    finally:
        server.kill()


def test_ten_verdicts_by_button(chromium, server):
    with opened(chromium, server, "/review?by=image") as page:
        for number, key in enumerate(KEYS, start=1):
            button = f"article.pair.current .verdicts button[data-verdict={WORDS[key]}]"
            page.click(button)
            judged(page, number)
        assert [one.verdict for one in server.verdicts()] == [WORDS[key] for key in KEYS]
        assert page.locator("#progress").get_attribute("value") is not None
        assert page.inner_text("[data-count=match]") == str(KEYS.count("y"))


def test_taking_back(chromium, server):
    with opened(chromium, server) as page:
        pairs = [press(page, key, number) for number, key in enumerate("yny", start=1)]
        for left, pair in ((2, pairs[2]), (1, pairs[1])):
            page.keyboard.press("z")
            judged(page, left)
            page.wait_for_function(
                "pair => document.querySelector('article.pair.current').id === 'pair-' + pair",
                arg="{}-{}".format(*pair),
            )
            assert "Taken back" in page.inner_text("#status")
            assert page.locator("article.current button[aria-pressed=true]").count() == 0
        # A key at once after it is for neither: what is taken back is not shown yet.
        held = []
        page.route("**/undo", lambda route: held.append(route))
        page.click("#undo")
        page.keyboard.press("n")
        page.wait_for_function(
            "() => document.getElementById('status').textContent.startsWith('Nothing judged')"
        )
        held.pop().continue_()
        page.unroute_all()
        judged(page, 0)
        page.keyboard.press("z")
        page.wait_for_function(
            "() => document.getElementById('status').textContent.includes('nothing to take back')"
        )
        assert server.verdicts() == []


def test_arrows_go_through_pairs_and_groups(chromium, server):
    with opened(chromium, server, "/review?show=all") as page:
        seen = [shown_pair(page)]
        for _ in range(5):
            page.keyboard.press("ArrowRight")
            page.wait_for_function(
                "pair => document.querySelector('article.pair.current').id !== 'pair-' + pair",
                arg="{}-{}".format(*seen[-1]),
            )
            seen.append(shown_pair(page))
        assert [caption for caption, _ in seen] == [0, 0, 1, 1, 2, 2] and len(set(seen)) == 6
        for before in seen[-2::-1]:
            page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "pair => document.querySelector('article.pair.current').id === 'pair-' + pair",
                arg="{}-{}".format(*before),
            )
        page.keyboard.press("Shift+ArrowRight")
        page.wait_for_selector("article.pair.current[data-caption='1']")
        page.go_back()
        page.wait_for_selector("article.pair.current[data-caption='0']")
        page.locator(".strip button").nth(1).click()
        assert shown_pair(page) == seen[1]
        assert page.locator(".strip [aria-current]").count() == 1


def test_search_and_search_by_an_image(chromium, server):
    with opened(chromium, server, "/search") as page:
        # Keys are letters while one types.
        page.locator("input[name=q]").focus()
        page.keyboard.type("yunz a red dog")
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(r"/search\?q=yunz\+a\+red\+dog$"))
        assert page.locator(".grid li").count() == 12
        first = page.locator(".grid li a").first
        address = first.get_attribute("href")
        first.click()
        page.wait_for_url(server.url + address)
        assert page.locator(".texts li").count() == 24 and page.locator(".grid li").count() == 11
        assert page.evaluate("document.querySelector('.grid img').complete")
        page.locator(".texts a").first.click()
        page.wait_for_url(re.compile(r"/search\?q="))
        assert server.verdicts() == []


def test_by_keyboard_alone(chromium, server):
    with opened(chromium, server) as page:

        def tab_to(selector):
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate("s => document.activeElement.matches(s)", selector):
                    return
            raise AssertionError(f"Tab does not come to {selector}")

        tab_to(".skip")
        page.keyboard.press("Enter")
        tab_to(".verdicts button[data-verdict=unsure]")
        assert page.evaluate(
            "getComputedStyle(document.activeElement).outlineStyle"
        ) != "none"  # fmt: skip
        page.keyboard.press("Enter")
        judged(page, 1)
        assert server.verdicts()[0].verdict == "unsure"
        # From the next pair's heading on, to which the focus went.
        page.wait_for_function("() => document.activeElement.tagName === 'H2'")
        tab_to("article.current .candidate .zoom")
        page.keyboard.press("Enter")
        page.wait_for_selector("#enlarged[open]")
        page.keyboard.press("y")
        page.keyboard.press("Escape")
        page.wait_for_selector("#enlarged", state="hidden")
        assert page.evaluate("document.activeElement.matches('.zoom')")
        assert len(server.verdicts()) == 1  # the letter meant nothing to the enlarged image

        # Letters can be turned off, for those who speak their input; that stays so.
        tab_to("#keys")
        page.keyboard.press("Space")
        page.keyboard.press("y")
        page.reload()
        page.keyboard.press("y")
        tab_to("#undo")
        page.keyboard.press("Enter")
        judged(page, 0)
        # And there is a way out of the page.
        tab_to(".top a")


def test_a_screen_reader_is_told(chromium, server):
    with opened(chromium, server) as page:
        status = page.locator("#status")
        assert status.get_attribute("aria-live") == "polite"
        press(page, "n", 1)
        assert page.inner_text("#status") == "Saved: no match. 1 of 24 judged."
        handle = status.element_handle()
        press(page, "y", 2)  # which goes to the next group
        assert handle.evaluate("element => element.isConnected")
        assert page.locator("img:not([alt])").count() == 0
        names = page.locator("button").evaluate_all(
            "all => all.map(one => one.textContent.trim() || one.ariaLabel"
            " || one.querySelector('img')?.alt)"
        )
        assert all(names)


def test_a_browser_that_keeps_nothing(chromium, server):
    with opened(chromium, server) as page:
        page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw 0 }})")
        page.reload()
        press(page, "n", 1)
        page.locator("#keys").uncheck()
        page.keyboard.press("y")
        page.locator("#keys").check()
        press(page, "u", 2)
        assert [one.verdict for one in server.verdicts()] == ["no_match", "unsure"]


def wide(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


PATHS = ["/review", "/review?by=image&show=all", "/review?show=unsure", "/search", "/search?q=a",
         "/search?image=3"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_phone_shows_all_of_the_width(chromium, server, path):
    with opened(chromium, server, path) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        assert wide(page) <= 0
        boxes = page.locator("article.current .verdicts button").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().toJSON())"
        )
        assert len(boxes) in (0, 3)
        for box in boxes:
            assert box["height"] >= 44 and box["left"] >= 0 and box["right"] <= 390
            assert box["bottom"] <= 844


def contrast(first, second):
    """Returns the contrast of two colours as WCAG 2 defines it."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


COLOURS = """() => [...document.querySelectorAll('main *, header *, #status')]
  .filter(one => one.checkVisibility() && !one.matches('.unseen, progress, option')
    && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
  .map(one => {
    let back = one;
    while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)')
      back = back.parentElement;
    return [one.textContent.trim().slice(0, 30), getComputedStyle(one).color,
            getComputedStyle(back ?? document.body).backgroundColor];
  })"""


@pytest.mark.parametrize("path", ["/review?show=all", "/review?by=image", "/search?image=3"])
def test_light_and_dark_can_be_read(chromium, server, path):
    backgrounds = []
    for scheme in ("light", "dark"):
        with opened(chromium, server, path, color_scheme=scheme) as page:
            if "review" in path:
                page.keyboard.press("u")
                page.keyboard.press("ArrowLeft")
                page.wait_for_function(
                    "() => document.getElementById('judged').textContent !== '0'"
                )
            seen = page.evaluate(COLOURS)
            assert len(seen) > 10
            for text, colour, background in seen:
                assert contrast(colour, background) >= 4.5, (scheme, text, colour, background)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert luminance(backgrounds[0]) > 0.8 and luminance(backgrounds[1]) < 0.05


def test_another_site_can_neither_read_nor_judge(chromium, server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text("<title>elsewhere</title>")
    site = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        context = chromium.new_context()
        page = context.new_page()
        for _ in range(100):
            with contextlib.suppress(Exception):
                page.goto(f"http://localhost:{port}/")
                break
            page.wait_for_timeout(100)
        assert page.title() == "elsewhere"
        review = some_review(tmp_path / "w.sqlite", hostile_split(images=12))
        review.store.close()
        data = data_of(review)
        body = json.dumps({"data": data, "caption": 0, "image": 1, "verdict": "match"})
        for kind in ("application/json", "text/plain"):
            for mode in ("cors", "no-cors"):
                page.evaluate(
                    "([url, body, mode, kind]) => fetch(url, {method: 'POST', body, mode,"
                    " headers: {'content-type': kind}}).catch(() => null)",
                    [f"{server.url}/verdict", body, mode, kind],
                )
        loaded = page.evaluate(
            "url => new Promise(done => { const one = new Image();"
            " one.onload = () => done(true); one.onerror = () => done(false); one.src = url })",
            f"{server.url}/images/{data}/small/0.jpg",
        )
        assert not loaded and server.verdicts() == []
        context.close()
    finally:
        site.kill()
        site.wait()
