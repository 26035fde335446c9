"""The registry of objectives: what its entries read, and who reads it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_collections
import pytest

import fne_jax
from configs import base
from fne_jax import configuration
from fne_jax.errors import UserError
from fne_jax.objectives import learned_scalars, registry
from fne_jax.studies import cells
from tests.support import pages_of_docs
from tests.support.fne import make_batch


def config_with(**changes):
    config = base.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {name.replace("__", "."): value for name, value in changes.items()}
        )
    return config


class Recording:
    """Stands in for a config and notes which fields are read."""

    def __init__(self, config, read, prefix=""):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name):
        value = getattr(self._config, name)
        if isinstance(value, ml_collections.ConfigDict):
            return Recording(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value


def fields_read(build, config):
    read = set()
    build(Recording(config, read))
    return read


def test_a_warmup_reads_nothing_that_comes_after_it():
    for name in registry.WARMUP:
        config = config_with(warmup__objective=name)
        read = fields_read(registry.warmup_objective, config)
        assert not read & registry.fields_after_warmup(config)


def test_an_objective_reads_what_comes_after_the_warmup_and_the_margin():
    for name in registry.OBJECTIVES:
        for queue in (True, False):
            config = config_with(objective__name=name, objective__queue=queue)
            read = fields_read(registry.main_objective, config)
            assert read - registry.fields_after_warmup(config) <= {"fne.margin"}


def fne_settings(**changes):
    config = config_with(**{f"fne__{name}": value for name, value in changes.items()})
    return registry.OBJECTIVES["fne"].settings(configuration.resolve(config)[0])


def test_the_configs_defaults_are_the_losses_own():
    settings = fne_settings()
    parameters = inspect.signature(fne_jax.fne_triplet_loss).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    # The config names them; the loss takes the one from tau, the other from the prior.
    assert settings.pop("elimination_tau") == defaults["tau"]
    assert settings.pop("posterior_threshold") == 10 * defaults["prior"]
    assert defaults.pop("elimination_tau") is defaults.pop("posterior_threshold") is None
    assert settings == defaults


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"elimination": "none"}, {"posterior_threshold": 1.0, "tau": 0.5}),
        ({"elimination": "hard"}, {"elimination_tau": 1e30, "posterior_threshold": 1e-3}),
        ({"posterior": "listed"}, {"posterior_threshold": 1e-3}),
        ({"cut_down": False}, {"tau": 0.0, "elimination_tau": 0.5}),
        ({"tau": 0.7}, {"tau": 0.7, "elimination_tau": 0.7}),
        ({"elimination_tau": 0.9}, {"tau": 0.5, "elimination_tau": 0.9}),
        ({"elimination_tau": 0.0}, {"tau": 0.5, "elimination_tau": 0.0}),
        ({"prior": 0.02}, {"posterior_threshold": 0.2}),
        ({"prior": 0.3}, {"posterior_threshold": 0.5}),
        ({"prior": 0.3, "posterior_threshold": 0.9}, {"posterior_threshold": 0.9}),
        ({"monotone": True}, {"monotone": True}),
        ({"key_chunk": 32}, {"key_chunk": 32}),
        ({"margin": 0.3, "prior": 0.1}, {"margin": 0.3, "prior": 0.1}),
        ({"min_count": 7}, {"min_count": 7}),
        ({}, {"elimination_tau": 0.5, "posterior_threshold": 1e-3, "key_chunk": None}),
    ],
)
def test_parts_of_fne_are_switched_by_the_config(changes, expected):
    settings = fne_settings(**changes)
    assert {name: settings[name] for name in expected} == expected


def test_without_a_list_none_is_suspected_by_it():
    fne = configuration.resolve(config_with(fne__posterior="listed"))[0].fne
    assert registry.weighing_settings(fne)["posterior_threshold"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective__name": "fen"}, r"config.objective.name is 'fen'; expected one of fne, ha"),
        ({"objective__oracle": "keep"}, r"config.objective.oracle is 'keep'; expected one of none"),
        (
            {"data__matches_positive": 0.4, "data__matches_negative": 0.5},
            r"config.data.matches_negative is 0.5, more than config.data.matches_positive=0.4",
        ),
        (
            {"data__matches_positive": 1.5},
            r"config.data.matches_positive is 1.5; expected a number",
        ),
        (
            {"objective__guide_margin": 0.0},
            "guide_margin is 0.0, but config.objective.teacher names",
        ),
        (
            {"objective__guide_margin": 0.0, "objective__teacher": "a", "fne__posterior": "listed"},
            "guide_margin is 0.0, which leaves candidates out, and config.fne.posterior=listed",
        ),
        ({"warmup__objective": "fne"}, r"config.warmup.objective is 'fne'; expected one of hardes"),
        ({"fne__elimination": "all"}, r"config.fne.elimination is 'all'; expected one of soft"),
    ],
)
def test_what_cannot_be_is_told_early(change, message):
    with pytest.raises(UserError, match=message):
        configuration.validate(config_with(**change))


@pytest.mark.parametrize(
    "mode", [functools.partial(jax.numpy_dtype_promotion, "strict"), jax.enable_x64]
)
def test_no_objective_needs_a_promotion_or_gives_64_bits(mode):
    features, queue = make_batch(0)
    half = jnp.asarray(features.momentum_image, jnp.bfloat16)

    def step(name, features, queue):
        config = config_with(objective__name=name, objective__temperature=0.1, objective__bias=-1.0)
        features = features.replace(learned=learned_scalars.initial()[learned_scalars.LEARNED])
        stats = fne_jax.SimilarityStatistics.create()
        stats = fne_jax.update_similarity_statistics(stats, features.image, features.text)
        out = registry.main_objective(config)(features, queue, stats, jax.random.key(0))
        queue = queue.enqueue(features.momentum_image, features.momentum_text, features.image_id)
        return out, stats, fne_jax.MemoryQueue.create(jax.random.key(0), 3, 2), queue

    with mode():
        for name in registry.OBJECTIVES:
            for momentum in (features.momentum_image, half):
                drawn = features.replace(momentum_image=momentum, momentum_text=momentum)
                out = jax.eval_shape(functools.partial(step, name), drawn, queue)
                assert not {leaf.dtype.name for leaf in jax.tree.leaves(out)} & {"float64", "int64"}


def test_positives_are_for_losses_that_take_several():
    able = {name for name, entry in registry.OBJECTIVES.items() if entry.takes_positives}
    assert able == {"multi_positive", "sigmoid"}
    for name in registry.OBJECTIVES:
        config = config_with(objective__name=name, objective__oracle="positives")
        if name in able:
            configuration.validate(config)
            continue
        with pytest.raises(UserError, match=rf"config.objective.oracle is .*name={name} takes"):
            configuration.validate(config)
        configuration.validate(config_with(objective__name=name, objective__oracle="drop"))


def test_the_study_compares_what_the_registry_has():
    assert set(cells.OBJECTIVES) == set(registry.OBJECTIVES) | set(registry.FNE_VARIANTS)
    assert cells.OBJECTIVES["random"] == ("objective.name=random",)
    assert cells.OBJECTIVES["fne_no_queue"] == ("objective.name=fne", "objective.queue=False")


def test_the_warmup_depends_on_the_margin_where_it_mines():
    contrastive = registry.fields_after_warmup(config_with(warmup__objective="clip"))
    mining = registry.fields_after_warmup(config_with(warmup__objective="hardest"))
    assert contrastive - mining == {"fne.margin"}
    assert {"objective.name", "objective.bias", "fne.tau", "fne.key_chunk"} <= mining
    # It decides what a checkpoint holds, also that of a warm-up.
    assert "objective.learn_temperature" not in mining
    for field in ("fne.start_epoch", "fne.mask_same_image", "fne.ema_decay", "warmup.temperature"):
        assert field not in contrastive


def test_the_docs_list_the_registry():
    section = pages_of_docs.section("objectives.md", "## The registry")
    cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert [(row[0], row[-1]) for row in cells] == [
        (f"| `{name}`", "yes |" if name in registry.WARMUP else "no |")
        for name in registry.OBJECTIVES
    ]
