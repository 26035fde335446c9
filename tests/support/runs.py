"""Runs looked at from outside: their stored state, and devices to run them on."""

import jax
import optax

from fne_jax import configuration
from fne_jax.model import checkpoints, tokenizers
from fne_jax.model.model import build_model
from fne_jax.parallel import sharding
from fne_jax.training.compiled_steps import jitted_steps
from fne_jax.training.train_state import abstract_state, initial_state


def mesh_of(data, fsdp=1):
    """Returns a mesh of the first devices."""
    return sharding.create_mesh(data, fsdp, jax.devices()[: data * fsdp])


def new_state(config, module, mesh, schedule):
    """Returns the state before the first step."""
    model = build_model(config, {}, None, mesh, module=module)
    return initial_state(model, abstract_state(model, schedule))


def new_steps(config, timeline, module, mesh, schedule, state):
    """Returns the train step of each phase, jitted."""
    model = build_model(config, {}, None, mesh, module=module)
    return jitted_steps(config, timeline, model, schedule, state)


def stored_state(workdir, checkpoint="latest", *, mesh=None, module=None):
    """Returns the whole train state of a run's checkpoint."""
    config, architectures = configuration.resolve(configuration.read_config(workdir), workdir)
    tokenizer = tokenizers.stored_tokenizer(workdir)
    mesh = mesh or sharding.create_mesh()
    model = build_model(config, architectures, tokenizer, mesh, module=module)
    like = abstract_state(model, optax.constant_schedule(0.0))
    with checkpoints.reader(workdir) as manager:
        step = checkpoints.find_step(manager, checkpoint)
        return like.replace(**checkpoints.read(manager, step, like.stored())[0])


def content_of(folder):
    """Returns the content of all files below a folder, by path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
