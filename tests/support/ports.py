"""Ports for processes that find each other on this machine."""

import socket


def free_port():
    """Returns a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
