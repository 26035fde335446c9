"""Several processes as one run: how they find each other, take turns, and agree."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from fne_jax.errors import EnvironmentFailure, UserError, first_line
from fne_jax.parallel import common_end

HEARTBEAT_TIMEOUT_SECONDS = 100  # jax.distributed's own default
_FLAGS = ("coordinator", "processes", "process_index")
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that make one run of several processes."""
    group = parser.add_argument_group(
        "several processes",
        "found by themselves on Cloud TPU, GKE and SLURM; elsewhere give the first three",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-index", type=int, metavar="I", help="this one, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        metavar="SECONDS",
        default=HEARTBEAT_TIMEOUT_SECONDS,
        help="after which a silent process is taken for dead and the others exit (%(default)s)",
    )


def initialize(options: argparse.Namespace) -> None:
    """Joins the run's processes, if there are several; call it before JAX sees its devices.

    Raises UserError if the flags do not fit together, and EnvironmentFailure if the other processes
    cannot be reached.
    """
    if options.heartbeat_timeout < 1:
        raise UserError(
            f"--heartbeat-timeout is {options.heartbeat_timeout}; expected at least 1 second"
        )
    place = explicit_place(options)
    if place is None and not may_be_cluster(os.environ):
        return
    # Signals are answered by the training loop (interruption.py); JAX's own notice of SIGTERM
    # would swallow those that come while no loop runs.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            # A pod outside of any Job is a plain machine; JAX would recommend a package there.
            warnings.filterwarnings("ignore", message="(?s).*Kubernetes environment detected")
            jax.distributed.initialize(
                **(place or {}),
                heartbeat_timeout_seconds=options.heartbeat_timeout,
                shutdown_timeout_seconds=options.heartbeat_timeout,
                cluster_detection_method=None if place is None else "deactivate",
            )
    except ValueError as error:
        if place is None and "should be defined" in str(error):
            return  # no cluster after all: one machine
        raise UserError(f"cannot join the other processes: {error}") from error
    except RuntimeError as error:
        if place is None and "must be called before" in str(error):
            return  # called by a program that has used JAX already, alone
        raise EnvironmentFailure(
            f"cannot join the other processes: {first_line(error)}; check --coordinator, "
            "--processes and --process-index, and that process 0 runs"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    common_end.watch()
    if jax.process_index() == 0:
        _log.info("%d processes, %d devices", jax.process_count(), jax.device_count())
    else:
        # One log tells of the run; the others of what is wrong with their process.
        logging.getLogger("fne_jax").setLevel(logging.WARNING)


def explicit_place(options: argparse.Namespace) -> dict[str, str | int] | None:
    """Returns what the flags say of this process; None if they say nothing.

    Raises UserError if they say a part, or what cannot be.
    """
    values = {"--" + name.replace("_", "-"): getattr(options, name) for name in _FLAGS}
    missing = [flag for flag, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing: {', '.join(values)} go together, or give none of them"
        )
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator is {options.coordinator!r}; expected HOST:PORT")
    if not 0 <= options.process_index < options.processes:
        raise UserError(
            f"--process-index is {options.process_index} of {options.processes} processes; "
            f"expected 0 to {options.processes - 1}"
        )
    return {
        "coordinator_address": options.coordinator,
        "num_processes": options.processes,
        "process_id": options.process_index,
    }


def may_be_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX should look for the other processes by itself.

    A SLURM step of one task has none; a Kubernetes pod has some if it belongs to an indexed Job
    or a TPU slice. On any other machine JAX looks for TPU chips, which takes no time without them.
    """
    if "SLURM_PROCID" in environment:
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "JOB_COMPLETION_INDEX" in environment or "TPU_WORKER_HOSTNAMES" in environment
    return True


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """Runs its body on process 0, and then on all others, which find what it wrote.

    After an error on process 0 the others are left waiting, which its end ends (`common_end`): none
    of them is to try, at once and in the same place, what it could not do. `what` is the same name
    on all processes, another for each use.
    """
    if jax.process_index() != 0:
        barrier(what)
    yield
    if jax.process_index() == 0:
        barrier(what)


def barrier(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Runs its body; waits for all processes, and fails on all of them if it did on one.

    The UserError that the body raised on another process is a FailedElsewhereError here, which says
    that `what` failed, with the same exit code.
    """
    error = None
    try:
        yield
    except UserError as raised:
        error = raised
    code = highest(0 if error is None else error.exit_code)
    if error is not None:
        raise error
    if code:
        message = f"{what}: another process failed; its log tells why"
        raise common_end.FailedElsewhereError(message, code)


def highest(value: int) -> int:
    """Returns the largest of all processes' values; waits for them."""
    if jax.process_count() == 1:
        return int(value)
    return int(np.max(multihost_utils.process_allgather(np.array(value, np.int32))))
