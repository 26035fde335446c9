"""Config files, loaded with overrides from the command line."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from fne_jax.configuration.rules import check_field, flatten, validate
from fne_jax.configuration.storing import MAY_CHANGE
from fne_jax.errors import UserError

_CONFIG_MODULE = "config_config"  # the name under which ml_collections runs config files


def load_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config of a file with `--config.x=y` overrides, locked and checked.

    Raises UserError if the file, Python with a `get_config` function, cannot be loaded, a field is
    unknown (with the nearest names), or a value does not fit.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file; try configs/shapes.py")
    fields = flatten(_parse(path, []))
    for name in _fields(overrides):
        check_field(name, fields)
    config = _parse(path, overrides)
    validate(config)
    return config


def override(
    config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> ml_collections.ConfigDict:
    """Returns a run's config with `--config.x=y` overrides of fields that may change, checked.

    The config, what `read_config` returned, is changed. Raises UserError if a field is unknown or
    the run depends on it, or a value does not fit.
    """
    fields = flatten(config)
    for name in _fields(overrides):
        check_field(name, fields)
        if not name.startswith(MAY_CHANGE):
            raise UserError(
                f"--config.{name}: the run depends on it; only these may change: "
                f"{', '.join(f'{one}*' if one.endswith('.') else one for one in MAY_CHANGE)}"
            )
    if not overrides:
        return config
    values, arguments = flags.FlagValues(), ["fne_jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except flags.Error as error:
        raise UserError(str(error)) from error
    validate(config)
    return config


def _fields(overrides):
    """Yields the field that each override sets."""
    for override in overrides:
        name, _, _ = override.removeprefix("--").removeprefix("no").partition("=")
        if not override.startswith("--") or not name.startswith("config."):
            raise UserError(f"unknown argument {override!r}; overrides look like --config.x=y")
        yield name.removeprefix("config.")


def _parse(path, overrides):
    # So that a config file can import its neighbours (`from configs import base`) from anywhere.
    top = str(pathlib.Path(path).resolve().parent.parent)
    if top not in sys.path:
        sys.path.append(top)
    sys.modules.pop(_CONFIG_MODULE, None)  # else what the file before defined stays defined
    values = flags.FlagValues()
    arguments = ["fne_jax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=arguments
    )
    try:
        values(arguments)
        config = values.config
    except flags.Error as error:
        raise UserError(str(error)) from error
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(f"{path}{_line_in(path, error)}: {_in_one_line(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config


def _line_in(path, error):
    """Returns `, line 7` where an error came from a line of the config file."""
    own = pathlib.Path(path).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if pathlib.Path(frame.filename).resolve() == own
    ]
    return f", line {lines[-1]}" if lines else ""


def _in_one_line(error):
    text = " ".join(str(error).split())
    if "get_config" in text:
        return "there is no function get_config() that returns the config"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
