"""One of two processes whose devices take turns in the mesh, as on many TPU slices.

`python -m tests.support.interleaved PORT INDEX OUT` embeds a split and places training batches;
process 0 writes what it got to OUT.
"""

import sys

import jax
import numpy as np

PROCESSES, DEVICES = 2, 2


def found(mesh):
    """Returns a split's embeddings, and the pairs of some training batches as they lie."""
    from fne_jax.data.batches import BatchOrder
    from fne_jax.data.sources.registry import load_split
    from fne_jax.model.model import build_model, initial_params
    from fne_jax.parallel import sharding
    from tests.support.tiny import LinearTowers, tiny_config

    # 50 images and 100 captions, the last batch of either in part.
    config = tiny_config(data__synthetic__images=50, evaluation__batch_size=16)
    module = LinearTowers()
    model = build_model(config, {}, None, mesh, module=module)
    params, _ = jax.jit(lambda key: initial_params(module, config, key))(jax.random.key(0))
    val = load_split(config.data, 8, "val")
    ids = np.random.default_rng(0).integers(0, 40, (len(val.captions), 8)).astype(np.int32)
    order = BatchOrder(0, 70, 16)
    local = sharding.local_rows(mesh, 16)
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
    batches = [
        jax.device_get(gather(sharding.to_devices({"pair_id": rows.pair}, mesh)["pair_id"]))
        for rows in order.rows(range(3), local)
    ]
    return {
        "images": model.embedder.images(jax.device_get(params), val),
        "texts": model.embedder.texts(jax.device_get(params), (ids, np.ones_like(ids))),
        "pixels": model.embedder.pixels(jax.device_get(params), [val.images[:21]]),
        "pairs": np.stack(batches),
        "local": local,
    }


def main(port, index, out):
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, int(index))
    from fne_jax.parallel import sharding

    devices = sorted(jax.devices(), key=lambda device: (device.id % DEVICES, device.process_index))
    assert [device.process_index for device in devices] == [0, 1, 0, 1]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), sharding.BATCH_AXES)
    arrays = found(mesh)
    if index == "0":
        np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
