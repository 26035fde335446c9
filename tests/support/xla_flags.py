"""The XLA_FLAGS of this process and of the commands that tests start."""

import importlib.metadata
import os

# The code generator that compiles in half the time ends between jax 0.11.0 and 0.11.2, which know
# no such flag and stop at one that they do not know.
_JAX = tuple(int(number) for number in importlib.metadata.version("jax").split(".")[:2])
_OLDER_GENERATOR = "--xla_cpu_use_fusion_emitters=false " if _JAX < (0, 11) else ""


def xla_flags(devices):
    """Returns the flags that are set, and those for so many virtual CPU devices and fast compiling.

    Small programs, run a few times each: the suite's time is that of compiling them, which halves
    without LLVM's optimisations, and again with the older code generator of fused operations, as
    far as jax has it. Cutting each program in 32 parts, to compile them in parallel, costs a tenth
    of that where all cores are taken. `.ci/run` also trains with the default ones.
    """
    # Of a flag that is given twice the last one counts.
    return (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} "
        f"--xla_backend_optimization_level=0 {_OLDER_GENERATOR}"
        "--xla_cpu_parallel_codegen_split_count=1"
    )
