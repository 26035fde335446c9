"""Fused attention on a GPU: as near to float32 as plain products in bfloat16 are."""

import pytest

from tests.support.gpu import run_on_gpu


@pytest.mark.gpu
def test_cudnn_rounds_as_the_plain_products_do():
    for shape, errors in run_on_gpu("attention", "cudnn").items():
        for own, plain in zip(errors["own"], errors["xla"], strict=True):
            # bfloat16 has 8 bits: each rounding is off by 2^-9 at most.
            assert own <= 2 * plain + 2**-8, shape
            assert own < 0.03, shape
