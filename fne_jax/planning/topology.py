"""Machines by name: their devices, to compile for, and the peak figures of their chips."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from fne_jax.errors import UserError, first_line, install_command
from fne_jax.planning.operations import TPU_FLOAT32, Float32

# Platforms, as JAX's devices name them.
CPU = "cpu"
GPU = "gpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
      flops: Operations of bfloat16 matrix products a second.
      main_memory: Bytes of the main memory.
      memory_bandwidth: Bytes of the main memory read or written a second.
      link_bandwidth: Bytes a second that it sends to other chips, all links together.
      float32: How long it takes over matrix products of float32.
    """

    flops: float
    main_memory: float
    memory_bandwidth: float
    link_bandwidth: float
    float32: Float32 = TPU_FLOAT32


# Google Cloud's "System architecture" pages of each TPU (cloud.google.com/tpu/docs/v5e, /v5p and
# /v6e; interconnects are given there in both directions, so half is taken). The programs' limit is
# a little below the memory's size, which the compiler knows. v4 is left out: its devices are halves
# of chips.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9),
    # NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200: products of bfloat16
    # without sparsity, of which they list twice as much from the H100 on; NVLink in both
    # directions, of which half is taken; products of float32 as TensorFloat-32 at half the rate,
    # and by the units of float32 (19.5, 67, 67 and 80 TFLOP/s) at the highest precision.
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, Float32(2, 312 / 19.5)),
    "h100": Chip(989.5e12, 80e9, 3350e9, 450e9, Float32(2, 989.5 / 67)),
    "h200": Chip(989.5e12, 141e9, 4800e9, 450e9, Float32(2, 989.5 / 67)),
    "b200": Chip(2250e12, 180e9, 8000e9, 900e9, Float32(2, 2250 / 80)),
}
# NVIDIA's GPUs as XLA's GpuTargetConfigProto names what it asks of one when it compiles for it:
# figures of XLA's repository (openxla/xla), xla/backends/gpu/target_config/specs: a100_sxm_80,
# h100_sxm, h200 and b200, each a .txtpb. The feature extension is whether instructions that later
# GPUs lack are used (sm_90a, sm_100a).
_HOPPER = {
    "major": 9, "extension": "ACCELERATED_FEATURES", "core_count": 132, "fpus_per_core": 128,
    "clock_rate_ghz": 1.98, "l2_cache_size": 52428800, "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
}  # fmt: skip
GPUS = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "extension": "NONE", "core_count": 108,
        "fpus_per_core": 64, "clock_rate_ghz": 1.41, "l2_cache_size": 41943040,
        "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912,
        "device_memory_size": 85100068864, "memory_bandwidth": 2039040000000,
    },
    "h100": _HOPPER | {
        "name": "NVIDIA H100 80GB HBM3", "device_memory_size": 84942979072,
        "memory_bandwidth": 3352320000000,
    },
    "h200": _HOPPER | {
        "name": "NVIDIA H200 141GB HBM3e", "device_memory_size": 151397597184,
        "memory_bandwidth": 4800000000000,
    },
    "b200": _HOPPER | {
        "name": "NVIDIA B200", "major": 10, "core_count": 148, "clock_rate_ghz": 1.965,
        "l2_cache_size": 132644864, "device_memory_size": 191514411008,
        "memory_bandwidth": 7672320000000,
    },
}  # fmt: skip
# What all have in common is of the same files, too; the version of cuDNN is that of the files of
# h100 and h200.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {major} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{name}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
# Those that NVLink joins in one machine; the links of several machines are not in the figures.
_MOST_GPUS = 8
# No TPU is touched: libtpu is neither to ask a Cloud TPU's metadata server, nor to log that there
# is none, nor to refuse because another process uses it.
_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_EXAMPLES = "expected one as v5e:4x4, v6e:2x4, v5p:2x2x1, h100:8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: Its name, as given.
      devices: The devices to compile for; they need not be there.
      chip: The figures of each chip; None for CPUs.
    """

    name: str
    devices: list[jax.Device]
    chip: Chip | None


def find(name: str) -> Topology:
    """Returns the machine of a name such as `v5e:4x4`, `h100:8` or `cpu:8`.

    Call it before anything else uses JAX: virtual CPU devices cannot be added later.

    Raises UserError if there is no such machine, or the compiler for it is missing.
    """
    kind, _, shape = name.partition(":")
    if kind == CPU and re.fullmatch(r"[1-9]\d*", shape):
        return Topology(name, _cpu_devices(int(shape)), None)
    if kind in GPUS and re.fullmatch(rf"[1-{_MOST_GPUS}]", shape):
        return Topology(name, _gpu_devices(name, kind, shape), CHIPS[kind])
    if kind in GPUS or kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"--topology={name}: there is no such machine; {_EXAMPLES} "
            f"(known chips: {', '.join(CHIPS)}; at most {_MOST_GPUS} GPUs)"
        )
    return Topology(name, _tpu_devices(name, shape), CHIPS[kind])


def _cpu_devices(count):
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices(CPU)
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu:{count}: JAX has {len(devices)} CPU device(s); remove "
            "xla_force_host_platform_device_count from XLA_FLAGS, or raise it"
        )
    return devices[:count]


def _tpu_devices(name, shape):
    for variable, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(variable, value)
    # Slices are made of hosts of 2x2 chips, which libtpu has to be told when there are fewer.
    single = set(shape.split("x")) == {"1"}
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except Exception as error:  # JAX raises whatever the plugin or its loading did
        raise UserError(
            f"--topology={name}: {first_line(error)}; TPU programs are compiled by libtpu: "
            f"{install_command('plan')}, and {_EXAMPLES}"
        ) from error
    return list(described.devices)


def _gpu_devices(name, kind, count):
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=_TARGET.format(**GPUS[kind]),
            topology=f"1x1x{count}",  # slices, machines of each, devices of each
        )
    except Exception as error:  # JAX raises whatever the plugin or its loading did
        raise UserError(
            f"--topology={name}: {first_line(error)}; GPU programs are compiled by JAX's CUDA "
            f"plugin, which needs no GPU: {install_command('plan-gpu')}"
        ) from error
    return list(described.devices)
