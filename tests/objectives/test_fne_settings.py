"""FNE's settings: their ranges, and how a config switches parts of the method."""

import dataclasses

import pytest

from configs import base
from fne_jax.errors import UserError
from fne_jax.objectives.fne_settings import FNESettings


def settings_of(**changes):
    fne = base.get_config().fne
    with fne.unlocked():
        fne.update(changes)
    return FNESettings.from_config(fne)


def test_the_configs_defaults_are_the_settings_own():
    ours, default = dataclasses.asdict(settings_of()), dataclasses.asdict(FNESettings())
    # The config names it; the settings take it from tau.
    assert ours.pop("elimination_tau") == default["tau"]
    assert default.pop("elimination_tau") is None
    assert ours == default


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"elimination": "none"}, {"posterior_threshold": 1.0, "tau": 0.5}),
        ({"elimination": "hard"}, {"elimination_tau": 1e30, "posterior_threshold": 1e-3}),
        ({"cut_down": False}, {"tau": 0.0, "elimination_tau": 0.5}),
        ({"tau": 0.7}, {"tau": 0.7, "elimination_tau": 0.7}),
        ({"monotone": True}, {"monotone": True}),
        ({"key_chunk": 32}, {"key_chunk": 32}),
        ({"margin": 0.3, "prior": 0.1}, {"margin": 0.3, "prior": 0.1}),
        ({"min_count": 7}, {"min_count": 7}),
        ({}, {"elimination_tau": 0.5, "posterior_threshold": 1e-3, "key_chunk": None}),
    ],
)
def test_parts_of_fne_are_switched_by_the_config(changes, expected):
    settings = dataclasses.asdict(settings_of(**changes))
    assert {name: settings[name] for name in expected} == expected


def test_an_unknown_elimination_is_named():
    with pytest.raises(UserError, match=r"config.fne.elimination is 'all'; expected one of soft"):
        settings_of(elimination="all")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("margin", -0.1, r"margin: expected a number in \[0, inf\], got -0.1"),
        ("tau", -1.0, "tau: expected a number"),
        ("elimination_tau", -1.0, "elimination_tau: expected a number"),
        ("prior", 0.0, r"prior: expected a number in \(0, 1\), got 0.0"),
        ("prior", 1.0, "prior: expected a number"),
        ("posterior_threshold", 2.0, "posterior_threshold: expected a number"),
        ("min_count", -1, "min_count: expected a number"),
        ("key_chunk", 24, "key_chunk: expected a multiple of 16 or None, got 24"),
        ("key_chunk", 0, "key_chunk: expected a multiple of 16 or None, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        FNESettings(**{field: value})


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="marginn"):
        FNESettings.from_keywords({"marginn": 0.2})
