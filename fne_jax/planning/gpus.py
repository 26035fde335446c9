"""NVIDIA's GPUs as XLA describes them, to compile for one that is not there."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a GPU when it compiles for it.

    Attributes:
      description: Its name, as its driver tells it.
      compute_capability: Its compute capability, such as 9.0, without the point's right side.
      cores: Number of its streaming multiprocessors.
      fpus_per_core: Units of a multiprocessor for float32.
      clock_ghz: Clock rate.
      l2_cache: Bytes of the cache that all multiprocessors share.
      shared_memory_per_core: Bytes of a multiprocessor's shared memory.
      shared_memory_per_block: Bytes of it that one block may ask for.
      device_memory: Bytes of the main memory that programs see.
      memory_bandwidth: Bytes of the main memory read or written a second.
      accelerated: Whether instructions that later GPUs lack are used (sm_90a, sm_100a).
    """

    description: str
    compute_capability: int
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    device_memory: int
    memory_bandwidth: int
    accelerated: bool = True


# Figures of XLA's repository (openxla/xla), xla/backends/gpu/target_config/specs: a100_sxm_80,
# h100_sxm, h200 and b200, each a .txtpb.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 41943040, 167936, 166912, 85100068864,
        2039040000000, accelerated=False,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 52428800, 233472, 232448, 84942979072,
        3352320000000,
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 52428800, 233472, 232448, 151397597184,
        4800000000000,
    ),
    "b200": Gpu(
        "NVIDIA B200", 10, 148, 128, 1.965, 132644864, 233472, 232448, 191514411008,
        7672320000000,
    ),
}  # fmt: skip

# What all of them have in common, as the same files say; the version of cuDNN is that of the files
# of h100 and h200.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.device_memory}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  cuda_compute_capability {{ major: {gpu.compute_capability} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{gpu.description}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.description}"
"""


def target_config(gpu: Gpu) -> str:
    """Returns a GPU as text of XLA's GpuTargetConfigProto."""
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return _TARGET.format(gpu=gpu, extension=extension)
