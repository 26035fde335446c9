"""Every config builds, every field is read, and mistakes are named."""

import ast
import collections
import contextlib
import functools
import itertools
import json
import math
import pathlib
import re
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from fne_jax import config_rules, configuration
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.parallel import sharding
from fne_jax.training.compiled_steps import jitted_steps
from fne_jax.training.optimizer import build_optimizer, learning_rate_schedule
from fne_jax.training.timeline import Timeline
from fne_jax.training.train_state import abstract_state
from tests.support import TOP
from tests.support.tiny import tiny_config

CONFIGS = [
    str(path)
    for path in sorted((TOP / "configs").glob("*.py"))
    if path.name not in ("__init__.py",)
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: pathlib.Path(p).stem)
def test_every_config_loads_and_is_locked(path):
    config = configuration.load_config(path, ["--config.seed=3"])
    assert config.seed == 3 and config.is_locked
    with pytest.raises(AttributeError):
        config.no_such_field = 1


def last_name(node):
    """Returns the last name of `a.b.c`, `a["c"]` or `c`; "b[]" of `a.b[i]`; else None."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(slice=ast.Constant(value=name)):
            return name
        case ast.Subscript(value=value):
            return f"{last_name(value)}[]"
    return None


def parameters(node):
    """Returns the names that a function, or a class when it is called, gives its arguments."""
    if isinstance(node, ast.ClassDef):
        begins = [n for n in node.body if getattr(n, "name", None) == "__init__"]
        return parameters(begins[0])[1:] if begins else []
    return [argument.arg for argument in node.args.args + node.args.kwonlyargs]


def fields_read(folder):
    """Returns what the code reads as (name before the dot, name behind it), e.g. ("fne", "prior").

    A variable or a parameter that is given `x.fne` stands for "fne" in its file.
    """
    trees = [ast.parse(path.read_text()) for path in folder.rglob("*.py")]
    functions = collections.defaultdict(list)
    aliases = {tree: collections.defaultdict(set) for tree in trees}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                functions[node.name].append((parameters(node), aliases[tree]))
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                values = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    values = zip(target.elts, value.elts, strict=True)
                for name, given in values:
                    if isinstance(name, ast.Name) and not isinstance(given, ast.Name):
                        aliases[tree][name.id].add(last_name(given))
            elif isinstance(node, ast.Call):
                for names, of_file in functions[last_name(node.func)]:
                    given = [*zip(names, node.args, strict=False)]
                    given += [(keyword.arg, keyword.value) for keyword in node.keywords]
                    for name, value in given:
                        of_file[name].add(last_name(value))
    read = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
                before = last_name(node.value)
                read |= {(name, last_name(node)) for name in {before} | aliases[tree][before]}
    return read


def test_every_field_is_read_by_the_package():
    read = fields_read(TOP / "fne_jax")
    for name in configuration.flatten(tiny_config()):
        *groups, leaf = ["config", *name.split(".")]
        names = {groups[-1]} | ({"encoder[]"} if groups[-2:-1] == ["encoder"] else set())
        assert {(group, leaf) for group in names} & read, f"nothing reads config.{name}"


def test_every_field_has_a_comment():
    lines = (TOP / "configs" / "base.py").read_text().splitlines()
    fields = 0
    for before, line in itertools.pairwise(lines):
        if re.match(r"    \w+\.\w+ = ", line) and "ConfigDict()" not in line:
            fields += 1
            assert "  # " in line or before.startswith("    # "), line
    assert fields == len(configuration.flatten(tiny_config()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learning_rat=1"], "did you mean config.optimizer.learning_rate"),
        (["--config.learning_rate=1"], "did you mean config.optimizer.learning_rate"),
        (["--config.fne=1"], "config.fne is a group of fields"),
        (["--config.queue_size=many"], "queue_size"),
        (["--config.queue_size=8"], "queue_size is 8, smaller than a batch"),
        (["--config.fne.prior=0"], "config.fne.prior is 0"),
        (["--config.data.shapes.facts=5"], "shapes.facts is '5'; expected one of varied, four"),
        (
            ["--config.data.shapes.facts=four", "--config.data.shapes.max_objects=2"],
            "^config.data.shapes.max_objects is 2; with facts=four every scene has 3 objects",
        ),
        (["--config.num_epochs=-1"], "config.num_epochs is -1"),
        (["--config.momentum=1.5"], "config.momentum is 1.5"),
        (["--config.data.text_length=600"], "more than config.encoder.text.max_length"),
        (["--config.data.augmentation=flip"], "'flip'; expected one of none, crop_flip, randaug"),
        (["--config.data.source=cocoa"], "source is 'cocoa'; expected one of flickr8k, .*npz"),
        (["--config.data.augment_on=host"], "augment_on was removed: images are augmented on the"),
        (["--config.fne.decay=1"], "^config.fne.decay is now config.fne.tau$"),
        (["--config.objective.memory=False"], "objective.memory is now config.objective.queue"),
        (["--config.objective.name=fen"], "objective.name is 'fen'; expected one of fne, hardest"),
        (["--workdirs=x"], "unknown argument"),
        (["stray"], "unknown argument"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        configuration.load_config(str(TOP / "configs" / "base.py"), arguments)


def test_batches_that_the_devices_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"is 12, which the 8 devices do not divide; .* of 8$"):
        config_rules.check_batches(tiny_config(global_batch_size=12), 8)
    with pytest.raises(UserError, match=r"in config.micro_batches=4 parts; .* of 32$"):
        config_rules.check_batches(tiny_config(micro_batches=4), 8)


def test_every_field_has_a_rule_and_every_rule_a_field():
    assert configuration.flatten(base.get_config()).keys() == config_rules.FIELDS.keys()


def with_value(config, name, value):
    """Returns the config with a field's value, of whatever type, as an own config may set it."""
    config = config.copy_and_resolve_references()
    *groups, leaf = name.split(".")
    group = functools.reduce(lambda group, part: group[part], groups, config)
    with group.unlocked(), group.ignore_type():
        group[leaf] = value
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.image.heads", 0),
        ("encoder.text.layers", 0),
        ("encoder.projection_dim", -4),
        ("encoder.image.dropout", 1.5),
        ("seed", 2**70),
        ("image_mean", (0.5,)),
        ("image_std", (0.0, 0.0, 0.0)),
        ("fne.posterior_threshold", 2.0),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.b1", 1.0),
        ("optimizer.b1", 0.99999999),
        ("optimizer.eps", 0.0),
        ("optimizer.warmup_epochs", -1.0),
        ("optimizer.step_epochs", 5.0),
        ("optimizer.schedule", "linear"),
        ("data.prefetch", -3),
        ("data.vocab_size", 3),
        ("data.text_length", 2),
        ("data.cache_dir", ""),
        ("init_from", "a\0b"),
        ("num_epochs", math.nan),
        ("num_epochs", math.inf),
        ("queue_size", 64.0),
        ("fne.monotone", 1),
        ("momentum", None),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_field(name, value):
    with pytest.raises(UserError, match=rf"^config.{name} is .*; expected "):
        configuration.resolve(with_value(tiny_config(), name, value))


