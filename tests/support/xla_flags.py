"""The XLA_FLAGS of this process and of the commands that tests start."""

import os


def xla_flags(devices):
    """Returns the flags that are set, and those for so many virtual CPU devices and fast compiling.

    Small programs, run a few times each: the suite's time is that of compiling them, which halves
    without LLVM's optimisations, and again without the newer code generator of fused operations.
    Cutting each program in 32 parts, to compile them in parallel, costs a tenth of that where all
    cores are taken. `.ci/run` also trains with the default ones.
    """
    # Of a flag that is given twice the last one counts.
    return (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
