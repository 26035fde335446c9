"""The real train step of a run, compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import ml_collections

from fne_jax import configuration
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.objectives.registry import NO_ORACLE, uses_known
from fne_jax.parallel import sharding
from fne_jax.planning.published import read_architectures
from fne_jax.planning.topology import GPU, Topology
from fne_jax.planning.useful import useful_flops
from fne_jax.training.setup import Training
from fne_jax.training.timeline import Phase

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
      training: What it is a step of.
      useful_flops: Operations of the matrix products that training on a pair cannot do without.
      memory: Bytes of the main memory that a device needs; at least, if it does not fit.
      limit: Bytes that it may take, if the compiler said so, as it could not place the program.
      scratch: Bytes of `memory` that are neither state nor batch; None if it does not fit.
      text: The program as text; None if it does not fit.
    """

    training: Training
    useful_flops: int
    memory: int
    limit: int | None = None
    scratch: int | None = None
    text: str | None = None


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
    configuration.check_batches(config, len(topology.devices))
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp, topology.devices)
    training = training_without_data(config, mesh, steps_per_epoch)
    useful = useful_flops(training.model)
    lowered = training.steps[Phase.FNE].lower(training.state, training.abstract_batch())
    try:
        gpu = topology.devices[0].platform == GPU
        compiled = lowered.compile(compiler_options=_GPU_OPTIONS if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        return Program(training, useful, *found)
    sizes = compiled.memory_analysis()
    return Program(
        training,
        useful,
        memory_bytes(sizes),
        scratch=sizes.temp_size_in_bytes,
        text=compiled.as_text(),
    )


def training_without_data(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, steps_per_epoch: int = 1000
) -> Training:
    """Returns the training of a config, for which neither data nor weights are read.

    Args:
      config: As loaded.
      mesh: The devices, which need not be there.
      steps_per_epoch: Number of steps in an epoch, which the program holds as a constant.

    Raises:
      UserError: if the config names known matches, or a pretrained source that is missing.
    """
    if uses_known(config):
        raise UserError(
            f"config.objective.oracle is {config.objective.oracle!r}, config.data.matches "
            f"{config.data.matches!r} and config.objective.teacher {config.objective.teacher!r}: "
            f"without data none of these is there; make them {NO_ORACLE}, '', ''. In a plan add "
            "to a device's memory a bit for each image and caption of the training split (oracle), "
            "5 bytes for each match (matches), or 2 for each dimension of an image and a caption "
            "(teacher)"
        )
    architectures = read_architectures(config.encoder)
    config = configuration.with_model_defaults(config, architectures)
    # A fitted tokenizer has at most as many ids; a pretrained tower has its own.
    ids = 1 if config.encoder.text.pretrained else config.data.vocab_size
    module = build_module(config, architectures, ids, mesh)
    model = build_model(config, architectures, None, mesh, module=module)
    return Training.of(model, steps_per_epoch)


def memory_bytes(sizes: Any) -> int:
    """Returns the bytes that a program takes, of what its `memory_analysis` returned."""
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns the bytes that a program would need at least, and that it may have.

    Returns:
      Both numbers of bytes, or None if the error is another.
    """
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    needed, limit = (int(float(found[n]) * _UNITS[found[n + 1]]) for n in (1, 3))
    return needed, limit