def test_no_number_that_is_allowed_takes_long():
    begun, timelines, refused = time.monotonic(), 0, set()
    for name, rule in config_rules.FIELDS.items():
        for value in (rule.low, rule.high) if isinstance(rule, config_rules.Number) else ():
            config = with_value(tiny_config(num_epochs=2e5), name, value)
            with contextlib.suppress(UserError):  # it does not fit to the others
                config, _ = configuration.resolve(config)
            try:
                timeline = Timeline.of(config, 10**4)
            except UserError as error:
                assert str(error).startswith(f"config.{name} is {float(value)}; with 10000 steps")
                refused.add((name, value))
                continue
            schedule = learning_rate_schedule(config.optimizer, 10**4, timeline.total_steps)
            assert timeline.validates(timeline.total_steps) and schedule(7) >= 0
            timelines += 1
    assert refused == {("num_epochs", 10**6), ("optimizer.warmup_epochs", 10**6)}
    assert timelines > 100 and time.monotonic() - begun < 60


def some_values(rule):
    """Returns values in, at, and beyond the ends of a rule, and of other types."""
    ends = [rule.low, rule.high] if isinstance(rule, config_rules.Number) else []
    near = [value for end in ends for value in (end, end - 1, end + 1, end * 2, end / 2, -end)]
    names = list(rule.names) if isinstance(rule, config_rules.Choice) else []
    numbers = [0, 1, -1, 2, 3, 7, 16, 10**30, 0.5, 1e-30, 1e300, math.nan, math.inf, *near]
    others = [True, False, None, "", "x", "a\0b", "~", (), (0.5,), (0.5,) * 3, (2.0,) * 3, ("x",)]
    return st.sampled_from([*numbers, *[round(v) for v in near], *names * 4, *others])


