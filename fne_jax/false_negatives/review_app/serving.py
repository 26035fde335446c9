"""A server of one application that ends at once when it is told to."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Collection

import uvicorn
from starlette.types import ASGIApp

from fne_jax.errors import UserError

# What is asked for where no port is named; any that is free will do.
USUAL_PORT = 8765


def bind(host: str, port: int | None) -> socket.socket:
    """Returns a socket that holds a port, before anything slow begins.

    Without a port it is the usual one, or any other where that is taken. Raises UserError if the
    port is taken or not allowed, or the host is not one of this machine.
    """
    wanted = [USUAL_PORT, 0] if port is None else [port]
    for number in wanted:
        try:
            return _bound(host, number)
        except OSError as error:
            if number == wanted[-1] or isinstance(error, socket.gaierror):
                taken = f"--port={number}: " if port is not None else ""
                raise UserError(
                    f"--host={host}: {taken}{error.strerror}; leave out --port for any that is "
                    "free, and --host for this machine alone"
                ) from None
    raise AssertionError("unreachable")


def _bound(host, port):
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # A server that was ended a moment ago does not hold its port any longer.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Before it listens, another process may take the port as well.
        bound.listen()
    except BaseException:
        bound.close()
        raise
    return bound


def address(host: str, bound: socket.socket) -> str:
    """Returns where a browser of this machine finds the server."""
    port = bound.getsockname()[1]
    name = host if host not in ("0.0.0.0", "::", "") else "localhost"
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def serve(
    app: ASGIApp,
    bound: socket.socket,
    stop_signals: Collection[signal.Signals],
    ready: Callable[[], None],
) -> int:
    """Serves until a signal comes, and returns its number.

    Requests that are being answered are not waited for.

    `bound` is what `bind` returned, and is closed; `ready` is called as soon as requests are
    answered.
    """
    config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", server_header=False)
    server = _Server(config, ready)
    server.stop_on = stop_signals
    with bound:
        server.run(sockets=[bound])
    return server.stopped_by


class _Server(uvicorn.Server):
    """Uvicorn's, but for what signals do."""

    stop_on: Collection[signal.Signals] = ()
    stopped_by = 0

    def __init__(self, config, ready):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self):
        """Ends the server by any of our signals; uvicorn would raise them again at the end."""
        before = {number: signal.signal(number, self._stop) for number in self.stop_on}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number, frame):
        del frame
        self.stopped_by, self.should_exit, self.force_exit = number, True, True
