"""What can be a caption, whatever source it comes from."""

import pytest

from fne_jax.data.sources import listing
from tests.support.sources import DAMAGED_CAPTIONS


@pytest.mark.parametrize("kind", list(DAMAGED_CAPTIONS))
def test_damaged_captions_are_refused(kind):
    assert listing.caption_fault(DAMAGED_CAPTIONS[kind]).startswith("the caption is ")


@pytest.mark.parametrize(
    "caption", ["\ufeff", "\u200b\u200d", "\xa0", "\u3000\u2003", "\xad", "…", "«»", " \u200f. "]
)
def test_captions_that_show_nothing_are_empty(caption):
    assert listing.caption_fault(caption).startswith("the caption is empty: ")


@pytest.mark.parametrize("caption", ["a dog", "狗", "كلب", "9", "\ufeffa dog", "🐕", "½ é"])
def test_captions_of_any_script_are_fine(caption):
    assert listing.caption_fault(caption) == ""


def test_a_caption_with_a_nul_is_no_text():
    assert "a NUL" in listing.caption_fault("a\0dog")
