"""What a page shows of an embedded split: its queries, and the negatives that FNE chooses."""

from __future__ import annotations

import base64
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fne_jax.data.images.preprocessing import small_jpeg
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.evaluation.metric_names import DIRECTIONS
from fne_jax.evaluation.ranks import match_ranks
from fne_jax.evaluation.top_k import top_k
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.objectives import registry
from fne_jax.objectives.negative_mining import hardest_negative
from fne_jax.objectives.negative_sampling import sample_negatives, weights_and_candidates
from fne_jax.objectives.similarity_statistics import cosine, false_negative_posterior
from fne_jax.objectives.triplet_loss import rowwise_cosine

# Anchors whose negatives are sampled, and those shown: the most suspect, and any others.
_ANCHORS, _SHOWN_SUSPECT, _SHOWN_OTHERS = 256, 4, 2
# Queries shown at either end.
_SHOWN_QUERIES = 4
# Pixels of an image's longer side in a page, which shows it small until it is clicked on.
_LONGER_SIDE = 400

Card = dict[str, Any]


def show_image(dataset: PairDataset, index: int) -> Card:
    """Returns the `uri` of an image's small copy, its source's `name` for it, and a `caption`."""
    captions = np.flatnonzero(dataset.caption_image == index)
    jpeg = base64.b64encode(small_jpeg(dataset.image(index), _LONGER_SIDE)).decode()
    return {
        "uri": f"data:image/jpeg;base64,{jpeg}",
        "name": dataset.source_image_id[index],
        "caption": dataset.captions[captions[0]] if len(captions) else "",
    }


def _sides(split, way):
    """Returns of the queries, and of the items, the embeddings, the images, and what shows one."""

    def show_caption(row):
        return {"text": split.dataset.captions[row]}

    show = functools.partial(show_image, split.dataset)
    images = split.image_emb, np.arange(len(split.image_emb)), show
    captions = split.text_emb, split.caption_image, show_caption
    return (images, captions) if way == "i2t" else (captions, images)


def _pairs(way, query, item, **columns):
    return Pairs(*((item, query) if way == "i2t" else (query, item)), **columns)


def _items(way, pairs):
    return pairs.caption if way == "i2t" else pairs.image


def _is_true(split, pairs):
    """Returns [pairs] whether they match in truth, or None where that is not known."""
    truth = split.dataset.truth
    return None if truth is None else truth.is_true(pairs.caption, pairs.image)


def negatives(split: EmbeddedSplit, way: str) -> Card:
    """Returns what hardest-negative mining and FNE choose for random anchors.

    The split has at least two images, its dataset, config and statistics; `way` is a key of
    `DIRECTIONS`.
    """
    (_, _, show_query), (_, item_image, show_item) = _sides(split, way)
    captions = np.arange(len(split.text_emb))
    of_pairs = (split.caption_image, captions) if way == "i2t" else (captions, split.caption_image)
    order = np.random.default_rng(split.config.seed).permutation(len(captions))
    # One pair of each query, in the order of the permutation.
    order = order[np.sort(np.unique(of_pairs[0][order], return_index=True)[1])]
    query, own = (rows[order[: min(_ANCHORS, len(item_image))]] for rows in of_pairs)
    match, hardest, chosen, sampled, found = choose_negatives(split, way, query, own)
    rules = {"hardest": (hardest, np.ones_like(found)), "chosen": (chosen, found)}
    in_truth = {name: _is_true(split, rule) for name, (rule, _) in rules.items()}

    def card(row: int) -> Card:
        candidates = {
            name: show_item(int(_items(way, rule)[row]))
            | {
                "similarity": float(rule.similarity[row]),
                "posterior": float(rule.probability[row]),
                "in_truth": None if in_truth[name] is None else bool(in_truth[name][row]),
            }
            for name, (rule, exists) in rules.items()
            if exists[row]
        }
        return candidates | {
            "anchor": show_query(int(query[row])),
            "match": show_item(int(own[row])) | {"similarity": float(match.similarity[row])},
            "sampled": bool(sampled[row]),
        }

    def summary(name: str) -> Card | None:
        rule, exists = rules[name]
        if not exists.any():
            return None
        posterior, true = rule.probability[exists], in_truth[name]
        return {
            "suspected": float((posterior > split.config.fne.posterior_threshold).mean()),
            "posterior": float(posterior.mean()),
            "in_truth": None if true is None else float(true[exists].mean()),
        }

    order = np.argsort(-hardest.probability, kind="stable")
    # In the order of the permutation, so that the first of the others are any.
    others = np.sort(order[_SHOWN_SUSPECT:])
    return {
        "title": DIRECTIONS[way].title,
        "anchors": len(query),
        "without": int((~found).sum()),
        "summaries": {name: summary(name) for name in rules},
        "suspect": [card(row) for row in order[:_SHOWN_SUSPECT]],
        "others": [card(row) for row in others[:_SHOWN_OTHERS]],
    }


