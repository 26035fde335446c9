"""Training on a GPU is the same to the bit after a resume."""

import pytest

from tests.support.gpu import run_on_gpu


@pytest.mark.gpu
def test_a_run_that_is_resumed_is_the_same_to_the_bit(tmp_path):
    found = run_on_gpu("resume", tmp_path, XLA_FLAGS="--xla_gpu_deterministic_ops=true")
    assert found["platform"] == "gpu"
    first, second = found["steps"]
    assert first == second > 0
    assert len(set(found["fingerprints"])) == 1
