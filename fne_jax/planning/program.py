"""The real train step of a run, compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_collections

from fne_jax import configuration
from fne_jax.encoders.freezing import is_frozen_below
from fne_jax.errors import UserError
from fne_jax.model.kept_features import kept_towers
from fne_jax.model.model import build_model, build_module
from fne_jax.objectives.registry import NO_ORACLE, uses_matches
from fne_jax.parallel import sharding
from fne_jax.planning.published import read_architectures
from fne_jax.planning.topology import GPU, Topology
from fne_jax.planning.useful import PASSES, matrix_flops
from fne_jax.training.compiled_steps import abstract_batch, jitted_steps
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import TrainState, abstract_state

# How XLA says that a program does not fit: "... HLO temporaries (66.48G) exceeds available HBM
# (15.75G)", or "Used 20.00G of 15.75G hbm".
_OUT_OF_MEMORY = re.compile(
    r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])\)? (?:exceeds available HBM \(|of )"
    r"([\d.]+)([KMGT])"
)
# Matrix products by cuBLAS. On a GPU XLA measures for each whether a kernel of its own is faster;
# without one it takes its own for most, with tiles that do not always exist, and then gives up
# ("Couldn't find output tile sizes", as openxla/xla#36792 has it).
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled train step.

    Attributes:
      config: The config, with what its towers leave open filled in.
      mesh: The mesh of the devices.
      state: The shapes, dtypes and shardings of the train state.
      batch: The shapes, dtypes and shardings of a batch.
      memory: Bytes of the main memory that a device needs; at least, if it does not fit.
      scratch: Bytes of it that are neither state nor batch; None if the program does not fit.
      fits: Whether the compiler could place it.
      limit: Bytes that it may take, if the compiler said so.
      text: The program as text; None if it does not fit.
      useful_flops: Operations of the matrix products that training on a pair cannot do without.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    memory: int
    scratch: int | None
    fits: bool
    limit: int | None
    text: str | None
    useful_flops: int


def compile_step(
    config: ml_collections.ConfigDict, topology: Topology, steps_per_epoch: int
) -> Program:
    """Returns the compiled FNE step of a config; no array is allocated.

    Args:
      config: The config of the run.
      topology: The machine.
      steps_per_epoch: Number of steps in an epoch, which the program holds as a constant.

    Raises:
      UserError: if the config does not suit the machine.
    """
    if uses_matches(config):
        raise UserError(
            f"config.objective.oracle is {config.objective.oracle!r} and config.data.matches "
            f"{config.data.matches!r}: a plan knows of no matches; make them {NO_ORACLE} and '', "
            "and add to a device's memory a bit for each image and caption of the training split "
            "(oracle) or 4 bytes for each match (matches)"
        )
    configuration.check_batches(config, len(topology.devices))
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, topology.devices)
    architectures = read_architectures(config.encoder)
    resolved = configuration.with_model_defaults(config, architectures)
    module = build_module(resolved, architectures, _vocabulary(resolved), mesh)
    model = build_model(resolved, architectures, None, mesh, module=module)
    timeline = Timeline.of(resolved, steps_per_epoch)
    schedule = learning_rate_schedule(
        resolved.optimizer, timeline.steps_per_epoch, timeline.total_steps
    )
    state = abstract_state(model, schedule)
    batch = abstract_batch(model)
    useful = _useful_flops(resolved, architectures, state.all_params)
    lowered = jitted_steps(resolved, timeline, model, schedule, state)[Phase.FNE].lower(
        state, batch
    )
    try:
        gpu = topology.devices[0].platform == GPU
        compiled = lowered.compile(compiler_options=_GPU_OPTIONS if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        return Program(resolved, mesh, state, batch, found[0], None, False, found[1], None, useful)
    sizes = compiled.memory_analysis()
    memory = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
    scratch = sizes.temp_size_in_bytes
    text = compiled.as_text()
    return Program(resolved, mesh, state, batch, memory, scratch, True, None, text, useful)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns the bytes that a program would need at least, and that it may have.

    Args:
      message: The message of the compiler's error.

    Returns:
      Both numbers of bytes, or None if the error is another.
    """
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    needed, limit = (int(float(found[n]) * _UNITS[found[n + 1]]) for n in (1, 3))
    return needed, limit


def _useful_flops(config, architectures, params):
    """Returns the useful operations on one pair, its caption of full length.

    What is frozen runs forwards once, or not at all where its output is kept.
    """
    config = config.copy_and_resolve_references()
    config.encoder.attention = "xla"  # plain products, neither padded nor hidden in a kernel
    module = build_module(config, architectures, _vocabulary(config))
    side, tokens = config.encoder.image.image_size, (1, config.data.text_length)
    shapes = ((1, side, side, 3), jnp.float32), (tokens, jnp.int32), (tokens, jnp.int32)
    pixels, *texts = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    whole = matrix_flops(module.apply, {"params": params}, pixels, *texts)
    frozen = {
        tower: matrix_flops(
            functools.partial(module.apply, method=method), {"params": params}, *own
        )
        for tower, method, own in (
            ("image", "frozen_image", [pixels]),
            ("text", "frozen_text", texts),
        )
        if is_frozen_below(module, tower)
    }
    kept = kept_towers(module, config, training=True)
    once = sum(flops for tower, flops in frozen.items() if tower not in kept)
    return PASSES * (whole - sum(frozen.values())) + once


def _vocabulary(config):
    """Returns the ids of the tokenizer: at most as many as the pretrained text tower has."""
    # A fitted tokenizer has no more than this; a pretrained tower has its own.
    return 1 if config.encoder.text.pretrained else config.data.vocab_size
