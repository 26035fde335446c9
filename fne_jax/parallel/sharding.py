"""The device mesh, and where each array lives on it: the one place that decides.

- The rows of a batch are sharded over both axes.
- Parameters (frozen ones, too), momentum parameters and Adam's moments are sharded over both axes,
  so that no device updates what another does (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054, and
  Xu et al. 2020, arXiv 2004.13336); small arrays are replicated. A step gathers the parameters once
  for each encoder, and sums gradients into the parts that their devices keep.
- All else of the train state (queue, statistics, step, key) is replicated, so that each device
  finds the keys of its own anchors without asking another.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fne_jax.errors import UserError

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
# The fields of the train state that are sharded.
SHARDED_FIELDS = ("params", "frozen_params", "momentum_params", "opt_state")
# Elements below which an array is replicated: biases and norms, also those of stacked layers, whose
# gathering would cost more than the memory that it saves.
MIN_SHARDED_SIZE = 2**16


def create_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all devices, or some, along two axes; -1 for what the other leaves.

    Raises UserError if the sizes do not make up the devices.
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


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a parameter of this shape, of its momentum and of Adam's moments.

    Either axis of the mesh splits one dimension, evenly. Of all ways the one with the most parts is
    taken; of those one along a single dimension, for it is gathered at once; and of those the one
    along the first, whose parts lie in one piece.
    """
    if math.prod(shape) < MIN_SHARDED_SIZE:
        return replicated(mesh)
    axes = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]
    ways = [((1, 0), PartitionSpec())]
    for placed in itertools.product((*range(len(shape)), None), repeat=len(axes)):
        along = [
            tuple(axis for axis, dimension in zip(axes, placed, strict=True) if dimension == n)
            for n in range(len(shape))
        ]
        parts = [math.prod(mesh.shape[axis] for axis in split) for split in along]
        if not any(np.mod(shape, parts)):
            rank = math.prod(parts), -sum(part > 1 for part in parts)
            ways.append((rank, PartitionSpec(*(split or None for split in along))))
    return NamedSharding(mesh, max(ways, key=lambda way: way[0])[1])


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the sharding of each array of a train state, in a tree of its shape.

    The state may be concrete or abstract, or a dict with some of its fields.
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
    """Returns which rows of a global batch the devices of a process hold, [rows] int64, increasing.

    They need not be neighbours: meshes follow the network, and on many TPU slices the devices of
    one process lie between those of others. None stands for this process.
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

    What goes through the encoders is divided by hand (`jax.shard_map`): each device runs them on
    its own rows with the whole parameters, and says when gradients are summed. Left to the
    compiler, gradients are summed whole and then cut; told to cut them at once, it moves
    activations between the devices to do so.

    Attributes:
      mesh: The devices.
      cast: Maps a tree of parameters to the dtypes in which they are used, leaf by leaf. They are
        cast before they are gathered, which moves half as much in bfloat16; their gradients are
        summed in their own dtype all the same.
    """

    mesh: Mesh
    cast: Callable[[Any], Any] = lambda params: params

    def replicated(self, tree: Any) -> Any:
        """Returns arrays of which every device holds a full copy."""
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh))

    def rows(self, tree: Any) -> Any:
        """Returns arrays of which each device holds its part of the rows."""
        return jax.lax.with_sharding_constraint(tree, batch_sharding(self.mesh))

    def on_rows(self, fn: Callable, params: Any, rows: Any, rng: jax.Array | None) -> Any:
        """Returns what a function makes of rows, each device giving it its own.

        Gradients with respect to the parameters are summed over the devices, and each device gets
        its part of the sums.

        Args:
          fn: Maps whole parameters, `cast`, a device's rows and its key to arrays of as many rows.
          params: Parameters, sharded as `parameter_sharding` says.
          rows: Arrays of which each device holds its rows.
          rng: A key, of which each device gets one of its own; or None.
        """

        def on_device(params, rows, rng):
            return fn(_gathered(params, specs, self.cast), rows, self._own(rng))

        specs = self._specs(params)
        return self._by_hand(on_device, (specs, _ROWS, _WHOLE), _ROWS)(params, rows, rng)

    def sum_on_rows(self, fn: Callable, params: Any, frozen: Any, rows: Any, rng: jax.Array) -> Any:
        """Returns the sums over the devices of a tree shaped as `params`, sharded as they.

        `fn` maps both trees of whole parameters, `cast`, a device's rows and its key to what is
        summed; all is given as to `on_rows`.
        """

        def on_device(trees, rows, rng):
            whole = _gathered(trees, specs, self.cast)
            return _summed(fn(*whole, rows, self._own(rng)), specs[0])

        specs = self._specs((params, frozen))
        by_hand = self._by_hand(on_device, (specs, _ROWS, _WHOLE), specs[0])
        return by_hand((params, frozen), rows, rng)

    def _specs(self, params):
        return jax.tree.map(lambda leaf: parameter_sharding(self.mesh, leaf.shape).spec, params)

    def _by_hand(self, fn, in_specs, out_specs):
        # Unchecked: fused kernels do not say how what they return varies over the devices.
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _own(self, rng):
        """Returns a device's key, by its place in the mesh; on one device the key itself."""
        if rng is None or self.mesh.size == 1:
            return rng
        return jax.random.fold_in(rng, jax.lax.axis_index(BATCH_AXES))


_ROWS, _WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()


def _gathered(params, specs, cast):
    """Returns whole parameters, cast, of a device's parts."""

    def gather(part, spec, like):
        @jax.custom_vjp
        def whole(part):
            part = part.astype(like.dtype)
            for dimension, axes in enumerate(spec):
                if axes:
                    part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
            return part

        # Left to JAX, the gradient would be summed in the dtype that was gathered. Over the axes
        # that the spec does not name, `shard_map` sums.
        def part_of_sum(_, gradient):
            return (_scattered(gradient.astype(part.dtype), spec),)

        whole.defvjp(lambda part: (whole(part), None), part_of_sum)
        return whole(part)

    return jax.tree.map(gather, params, specs, jax.eval_shape(cast, params))


def _summed(trees, specs):
    """Returns a device's parts of the sums over all devices."""

    def reduce(whole, spec):
        others = [a for a in BATCH_AXES if not any(a in (axes or ()) for axes in spec)]
        part = _scattered(whole, spec)
        return jax.lax.psum(part, others) if others else part

    return jax.tree.map(reduce, trees, specs)


def _scattered(whole, spec):
    """Returns a device's part of the sum over the axes that a spec names."""
    for dimension, axes in enumerate(spec):
        if axes:
            whole = jax.lax.psum_scatter(whole, axes, scatter_dimension=dimension, tiled=True)
    return whole