def builds(config):
    """Builds all that a run of a config compiles, without any array, at most so large."""
    sizes = config.encoder.image, config.encoder.text
    if config.encoder.image.image_size // config.encoder.image.patch_size > 2**9:
        return
    if max(tower.layers for tower in sizes) > 8:
        return
    module = build_module(config, {}, 30)
    mesh = sharding.create_mesh()
    model = build_model(config, {}, None, mesh, module=module)
    timeline = Timeline.of(config, 7)
    schedule = learning_rate_schedule(config.optimizer, 7, timeline.total_steps)
    assert all(np.isfinite(schedule(step)) for step in (0, 1, timeline.total_steps))
    state = abstract_state(model, schedule)
    jitted_steps(config, timeline, model, schedule, state)
    assert timeline.phase(0) and state.step.shape == ()


def refused_by_name_or_built(data):
    name = data.draw(st.sampled_from(sorted(config_rules.FIELDS)))
    value = data.draw(some_values(config_rules.FIELDS[name]))
    try:
        config, _ = configuration.resolve(with_value(tiny_config(), name, value))
        builds(config)
    except UserError as error:
        assert f"config.{name}" in str(error) or name.rpartition(".")[2] in str(error)
        assert "\n" not in str(error)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_value_is_refused_by_its_name_or_builds(data):
    refused_by_name_or_built(data)


