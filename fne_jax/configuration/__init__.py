"""Configs: loaded with overrides, checked and resolved; stored beside a run, compared on resume."""

from fne_jax.configuration.loading import load_config, override
from fne_jax.configuration.resolving import overrides_of_pair, resolve, with_model_defaults
from fne_jax.configuration.rules import check_batches, flatten, validate
from fne_jax.configuration.storing import (
    FILE_NAME,
    MAY_CHANGE,
    check_stored,
    read_config,
    store_config,
    write_config,
)

__all__ = [
    "FILE_NAME",
    "MAY_CHANGE",
    "check_batches",
    "check_stored",
    "flatten",
    "load_config",
    "override",
    "overrides_of_pair",
    "read_config",
    "resolve",
    "store_config",
    "validate",
    "with_model_defaults",
    "write_config",
]
