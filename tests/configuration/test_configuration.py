"""Every config builds, every field is read, and mistakes are named."""

import ast
import collections
import itertools
import pathlib
import re

import pytest

from fne_jax import configuration
from fne_jax.encoders.towers import read_architectures
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
                    # From the end: a starred value at the beginning stands for several.
                    values = zip(target.elts[::-1], value.elts[::-1], strict=False)
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: pathlib.Path(p).stem)
def test_every_config_leaves_the_tokenizer_to_a_pretrained_text_encoder(path, golden):
    bert = str(golden / "encoders" / "bert")
    flags = [f"--config.encoder.text.pretrained={bert}", "--config.encoder.image.pretrained="]
    config = configuration.load_config(path, [*flags, "--config.data.text_length=20"])
    config = configuration.with_model_defaults(config, read_architectures(config.encoder))
    assert config.data.tokenizer == bert


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
        (["--config.data.augmentation=flip"], "'flip'; expected one of none, crop_flip, randaug"),
        (["--config.data.source=cocoa"], "source is 'cocoa'; expected one of flickr8k, .*npz"),
        (["--config.objective.name=fen"], "objective.name is 'fen'; expected one of fne, hardest"),
        (["--workdirs=x"], "unknown argument"),
        (["stray"], "unknown argument"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        configuration.load_config(str(TOP / "configs" / "base.py"), arguments)


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


def test_a_run_is_read_from_any_folder_and_told_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configuration.store_config(tiny_config(data__dir="coco", data__cache_dir="~/c"), tmp_path)
    stored = configuration.read_config(tmp_path)
    assert (stored.data.dir, stored.data.cache_dir) == (f"{tmp_path}/coco", "~/c")
    given = ["--config.data.dir=other", "--config.evaluation.batch_size=2"]
    moved = configuration.override(stored, given)
    assert (moved.data.dir, moved.evaluation.batch_size, moved.seed) == ("other", 2, 0)
    for wrong, message in (
        ("--config.data.max_words=5", "config.data.max_words: the run depends on it; only these"),
        ("--config.data.prefetch=-1", "config.data.prefetch is -1"),
        ("--config.data.prefetch=x", "prefetch"),
        ("--config.data.dri=x", "data.dri.*data.dir"),
        ("--splits=x", "unknown argument '--splits=x'"),
    ):
        with pytest.raises(UserError, match=message):
            configuration.override(configuration.read_config(tmp_path), [wrong])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fne.decay": 0.5}, r"config.json is .*: it also has config.fne.decay; take the version"),
        ({"fne.tau": None}, r"it lacks config.fne.tau; take the version of fne_jax that wrote it$"),
        ({"fne.tau": None, "fne.decay": 0.5}, "it lacks config.fne.tau and also has config.fne.d"),
    ],
    ids=str,
)
def test_a_run_of_another_version_is_refused(tmp_path, fields, message):
    config = tiny_config().unlock()
    for name, value in fields.items():
        group, leaf = name.split(".")
        if value is None:
            del config[group][leaf]
        else:
            config[group][leaf] = value
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(UserError, match=message):
        configuration.store_config(tiny_config(), tmp_path)  # a resume


def test_workdir_without_a_config(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        configuration.read_config(tmp_path)
    for damaged in ("{", "[1]"):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match="not a JSON file"):
            configuration.read_config(tmp_path)
