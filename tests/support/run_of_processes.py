"""One tiny run in several processes, started and followed to its end."""

import contextlib
import random
import socket
import threading

from tests.support import soak_kill
from tests.support.ports import free_port

HANGS = 180  # seconds after which a process that should have ended is taken to hang
SLURM_FIRST_PORT = 61440  # JAX's coordinator listens at this port plus the job's id


def free_job_id():
    """Returns a SLURM job's id that leads JAX to a free port."""
    for job in random.SystemRandom().sample(range(4096), 64):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", SLURM_FIRST_PORT + job))
            return job
    raise AssertionError("64 ports of SLURM's jobs are taken")


def start_all(workdir, count, devices, kind, heartbeat=100, arguments=()):
    """Returns the started processes of one run, and their logs as they grow.

    Each is told its place by flags, or by SLURM's variables.
    """
    port, job = free_port(), free_job_id()
    started = []
    for index in range(count):
        flags, variables = [f"--heartbeat-timeout={heartbeat}", *arguments], {}
        if kind == "flags":
            flags += [f"--coordinator=localhost:{port}", f"--processes={count}"]
            flags += [f"--process-index={index}"]
        else:
            variables = {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            }
        process = soak_kill.start(workdir, *flags, devices=devices, variables=variables)
        lines = []
        reader = threading.Thread(target=lambda s=process.stderr, to=lines: to.extend(s))
        reader.start()
        started.append((process, lines, reader))
    return started


def ends_of(started):
    """Returns exit codes and logs; a process that hangs fails the test."""
    try:
        codes = [process.wait(HANGS) for process, _, _ in started]
    finally:
        for process, _, reader in started:
            process.kill()
            reader.join()
            process.stderr.close()
    return codes, ["".join(lines) for _, lines, _ in started]
