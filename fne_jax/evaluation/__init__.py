"""Evaluation of image-text retrieval."""
