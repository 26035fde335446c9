"""What a run is told beyond the labels: known matches, a teacher, and labels that are wrong."""

from __future__ import annotations

import logging
import pathlib

import jax
import ml_collections
import numpy as np

from fne_jax import files
from fne_jax.data import match_files, verdicts
from fne_jax.data.identity import DatasetIdentity, checksum_of_set
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import read_embeddings_of
from fne_jax.objectives import registry
from fne_jax.objectives.known_matches import CompleteMatches, KnownMatches, ListedMatches
from fne_jax.objectives.teacher import Teacher
from fne_jax.parallel import sharding

_log = logging.getLogger(__name__)


def check_known(config: ml_collections.ConfigDict, train: PairDataset) -> None:
    """Raises UserError if the resolved config asks for what is not known of matches."""
    if config.objective.oracle != registry.NO_ORACLE and train.truth is None:
        raise UserError(
            f"config.objective.oracle is {config.objective.oracle!r}, but nobody knows which "
            f"captions of config.data.source={config.data.source} match which images beyond the "
            f"labels; take oracle={registry.NO_ORACLE}, or a rendered source such as shapes"
        )
    if registry.takes_posterior(config) and not config.data.matches:
        raise UserError(
            f"config.fne.posterior is {registry.LISTED!r}, but config.data.matches names no list; "
            f"name one, as `audit --matches` writes it, or take posterior={registry.GAUSSIANS}"
        )


def known_matches(
    config: ml_collections.ConfigDict, train: PairDataset, mesh: jax.sharding.Mesh
) -> tuple[tuple[KnownMatches | Teacher | None, ...], dict[str, DatasetIdentity]]:
    """Returns the known matches and the teacher that a run uses.

    That is what the train steps take beside state and batch: a table and a teacher, a full copy of
    them on each device of the mesh, None for one of them, or nothing; and the identity of the files
    that they are from, by the names `matches` and `teacher`, if any. Raises UserError if the split
    does not know its matches, or a file cannot be read or is about other data.
    """
    check_known(config, train)
    data, table, teacher = {}, None, None
    if config.objective.oracle != registry.NO_ORACLE:
        table = CompleteMatches.create(train.truth.packed(), train.caption_image)
    elif config.data.matches:
        pairs = read_matches(config.data.matches, train)
        table = _listed(config, pairs, train.caption_image)
        data = {"matches": pairs.identity}
    if config.objective.teacher:
        teacher = _teacher(config.objective, train)
        captions, images = len(teacher.text), len(teacher.image)
        checksum = checksum_of_set([teacher.image, teacher.text])
        data["teacher"] = DatasetIdentity(captions, images, checksum)
    if not registry.uses_known(config):
        return (), {}
    place = sharding.replicated(mesh)
    return jax.tree.map(lambda array: sharding.place(array, place), (table, teacher)), data


def _teacher(objective, train):
    """Returns the teacher of `config.objective`; raises UserError if it is not of the split."""
    folder = pathlib.Path(files.expand_home(objective.teacher))
    with files.as_user_error("config.objective.teacher", errors=UserError):
        rows = read_embeddings_of(folder, train)
    return Teacher(
        image=rows.image_emb.astype(np.float16),
        text=rows.text_emb.astype(np.float16),
        caption_image=np.asarray(train.caption_image, np.int32),
        margin=objective.guide_margin,
    )


def _listed(config, pairs, caption_image):
    """Returns the table of a file's pairs, of which the config tells what becomes of each."""
    data, is_posterior = config.data, registry.takes_posterior(config)
    # Rounded as in the file, so that a pair of the probability named is not below it.
    negative, positive = np.float16([data.matches_negative, data.matches_positive])
    kept = pairs[pairs.probability >= negative]
    counts = is_posterior | (kept.probability >= positive)
    _log.info(
        "%s: %d pairs, %d of them %s, %d neither these nor negatives, %d negatives",
        *(data.matches, len(pairs), counts.sum(), "suspects" if is_posterior else "matches"),
        *((~counts).sum(), len(pairs) - len(kept)),
    )
    return ListedMatches.create(
        kept.image,
        kept.caption,
        caption_image,
        np.where(counts, kept.probability, 0),
        is_posterior=is_posterior,
    )


def refuted_labels(config: ml_collections.ConfigDict, train: PairDataset) -> Pairs:
    """Returns the labelled pairs that `config.data.refuted` keeps from training.

    Raises UserError if the file cannot be read, is about other data, or refutes no label.
    """
    if not config.data.refuted:
        return Pairs(*np.empty((2, 0), np.int64))
    pairs, images = verdicts.refuted_labels(config.data.refuted, train), train.caption_image
    lost = np.setdiff1d(images, np.delete(images, pairs.caption))
    _log.info(
        "%s: %d captions are left out of training, and %d images that have no other; such as %r of "
        "image %s",
        config.data.refuted, len(pairs), len(lost), train.captions[pairs.caption[0]],
        train.source_image_id[pairs.image[0]],
    )  # fmt: skip
    return pairs


def read_matches(file: str, train: PairDataset) -> Pairs:
    """Returns the pairs of the training split that `config.data.matches` tells, and how likely.

    Raises UserError if the file cannot be read, or is about other data.
    """
    path = pathlib.Path(files.expand_home(file))
    if path.suffix == match_files.SUFFIX:
        return match_files.read_match_list(path, train)
    found = verdicts.agreed(verdicts.read_verdicts(path, train, "train"))
    matches = [one for one in found if one.verdict == verdicts.MATCH]
    pairs = verdicts.pairs_of(matches, train)
    return pairs.replace(probability=np.ones(len(pairs), np.float16))
