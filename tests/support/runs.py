"""Runs looked at from outside: their stored state, and devices to run them on."""

import jax
import optax

from fne_jax import configuration
from fne_jax.model import checkpoints, tokenizers
from fne_jax.model.model import build_model
from fne_jax.parallel import sharding
from fne_jax.training.setup import Training
from fne_jax.training.train_state import abstract_state, initial_state


def mesh_of(data, fsdp=1):
    """Returns a mesh of the first devices."""
    return sharding.create_mesh(data, fsdp, jax.devices()[: data * fsdp])


def training_of(config, module, mesh, steps_per_epoch, learning_rate=None):
    """Returns how a config trains two towers, at its learning rate or at a constant one."""
    if learning_rate is not None:
        config = config.copy_and_resolve_references()
        config.optimizer.update(learning_rate=learning_rate, warmup_epochs=0.0, step_epochs=())
    model = build_model(config, {}, None, mesh, module=module)
    return Training.of(model, steps_per_epoch)


def new_state(training):
    """Returns the state before the first step."""
    return initial_state(training.model, training.state)


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
