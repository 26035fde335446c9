"""`python -m tests.support.joined FAILING KIND` joins the processes of a run; one of them fails.

The others wait for it: in a barrier, in Python, or at their good end.
"""

import errno
import time

import jax

from fne_jax import command_line
from fne_jax.errors import UserError
from fne_jax.parallel import processes

FAILURES = {
    "mistake": UserError("config.seed is odd"),
    "disk": OSError(errno.EIO, "Input/output error", "/runs/x"),
    "bug": KeyError("missing"),
}


def main(arguments):
    parser = command_line.parser("Fails.", "joined")
    parser.add_argument("failing", type=int)
    parser.add_argument("kind")
    processes.add_arguments(parser)
    options = parser.parse_args(arguments)
    processes.initialize(options)
    processes.barrier("joined")
    with processes.first_process_first("work"):
        if jax.process_index() == options.failing:
            raise FAILURES[options.kind]
        assert options.failing > 0 or jax.process_index() == 0, "process 0 failed, and others go on"
        if jax.process_index() == 1:
            time.sleep(1000)
    if jax.process_index() == 2:
        processes.barrier("the end")


if __name__ == "__main__":
    command_line.run(main)