@pytest.mark.slow
@hypothesis.settings(max_examples=600, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_six_hundred_values_are_refused_by_name_or_build(data):
    refused_by_name_or_built(data)


@pytest.mark.parametrize("name", ["b1", "b2", "eps", "clip_norm"])
def test_no_allowed_optimizer_makes_weights_other_than_finite(name):
    # The guard of the train step looks at losses and gradients, not at what the update makes.
    optimizer = tiny_config().optimizer
    optimizer.update(learning_rate=1.0, clip_norm=1e6, eps=1e-20, b1=0.9999, b2=0.0)
    rule = config_rules.FIELDS[f"optimizer.{name}"]
    for value in (float(rule.low), float(rule.high)):
        optimizer[name] = value
        update = build_optimizer(optimizer, optax.constant_schedule(1.0), None)
        params = {"image": {"kernel": jnp.array([0.0, 1.0, -1e18, 1e-38])}}
        state = update.init(params)
        for gradient in (0.0, 1e-45, 1.0, 1e18, 0.0):
            grads = jax.tree.map(lambda leaf, g=gradient: jnp.full_like(leaf, g), params)
            changes, state = update.update(grads, state, params)
            params = optax.apply_updates(params, changes)
            assert np.isfinite(params["image"]["kernel"]).all(), (value, gradient)


OWN_CONFIGS = {
    "base_config().optimizr.learning_rate = 1": "line 4: AttributeError: .*optimiz",
    "base_config().update(no=undefined)": "line 4: NameError: name 'undefined' is not defined",
    "return 3": r"get_config\(\) returns int, not a ConfigDict",
    "raise RuntimeError": "line 4: RuntimeError$",
    "return ml_collections.ConfigDict({'seed': 1})": "the config lacks config.checkpoint.every_st",
    "1 / 0": "line 4: ZeroDivisionError",
}


@pytest.mark.parametrize("body", OWN_CONFIGS)
def test_a_mistake_in_an_own_config_is_one_line(tmp_path, body):
    path = tmp_path / "own.py"
    path.write_text(
        "import ml_collections\nfrom configs.base import get_config as base_config\n"
        f"def get_config():\n    {body}\n"
    )
    with pytest.raises(UserError, match=OWN_CONFIGS[body]) as error:
        configuration.load_config(str(path), [])
    assert "\n" not in str(error.value)


def test_a_config_without_get_config_is_told(tmp_path):
    (tmp_path / "empty.py").write_text("config = 1\n")
    with pytest.raises(UserError, match=r"empty.py: there is no function get_config\(\)"):
        configuration.load_config(str(tmp_path / "empty.py"), [])


def test_missing_config_file():
    with pytest.raises(UserError, match="no such file"):
        configuration.load_config("configs/nope.py", [])


def test_resuming_with_another_config_lists_the_differences(tmp_path):
    configuration.store_config(tiny_config(), tmp_path)
    configuration.store_config(tiny_config(), tmp_path)
    configuration.store_config(tiny_config(logging__every_steps=1), tmp_path)
    with pytest.raises(UserError) as error:
        configuration.store_config(tiny_config(momentum=0.5, fne__margin=0.3), tmp_path)
    assert "config.momentum: 0.995 in the run, 0.5 now" in str(error.value)
    assert "config.fne.margin: 0.2 in the run, 0.3 now" in str(error.value)
    assert configuration.read_config(tmp_path).momentum == 0.995


def test_a_resumed_run_may_be_fitted_to_fewer_devices(tmp_path):
    configuration.store_config(tiny_config(), tmp_path)
    fitted = {"micro_batches": 2, "encoder__remat": "full", "encoder__attention": "head_loop"}
    configuration.store_config(tiny_config(**fitted), tmp_path)


def test_a_stored_config_may_have_a_removed_field_with_its_default(tmp_path):
    configuration.store_config(tiny_config(), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["data"]["augment_on"] = "host"
    path.write_text(json.dumps(stored))
    read = configuration.read_config(tmp_path)
    assert read.is_locked and "augment_on" not in read.data
    configuration.store_config(tiny_config(), tmp_path)  # a resume
    stored["data"]["augment_on"] = "device"
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"augment_on is 'device', but the field was removed"):
        configuration.read_config(tmp_path)


def test_a_run_that_was_stored_without_later_fields_is_read_and_resumed(tmp_path):
    configuration.store_config(tiny_config(), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["data"]["shapes"]["facts"]
    path.write_text(json.dumps(stored))
    assert configuration.read_config(tmp_path).data.shapes.facts == "varied"
    configuration.store_config(tiny_config(), tmp_path)  # a resume
    with pytest.raises(UserError, match="facts: 'varied' in the run, 'four' now"):
        configuration.store_config(tiny_config(data__shapes__facts="four"), tmp_path)


@pytest.mark.parametrize(("stored", "read"), [(True, "full"), (False, "none"), ("full", "full")])
def test_a_switch_that_was_stored_is_read_as_a_name(tmp_path, stored, read):
    configuration.store_config(tiny_config(), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["encoder"]["remat"] = stored
    path.write_text(json.dumps(fields))
    config = configuration.read_config(tmp_path)
    assert config.encoder.remat == read
    config_rules.validate(config)
    configuration.store_config(tiny_config(), tmp_path)  # a resume


def test_a_run_that_was_stored_under_old_names_is_read(tmp_path):
    fields = configuration.flatten(tiny_config(fne__tau=0.7, objective__queue=False))
    old_names = {new: old for old, new in configuration.RENAMED_FIELDS.items()}
    assert set(old_names) <= set(fields)
    nested = {}
    for name, value in fields.items():
        *groups, leaf = old_names.get(name, name).split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    (tmp_path / "config.json").write_text(json.dumps(nested))
    config = configuration.read_config(tmp_path)
    assert (config.fne.tau, config.fne.ema_decay, config.objective.queue) == (0.7, 1.0, False)
    assert "decay" not in config.fne and "memory" not in config.objective
    configuration.store_config(tiny_config(fne__tau=0.7, objective__queue=False), tmp_path)


def test_a_run_that_was_stored_before_a_field_came_is_read(tmp_path):
    fields = configuration.flatten(tiny_config())
    assert {name: fields[name] for name in configuration.ADDED_FIELDS} == configuration.ADDED_FIELDS
    stored = json.loads(tiny_config().to_json())
    del stored["objective"]["oracle"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    configuration.check_stored(tiny_config(), tmp_path)
    with pytest.raises(UserError, match=r"config.objective.oracle: 'none' in the run, 'drop' now"):
        configuration.check_stored(tiny_config(objective__oracle="drop"), tmp_path)


def test_workdir_without_a_config(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        configuration.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        configuration.read_config(tmp_path)
