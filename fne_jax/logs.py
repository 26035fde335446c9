"""Logging of the commands and of the processes that they start."""

from __future__ import annotations

import logging
import os


def set_up_logging(level: int) -> None:
    """Lets this package log plain messages to stderr from a level up, and quiets what it builds on.

    It has the last word: libraries that log while they are imported (Orbax does, through absl) give
    the root logger a handler with a format of its own. Handlers of other kinds stay as they are.
    """
    # TensorFlow and transformers print on import otherwise; a user's own settings stand.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig()
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(logging.Formatter("%(message)s"))
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("fne_jax").setLevel(level)
    logging.getLogger("absl").setLevel(logging.ERROR)
