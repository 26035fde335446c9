"""Which rows the processes of real slices embed; libtpu compiles for them without a TPU.

It needs the extra `plan`. That lies beside the environment rather than in it, or JAX would look for
a TPU each time: `pip install --no-deps --target=FOLDER libtpu`, and PYTHONPATH=FOLDER.
"""

import jax
import numpy as np
import pytest

from fne_jax.model.embedder import Embedder
from fne_jax.parallel import sharding
from fne_jax.planning import topology
from tests.support.tiny import LinearTowers

pytestmark = pytest.mark.slow
SIDE, LENGTH, STATISTICS = 8, 6, ((0.5,) * 3, (0.5,) * 3)
SLICES = [("v5e:4x4", 1), ("v5e:4x4", 4), ("v5p:2x2x2", 1), ("v6e:4x4", 1), ("v5e:8x8", 1)]


@pytest.fixture(scope="module", params=SLICES, ids=lambda param: f"{param[0]}-fsdp{param[1]}")
def mesh(request):
    pytest.importorskip("libtpu")
    name, fsdp = request.param
    yield sharding.create_mesh(fsdp=fsdp, devices=topology.find(name).devices)
    sharding.local_rows.cache_clear()


def embedder_on(mesh, batch_size):
    return Embedder(
        LinearTowers(), mesh, batch_size=batch_size, image_size=SIDE, pixel_statistics=STATISTICS
    )


def owners(mesh):
    """Returns which process each of the devices belongs to, in the order of the rows."""
    return [device.process_index for device in mesh.devices.flat]


def batches_of(process, mesh, size, ids, patch):
    """Returns the batches that a process of a slice embeds; -1 in the rows of the others."""

    def from_callback(shape, place, callback):
        array = np.full(shape, -1, np.int64)
        for device, index in place.devices_indices_map(shape).items():
            if device.process_index == process:
                array[index] = callback(index)
        return array

    seen = []

    def encode(tower, _, batch):
        assert tower == "text"
        seen.append(batch["input_ids"])
        return np.zeros((size, 1))

    sharding.local_rows.cache_clear()
    patch.setattr(jax, "process_index", lambda: process)
    patch.setattr(jax, "make_array_from_callback", from_callback)
    local = [device for device in mesh.devices.flat if device.process_index == process]
    patch.setitem(vars(mesh), "local_devices", local)
    embedder = embedder_on(mesh, size)
    assert embedder.batch_size == size
    patch.setattr(embedder, "_encode", encode)
    embedder.captions(None, (ids, np.ones_like(ids)))
    return np.concatenate(seen)


def test_the_devices_of_a_process_lie_between_those_of_others(mesh):
    # Else the next test would pass as well if the processes took their rows one after another.
    assert owners(mesh) != sorted(owners(mesh))


@pytest.mark.parametrize("rows", [5, 61, 130])
def test_each_row_of_a_split_is_given_by_the_process_whose_device_embeds_it(
    mesh, rows, monkeypatch
):
    size = 2 * mesh.size
    ids = np.arange(rows * LENGTH, dtype=np.int32).reshape(rows, LENGTH) + 1
    whole = np.zeros((-(-rows // size) * size, LENGTH), np.int64)
    whole[:rows] = ids
    owner_of_row = np.tile(np.repeat(owners(mesh), 2), len(whole) // size)
    for process in set(owners(mesh)):
        with monkeypatch.context() as patch:
            given = batches_of(process, mesh, size, ids, patch)
        theirs = (owner_of_row == process)[:, None]
        np.testing.assert_array_equal(given, np.where(theirs, whole, -1))


def test_the_compiled_towers_take_the_rows_in_that_order_and_give_all_to_each_device(mesh):
    size, embedder = 2 * mesh.size, embedder_on(mesh, 2 * mesh.size)
    image = jax.ShapeDtypeStruct((size, SIDE, SIDE, 3), np.uint8)
    tokens = jax.ShapeDtypeStruct((size, LENGTH), np.int32)
    module = LinearTowers()
    params = jax.eval_shape(module.init, jax.random.key(0), image, tokens, tokens)["params"]
    params = sharding.abstract_on(mesh, {"params": params})["params"]
    for encode, batch in (
        (embedder._encoders["image"], {"image": image}),
        (embedder._encoders["text"], {"input_ids": tokens, "attention_mask": tokens}),
    ):
        compiled = encode.lower(params, batch).compile()
        for name, place in compiled.input_shardings[0][1].items():
            taken = place.devices_indices_map(batch[name].shape)
            rows = [range(size)[taken[device][0]] for device in mesh.devices.flat]
            assert [tuple(part) for part in rows] == [(n, n + 1) for n in range(0, size, 2)]
        assert compiled.output_shardings.is_fully_replicated
        assert compiled.output_shardings.device_set == set(mesh.devices.flat)
