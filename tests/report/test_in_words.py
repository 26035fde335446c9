"""What a run learnt, in words: the numbers are those that were measured."""

from fne_jax.report.in_words import what_was_learnt

RATES = {"sampled_false_negative_rate": 0.1, "hardest_false_negative_rate": 0.3}


def test_what_is_known_is_told():
    log = [
        {"loss": 9.0, "warmup": 1.0, "sampled_false_negative_rate": 0.9,
         "hardest_false_negative_rate": 0.9},
        {"loss": 2.0, "warmup": 0.0, **RATES},
        {"eval_rsum": 100.0},
        {"loss": 1.0, "sampled_false_negative_rate": 0.2, "hardest_false_negative_rate": 0.4},
    ]  # fmt: skip
    first, second, third = what_was_learnt({"t2i_r1": 28.8, "complete_t2i_r1": 57.9}, log, 1250)
    assert "among 1,250 in 28.8 %" in first and "in 0.08 %" in first
    assert "in 57.9 %" in second and "in 29.1 %" in second
    assert "15.0 % were in truth" in third and "35.0 %" in third


def test_without_the_truth():
    log = [
        {"loss": 5.0, "warmup": 1.0}, {"loss": 4.0, "warmup": 1.0}, {"eval_rsum": 9.0},
        {"loss": 2.0, "warmup": 0.4}, {"loss": 0.5, "warmup": 0.0}, {"loss": 0.25},
    ]  # fmt: skip
    _, second, third = what_was_learnt({"t2i_r1": 2.5}, log, 40)
    assert "nobody labelled" in second
    assert third == (
        "The loss went from 5.000 to 4.000 in the warm-up, and from 0.500 to 0.250 after it."
    )
    third = what_was_learnt({"t2i_r1": 2.5}, log[:4], 40)[2]
    assert third == "The loss went from 5.000 to 4.000 in the warm-up."
    third = what_was_learnt({"t2i_r1": 2.5}, log[4:], 40)[2]
    assert third == "The loss went from 0.500 to 0.250."
    assert "too few steps" in what_was_learnt({"t2i_r1": 2.5}, log[3:5], 40)[2]
