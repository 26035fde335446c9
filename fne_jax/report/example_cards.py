"""Anchors, negatives and queries of a split as what a page shows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from fne_jax.data.pairs import PairDataset
from fne_jax.objectives.fne_settings import FNESettings
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.report import examples, html

# Anchors whose negatives are sampled, and those shown: the most suspect, and any others.
_ANCHORS, _SHOWN_SUSPECT, _SHOWN_OTHERS = 256, 4, 2
# Queries shown at either end.
_SHOWN_QUERIES = 4

Card = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Direction:
    """One direction of retrieval over a split.

    Attributes:
      title: Image to text, or text to image.
      query_emb: [queries, dim] L2-normalised embeddings.
      item_emb: [items, dim] L2-normalised embeddings.
      query_image: [queries] index of each query's image.
      item_image: [items] index of each item's image.
      pair_query: [pairs] the query that each labelled pair holds.
      pair_item: [pairs] the item that each labelled pair holds.
      show_query: Takes a query's index and returns what a page shows of it.
      show_item: Takes an item's index and returns what a page shows of it.
      is_true: Takes [n] queries and [n] items and returns whether they match in truth; None if
        that is unknown.
    """

    title: str
    query_emb: np.ndarray
    item_emb: np.ndarray
    query_image: np.ndarray
    item_image: np.ndarray
    pair_query: np.ndarray
    pair_item: np.ndarray
    show_query: Callable[[int], Card]
    show_item: Callable[[int], Card]
    is_true: Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def directions(
    dataset: PairDataset, image_emb: np.ndarray, text_emb: np.ndarray
) -> tuple[Direction, Direction]:
    """Returns image to text, and text to image."""
    owner, rows, pairs = dataset.caption_image, np.arange(len(image_emb)), np.arange(len(text_emb))
    truth = dataset.truth

    def image(index: int) -> Card:
        return show_image(dataset, index)

    def caption(index: int) -> Card:
        return {"text": dataset.captions[index]}

    return (
        Direction(
            "image to text", image_emb, text_emb, rows, owner, owner, pairs, image, caption,
            None if truth is None else lambda images, captions: truth.is_true(captions, images),
        ),
        Direction(
            "text to image", text_emb, image_emb, owner, rows, pairs, owner, caption, image,
            None if truth is None else truth.is_true,
        ),
    )  # fmt: skip


def show_image(dataset: PairDataset, index: int) -> Card:
    """Returns the `uri` of an image's small copy, its source's `name` for it, and a `caption`."""
    captions = np.flatnonzero(dataset.caption_image == index)
    return {
        "uri": html.image_uri(dataset, index),
        "name": dataset.source_image_id[index],
        "caption": dataset.captions[captions[0]] if len(captions) else "",
    }


def gallery(
    direction: Direction, seed: int, stats: SimilarityStatistics, fne: ml_collections.ConfigDict
) -> Card:
    """Returns what hardest-negative mining and FNE choose for random anchors of a split.

    Args:
      direction: A direction over at least two images.
      seed: The seed of the anchors and of FNE's negatives.
      stats: The similarity statistics.
      fne: `config.fne`.
    """
    pairs = np.random.default_rng(seed).permutation(len(direction.pair_query))
    # One pair of each query, in the order of the permutation.
    pairs = pairs[np.sort(np.unique(direction.pair_query[pairs], return_index=True)[1])]
    pairs = pairs[: min(_ANCHORS, len(direction.item_emb))]
    query, own = direction.pair_query[pairs], direction.pair_item[pairs]
    choices = examples.choose_negatives(
        jax.random.key(seed),
        direction.query_emb[query],
        direction.item_emb[own],
        direction.item_emb,
        direction.query_image[query][:, None] == direction.item_image[None, :],
        stats,
        FNESettings.from_config(fne),
    )
    rules = {"hardest": choices.hardest, "chosen": choices.chosen}

    def candidate(rule: examples.Chosen, row: int) -> Card:
        return direction.show_item(int(rule.index[row])) | {
            "similarity": float(rule.similarity[row]),
            "posterior": float(rule.posterior[row]),
            "in_truth": _in_truth(direction, query[row], rule.index[row]),
        }

    def card(row: int) -> Card:
        match = direction.show_item(int(own[row]))
        return {
            "anchor": direction.show_query(int(query[row])),
            "match": match | {"similarity": float(choices.positive_similarity[row])},
            "sampled": bool(choices.sampled[row]),
        } | {name: candidate(rule, row) for name, rule in rules.items()}

    def summary(rule: examples.Chosen) -> Card:
        known = direction.is_true is not None
        return {
            "suspected": float((rule.posterior > fne.posterior_threshold).mean()),
            "posterior": float(rule.posterior.mean()),
            "in_truth": float(direction.is_true(query, rule.index).mean()) if known else None,
        }

    order = np.argsort(-choices.hardest.posterior, kind="stable")
    # In the order of the permutation, so that the first of the others are any.
    others = np.sort(order[_SHOWN_SUSPECT:])
    return {
        "title": direction.title,
        "anchors": len(pairs),
        "summaries": {name: summary(rule) for name, rule in rules.items()},
        "suspect": [card(row) for row in order[:_SHOWN_SUSPECT]],
        "others": [card(row) for row in others[:_SHOWN_OTHERS]],
    }


def queries(direction: Direction) -> Card:
    """Returns the queries whose match leads by most, and those whose match trails by most."""
    outcomes = examples.query_outcomes(
        direction.query_emb, direction.item_emb, direction.query_image, direction.item_image
    )

    def card(query: int) -> Card:
        match, rival = int(outcomes.match[query]), int(outcomes.rival[query])
        return {
            "query": direction.show_query(query),
            "rank": int(outcomes.rank[query]),
            "match": direction.show_item(match)
            | {"similarity": float(outcomes.match_similarity[query])},
            "rival": direction.show_item(rival)
            | {
                "similarity": float(outcomes.rival_similarity[query]),
                "in_truth": _in_truth(direction, query, rival),
            },
        }

    best, worst = outcomes.best_and_worst(_SHOWN_QUERIES)
    return {
        "title": direction.title,
        "best": [card(int(query)) for query in best],
        "worst": [card(int(query)) for query in worst],
    }


def _in_truth(direction, query, item):
    if direction.is_true is None:
        return None
    return bool(direction.is_true(np.array([query]), np.array([item]))[0])
