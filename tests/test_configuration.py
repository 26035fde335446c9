"""Every config builds, every field is read, and mistakes are named."""

import ast
import collections
import itertools
import json
import pathlib
import re

import jax
import pytest

from fne_jax import configuration
from fne_jax.errors import UserError
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
        (["--config.global_batch_size=12"], "8 devices do not divide"),
        (["--config.fne.prior=0"], "config.fne.prior is 0"),
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
    assert jax.device_count() == 8
    with pytest.raises(UserError, match=message):
        configuration.load_config(str(TOP / "configs" / "base.py"), arguments)


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
    fitted = {"micro_batches": 2, "encoder__remat": True, "encoder__attention": "head_loop"}
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


def test_workdir_without_a_config(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        configuration.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        configuration.read_config(tmp_path)
