"""Datasets, captions, image preprocessing and the input pipeline."""
