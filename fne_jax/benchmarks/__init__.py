"""Measurements of speed, each printed as JSON lines by `python -m fne_jax.benchmark NAME`."""
