"""Datasets, captions, image preprocessing and the input pipeline."""

import contextlib

# TensorFlow and triton, which PyTorch installs on Linux, have an LLVM each: triton loaded after
# TensorFlow ends the process with a segmentation fault, loaded before it does no harm
# (tensorflow-cpu 2.21.0, triton 3.7.1). Every module that imports TensorFlow is below this one.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401
