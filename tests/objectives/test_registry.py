"""The registry of objectives: what its entries read, and who reads it."""

import ml_collections
import pytest

from configs import base
from fne_jax import configuration
from fne_jax.errors import UserError
from fne_jax.objectives import registry
from fne_jax.studies import cells
from tests.support import pages_of_docs


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


ROLES = [
    pytest.param(role, id=f"{kind}-{name}")
    for kind, roles in (("main", registry.MAIN), ("warmup", registry.WARMUP))
    for name, role in roles.items()
]


@pytest.mark.parametrize("role", ROLES)
def test_an_entry_names_the_fields_that_it_reads(role):
    read = set()
    for queue in (True, False):
        role.build(Recording(config_with(objective__queue=queue), read))
    assert read == set(role.fields)


def test_every_entry_serves_for_something():
    assert set(registry.MAIN) | set(registry.WARMUP) == set(registry.OBJECTIVES)
    for name, entry in registry.OBJECTIVES.items():
        assert entry.name == name and entry.description and entry.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective__name": "fen"}, r"config.objective.name is 'fen'; expected one of fne, ha"),
        ({"objective__oracle": "keep"}, r"config.objective.oracle is 'keep'; expected one of none"),
        ({"warmup__objective": "fne"}, r"config.warmup.objective is 'fne'; expected one of hardes"),
        ({"fne__elimination": "all"}, r"config.fne.elimination is 'all'; expected one of soft"),
    ],
)
def test_unknown_names_are_told_early(change, message):
    for function in (registry.check, registry.main_objective, registry.warmup_objective):
        with pytest.raises(UserError, match=message):
            function(config_with(**change))
    registry.check(config_with())


def test_positives_are_for_losses_that_take_several():
    able = {name for name, entry in registry.OBJECTIVES.items() if entry.takes_positives}
    assert able == {"multi_positive", "sigmoid"}
    for name in registry.MAIN:
        config = config_with(objective__name=name, objective__oracle="positives")
        if name in able:
            registry.check(config)
            configuration.validate(config)
            continue
        for function in (registry.check, configuration.validate):
            with pytest.raises(UserError, match=rf"config.objective.oracle is .*name={name} takes"):
                function(config)
        configuration.validate(config_with(objective__name=name, objective__oracle="drop"))


def test_the_study_compares_what_the_registry_has():
    assert set(cells.OBJECTIVES) == set(registry.MAIN) | set(registry.FNE_VARIANTS)
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
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table == [
        f"| `{entry.name}` | {entry.description} | {entry.source} | "
        f"{'yes' if entry.main else 'no'} | {'yes' if entry.warmup else 'no'} |"
        for entry in registry.OBJECTIVES.values()
    ]