def choose_negatives(
    split: EmbeddedSplit, way: str, query: np.ndarray, own: np.ndarray
) -> tuple[Pairs, Pairs, Pairs, np.ndarray, np.ndarray]:
    """Returns the negatives of hardest-negative mining and of FNE for some anchors.

    Args:
      split: The split, with its config and statistics.
      way: A key of `DIRECTIONS`.
      query: [anchors] rows of the anchors, no more than there are items; each needs an item that is
        not of its image.
      own: [anchors] rows of the items that match them.

    Returns:
      Each anchor with its match, with the hardest negative, and with that which FNE samples or
      falls back on, the last two with the probability that they are false; [anchors] bool, false
      where every candidate weighs 0 and FNE falls back; and [anchors] bool, false where every one
      is eliminated, and what stands for FNE's choice is none.
    """
    (anchor_emb, anchor_image, _), (item_emb, item_image, _) = _sides(split, way)
    stats, settings = split.stats, registry.weighing_settings(split.config.fne)
    rng, anchors = jax.random.key(split.config.seed), jnp.asarray(anchor_emb[query])
    similarity = cosine(anchors, jnp.asarray(item_emb))
    positive = rowwise_cosine(anchors, jnp.asarray(item_emb[own]))
    same_image = jnp.asarray(anchor_image[query][:, None] == item_image[None, :])
    hardest, _ = hardest_negative(rng, similarity, positive, ~same_image)
    weights, candidate = weights_and_candidates(
        similarity, positive[:, None], same_image, stats, **settings
    )
    fallback, found = hardest_negative(rng, similarity, positive, candidate)
    sampled = sample_negatives(rng, weights, fallback)

    def of(index):
        picked = jnp.take_along_axis(similarity, index[:, None], axis=1)[:, 0]
        # Monotone, whatever the run trained with, as in an audit: by the authors' formula a pair
        # far to the left, which no step would sample, is the most suspect of all.
        posterior = false_negative_posterior(picked, stats, settings["prior"], monotone=True)
        columns = {"similarity": np.asarray(picked), "probability": np.asarray(posterior)}
        return _pairs(way, query, np.asarray(index), **columns)

    match = _pairs(way, query, own, similarity=np.asarray(positive))
    return match, of(hardest), of(sampled), np.asarray(weights.any(axis=1)), np.asarray(found)


def queries(split: EmbeddedSplit) -> list[Card]:
    """Returns of both directions the queries whose match leads by most, and those trailing by most.

    The split has at least two images, and its dataset.
    """
    return [_best_and_worst(split, way, *found) for way, found in query_outcomes(split).items()]


def _best_and_worst(split, way, match, rival, rank):
    (_, _, show_query), (_, _, show_item) = _sides(split, way)
    in_truth = _is_true(split, rival)

    def shown(pairs, query):
        item = show_item(int(_items(way, pairs)[query]))
        return item | {"similarity": float(pairs.similarity[query])}

    def card(query: int) -> Card:
        true = None if in_truth is None else bool(in_truth[query])
        return {
            "query": show_query(query),
            "rank": int(rank[query]),
            "match": shown(match, query),
            "rival": shown(rival, query) | {"in_truth": true},
        }

    order = np.argsort(rival.similarity - match.similarity, kind="stable")
    return {
        "title": DIRECTIONS[way].title,
        "best": [card(int(query)) for query in order[:_SHOWN_QUERIES]],
        "worst": [card(int(query)) for query in order[::-1][:_SHOWN_QUERIES]],
    }


def query_outcomes(split: EmbeddedSplit) -> dict[str, tuple[Pairs, Pairs, np.ndarray]]:
    """Returns how each query fared, by direction.

    The split has at least two images.

    Returns:
      [queries] pairs of each query with its most similar match, and with the most similar item that
      is not labelled one; and [queries] the place of the match, from 1, where an equally similar
      rival counts before it.
    """
    ranks = match_ranks(split.image_emb, split.text_emb, split.caption_image)
    captions, images = np.arange(len(split.text_emb)), np.arange(len(split.image_emb))
    order = np.lexsort((-split.own_similarity, split.caption_image))
    best = order[np.unique(split.caption_image[order], return_index=True)[1]]
    matches = {"i2t": Pairs(best, images), "t2i": Pairs(captions, split.caption_image)}
    found = {}
    for way, rank in zip(DIRECTIONS, ranks, strict=True):
        (query_emb, query_image, _), (item_emb, item_image, _) = _sides(split, way)
        item, similarity = top_k(query_emb, item_emb, 1, (query_image, item_image))
        rival = _pairs(way, np.arange(len(item)), item[:, 0], similarity=similarity[:, 0])
        match = matches[way].replace(similarity=split.own_similarity[matches[way].caption])
        found[way] = match, rival, rank + 1
    return found
