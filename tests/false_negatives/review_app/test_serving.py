"""The server by itself: its port, its end, and a second one beside it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from fne_jax.errors import UserError
from fne_jax.false_negatives.review_app import serving
from fne_jax.false_negatives.verdict_store import VerdictStore
from tests.support import TOP


@contextlib.contextmanager
def server(store, reviewer="anna", port=0):
    """Yields the process of a server and its address, once it answers."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.review_server", store, reviewer, str(port)],
        cwd=TOP, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def post(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(),
        {"content-type": "application/json", "origin": url.rstrip("/")},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_two_servers_of_one_store_and_their_ends(tmp_path):
    store = tmp_path / "v.sqlite"
    with server(store) as (anna, url), server(store, "bert") as (bert, other):
        with urllib.request.urlopen(f"{url}review") as answer:
            data = re.search(r'data-data="([^"]+)"', answer.read().decode()).group(1)
        verdict = {"data": data, "caption": 0, "image": 1, "verdict": "match"}
        assert post(url, "verdict", verdict)["judged"] == 1
        disputed = post(other, "verdict", verdict | {"verdict": "no_match"})
        assert disputed["counts"]["disputed"] == 1
        # Each hears of what the other has said and taken back since.
        post(other, "undo", {"data": data, "by": "caption", "show": "all"})
        again = post(url, "verdict", verdict | {"image": 2})
        assert (again["judged"], again["counts"]["disputed"]) == (2, 0)
        post(url, "undo", {"data": data, "by": "caption", "show": "all"})
        assert post(other, "verdict", verdict | {"verdict": "no_match"})["judged"] == 1
        bert.kill()
        # A browser's open connection, and a request that never ends, are not waited for.
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1][:-1]))) as slow:
            slow.sendall(b"POST /verdict HTTP/1.1\r\nHost: localhost\r\n")
            anna.send_signal(signal.SIGINT)
            assert anna.wait(30) == 130
        assert anna.stderr.read() == "stopped\n"
    with VerdictStore(store) as kept:
        assert [one.reviewer for one in kept.last()] == ["anna", "bert"]


def test_the_usual_port_or_any_other():
    with serving.bind("127.0.0.1", None) as first, serving.bind("127.0.0.1", None) as second:
        ports = [one.getsockname()[1] for one in (first, second)]
        assert ports[0] != ports[1] and serving.USUAL_PORT not in ports[1:]
        assert serving.address("127.0.0.1", second) == f"http://127.0.0.1:{ports[1]}/"
        with pytest.raises(UserError, match=rf"--port={ports[1]}: Address already in use"):
            serving.bind("127.0.0.1", ports[1])
        # An end and a beginning a moment later do not disturb each other.
    with serving.bind("127.0.0.1", ports[1]) as again:
        assert again.getsockname()[1] == ports[1]


def test_hosts_that_are_not_here():
    with pytest.raises(UserError, match=r"--host=nowhere.invalid: "):
        serving.bind("nowhere.invalid", None)
    with pytest.raises(UserError, match=r"--host=192.0.2.1: "):
        serving.bind("192.0.2.1", None)
