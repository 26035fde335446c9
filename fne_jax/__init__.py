"""False Negative Elimination for image-text retrieval, in JAX.

The strategy is importable by itself and needs neither TensorFlow nor a config: see
`fne_triplet_loss`.
"""

from fne_jax.encoders.pretrained_weights import load_pretrained, save_pretrained
from fne_jax.objectives.contrastive import clip_loss, infonce_loss, sigmoid_loss
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.negative_mining import (
    hardest_key,
    mined_triplet_loss,
    random_key,
    semi_hard_key,
)
from fne_jax.objectives.negative_sampling import (
    sample_negatives,
    sample_negatives_from_uniform,
    sampling_weights,
)
from fne_jax.objectives.similarity_statistics import (
    SimilarityStatistics,
    false_negative_posterior,
    update_similarity_statistics,
)
from fne_jax.objectives.triplet_loss import (
    fne_triplet_loss,
    fne_triplet_loss_from_uniform,
    hardest_negative_triplet_loss,
)
from fne_jax.retrieval.metrics import retrieval_metrics

__all__ = [
    "MemoryQueue",
    "SimilarityStatistics",
    "clip_loss",
    "false_negative_posterior",
    "fne_triplet_loss",
    "fne_triplet_loss_from_uniform",
    "hardest_key",
    "hardest_negative_triplet_loss",
    "infonce_loss",
    "load_pretrained",
    "load_workdir",
    "mined_triplet_loss",
    "random_key",
    "retrieval_metrics",
    "sample_negatives",
    "sample_negatives_from_uniform",
    "sampling_weights",
    "save_pretrained",
    "semi_hard_key",
    "sigmoid_loss",
    "update_similarity_statistics",
]


def __getattr__(name):
    # Late, because it needs Orbax and transformers, which the strategy alone does not.
    if name == "load_workdir":
        from fne_jax.model.model import load_workdir

        return load_workdir
    raise AttributeError(f"module 'fne_jax' has no attribute {name!r}")
