"""False Negative Elimination for image-text retrieval, in JAX.

The losses and the encoders are pure JAX and importable by themselves: they need neither TensorFlow
nor a config. Start at `fne_triplet_loss`.
"""

import importlib
from typing import TYPE_CHECKING

from fne_jax.encoders.pretrained_weights import load_pretrained, save_pretrained
from fne_jax.evaluation.metrics import retrieval_metrics
from fne_jax.objectives.contrastive import (
    clip_loss,
    infonce_loss,
    multi_positive_loss,
    sigmoid_loss,
)
from fne_jax.objectives.features import Features, Matches
from fne_jax.objectives.fne_loss import fne_triplet_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_mining import (
    hardest_negative,
    mined_triplet_loss,
    random_negative,
    semi_hard_negative,
)
from fne_jax.objectives.negative_sampling import sample_negatives, sampling_weights
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    false_negative_posterior,
    update_similarity_statistics,
)
from fne_jax.objectives.triplet_loss import hardest_negative_triplet_loss

if TYPE_CHECKING:
    from fne_jax.index.search_index import build_index  # these two: see `_LATE`
    from fne_jax.model.model import load_workdir

__all__ = [
    "Features",
    "Matches",
    "MemoryQueue",
    "SimilarityStatistics",
    "build_index",
    "clip_loss",
    "false_negative_posterior",
    "fne_triplet_loss",
    "hardest_negative",
    "hardest_negative_triplet_loss",
    "infonce_loss",
    "load_pretrained",
    "load_workdir",
    "mined_triplet_loss",
    "multi_positive_loss",
    "random_negative",
    "retrieval_metrics",
    "sample_negatives",
    "sampling_weights",
    "save_pretrained",
    "semi_hard_negative",
    "sigmoid_loss",
    "update_similarity_statistics",
]

# Imported on first use, because Orbax and transformers are behind it, which the losses do without.
_LATE = {
    "build_index": "fne_jax.index.search_index",
    "load_workdir": "fne_jax.model.model",
}


def __getattr__(name):
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'fne_jax' has no attribute {name!r}")
