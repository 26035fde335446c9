"""HTML pages read back, and captions and names that would break them."""

import collections
import html.parser

import numpy as np

from fne_jax.data.pairs import PairDataset

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror="alert(1)">', "{{ 7 * 191 }} & ' é")


def hostile_split(images=7):
    captions = [HOSTILE[i % 3] + f" {i}" for i in range(2 * images)]
    rng = np.random.default_rng(0)
    return PairDataset(
        captions=captions,
        caption_image=np.repeat(np.arange(images, dtype=np.int32), 2),
        image_id=np.arange(images, dtype=np.int32),
        images=rng.integers(0, 255, (images, 12, 9, 3)).astype(np.uint8),
        caption_id=np.arange(2 * images),
        source_image_id=[f"a/{HOSTILE[i % 3]}.jpg" for i in range(images)],
    )


class Page(html.parser.HTMLParser):
    """The tags, the attributes by tag, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text = collections.defaultdict(list), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag].append(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_data(self, data):
        self.text.append(data)


def assert_safe_and_complete(page):
    """Asserts that a page loads and runs nothing, and names all its pictures."""
    assert not page.tags["script"]
    for tag, uses in page.tags.items():
        for attributes in uses:
            assert not [name for name in attributes if name.startswith("on")], tag
            assert not str(attributes.get("href", "")).startswith(("http", "javascript"))
    for image in page.tags["img"]:
        assert image["src"].startswith("data:image/jpeg;base64,") and image["alt"]
    assert len(page.ids) == len(set(page.ids))
    figures = [use for use in page.tags["div"] if use.get("role") == "img"]
    assert len(figures) == len(page.tags["svg"]) and all(use["aria-label"] for use in figures)
