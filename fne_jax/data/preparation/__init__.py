"""Checking a dataset's images and packing them into ArrayRecord files."""
