"""The device mesh, and where each array lives on it: the one place that decides.

- The rows of a batch are sharded over both axes.
- Parameters, momentum parameters and Adam's moments are sharded over `fsdp`, each along the largest
  of its dimensions that the axis divides; small arrays are replicated.
- All else of the train state (queue, statistics, step, key) is replicated, so that each device
  scores its own anchors against the queue without asking another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fne_jax.errors import UserError

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
# The fields of the train state that are sharded over `fsdp`.
SHARDED_FIELDS = ("params", "momentum_params", "opt_state")
# Elements below which an array is replicated: biases and norms, also those of stacked layers, whose
# gathering would cost more than the memory that it saves.
MIN_SHARDED_SIZE = 2**16


def create_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of devices along the two axes.

    Args:
      data: The size of the axis over which only batches are sharded; -1 for what `fsdp` leaves.
      fsdp: The size of the axis over which parameters are sharded too; -1 for what `data` leaves.
      devices: The devices of the mesh; by default all that JAX sees.

    Raises:
      UserError: if the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = {DATA_AXIS: data, FSDP_AXIS: fsdp}, len(devices)
    for axis, other in (BATCH_AXES, BATCH_AXES[::-1]):
        if sizes[axis] == -1:
            sizes[axis] = count // max(sizes[other], 1)
    if sizes[DATA_AXIS] * sizes[FSDP_AXIS] != count:
        raise UserError(
            f"config.mesh has data={data} and fsdp={fsdp}, which do not divide the {count} "
            "device(s); their product must be that number, and -1 fills one of them"
        )
    # Auto axes: with the default Explicit ones, writing sharded embeddings into the replicated
    # queue is an error rather than a gather.
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which each device has a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: rows over both axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of [micro-batch, row, ...]: rows over both axes."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a parameter of this shape, of its momentum and of Adam's moments."""
    fsdp = mesh.shape[FSDP_AXIS]
    divisible = [size if size % fsdp == 0 else 0 for size in shape]
    if fsdp == 1 or np.prod(shape) < MIN_SHARDED_SIZE or not any(divisible):
        return replicated(mesh)
    spec = [None] * len(shape)
    spec[int(np.argmax(divisible))] = FSDP_AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of each array of a train state.

    Args:
      mesh: The devices.
      state: A train state or a dict with some of its fields, concrete or abstract.

    Returns:
      A tree shaped as `state`.
    """

    def sharding_of(path, leaf):
        field = getattr(path[0], "name", None) or path[0].key
        if field in SHARDED_FIELDS:
            return parameter_sharding(mesh, leaf.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def abstract_on(mesh: Mesh, state: Any) -> Any:
    """Returns the shapes and dtypes of a train state, or of some fields, with their shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_shardings(mesh, state),
    )


@functools.lru_cache
def local_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Returns which rows of a global batch the devices of a process hold.

    They need not be neighbours: meshes follow the network, and on many TPU slices the devices of
    one process lie between those of others.

    Args:
      mesh: The devices.
      batch_size: The rows of a global batch.
      process: The index of the process; None for this one.

    Returns:
      [rows] int64, in increasing order.
    """
    process = jax.process_index() if process is None else process
    parts = batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = [
        np.arange(*part.indices(batch_size))
        for device, (part,) in parts.items()
        if device.process_index == process
    ]
    rows = np.unique(np.concatenate(rows))
    rows.flags.writeable = False  # the cache hands out one array
    return rows


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays of which each process gave its rows, those of `local_rows`."""
    return {name: _global_array(array, mesh) for name, array in batch.items()}


def _global_array(local, mesh):
    size = len(local) * mesh.size // len(mesh.local_devices)
    rows = local_rows(mesh, size)

    def shard(index):
        start, stop, _ = index[0].indices(size)
        place = np.searchsorted(rows, start)
        return local[place : place + stop - start]

    return jax.make_array_from_callback((size, *local.shape[1:]), batch_sharding(mesh), shard)


def place(array: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns a host's array on the devices, each given its own part; an array there as it is."""
    if isinstance(array, jax.Array):
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """Where a train step wants its arrays; without it the compiler may shard products anyhow.

    Attributes:
      mesh: The devices.
    """

    mesh: Mesh

    def replicated(self, tree: Any) -> Any:
        """Returns arrays of which every device holds a full copy."""
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh))

    def rows(self, tree: Any) -> Any:
        """Returns arrays of which each device holds its rows of the batch."""
        return jax.lax.with_sharding_constraint(tree, batch_sharding(self.mesh))

    def replicated_parameters(self, params: Any) -> Any:
        """Returns parameters replicated, to be used; their gradients are sharded again."""

        @jax.custom_vjp
        def use(params):
            return self.replicated(params)

        def shard(_, gradients):
            places = jax.tree.map(lambda g: parameter_sharding(self.mesh, g.shape), gradients)
            # Summed over the devices first: told to shard alone, the compiler shards what goes into
            # the sum, and moves activations to do so.
            return (jax.lax.with_sharding_constraint(self.replicated(gradients), places),)

        use.defvjp(lambda params: (use(params), None), shard)
        return use(params)
