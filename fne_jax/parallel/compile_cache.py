"""Compiled programs kept on disk, so that a restart does not compile them again."""

from __future__ import annotations

import os

import jax


def use_compile_cache(folder: str) -> None:
    """Keeps what JAX compiles from now on in a folder, for the next start; "" for none.

    A folder that the user gave JAX (`JAX_COMPILATION_CACHE_DIR`) stands. There is none for several
    CPU devices: eight of them, running programs read back with jaxlib 0.10.2, wait in their first
    collective without end, and XLA aborts the process after 40 s.
    """
    safe = jax.default_backend() != "cpu" or jax.device_count() == 1
    if folder and safe and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
