"""The known matches of the training split, where a run uses them: `config.objective.oracle`."""

from __future__ import annotations

import jax
import ml_collections

from fne_jax.data.pairs import PairDataset
from fne_jax.errors import UserError
from fne_jax.objectives import registry
from fne_jax.objectives.known_matches import CompleteMatches
from fne_jax.parallel import sharding


def check_known(config: ml_collections.ConfigDict, train: PairDataset) -> None:
    """Raises UserError if the config asks for the truth of a split that does not know it.

    Args:
      config: The resolved config.
      train: The training split.
    """
    if config.objective.oracle != registry.NO_ORACLE and train.truth is None:
        raise UserError(
            f"config.objective.oracle is {config.objective.oracle!r}, but nobody knows which "
            f"captions of config.data.source={config.data.source} match which images beyond the "
            f"labels; take oracle={registry.NO_ORACLE}, or a rendered source such as shapes"
        )


def known_matches(
    config: ml_collections.ConfigDict, train: PairDataset, mesh: jax.sharding.Mesh
) -> tuple[CompleteMatches, ...]:
    """Returns what a run's train steps take beside state and batch.

    Args:
      config: The resolved config.
      train: The training split.
      mesh: The devices.

    Returns:
      The table of known matches, a full copy on each device; nothing without an oracle.

    Raises:
      UserError: If the split does not know its matches.
    """
    check_known(config, train)
    if config.objective.oracle == registry.NO_ORACLE:
        return ()
    table = CompleteMatches.create(train.truth.packed(), train.caption_image)
    place = sharding.replicated(mesh)
    return (jax.tree.map(lambda array: sharding.place(array, place), table),)
