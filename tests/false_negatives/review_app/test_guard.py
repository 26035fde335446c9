"""Who may ask: by what name, from which page, with how much."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from fne_jax.false_negatives.review_app.guard import MOST_BYTES, Guard


@pytest.fixture
def client():
    return TestClient(Guard(PlainTextResponse("answered"), {"localhost", "Desk.example"}))


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("localhost:8765", True),
        ("LOCALHOST:1", True),
        ("localhost.", True),
        ("127.0.0.1:8765", True),
        ("[::1]:8765", True),
        ("192.168.3.4", True),
        ("desk.example:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("localhost/evil.example", False),
        ("", False),
        ("[::1", False),
        ("localhost:8765:8765", False),
        ("0x7f000001.evil", False),
    ],
)
def test_names(client, host, known):
    answer = client.get("/", headers={"host": host})
    assert (answer.status_code, answer.text == "answered") == (200 if known else 421, known)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://localhost:8765"}, 200),
        ({"origin": "https://localhost:8765"}, 200),  # behind a proxy
        ({"origin": "http://localhost:8765", "sec-fetch-site": "same-origin"}, 200),
        ({}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:8765.evil.example"}, 403),
        ({"origin": "http://localhost:8765", "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://localhost:8765", "sec-fetch-site": "same-site"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_origins(client, method, headers, status):
    host = {"host": "localhost:8765", "content-length": "0"}
    assert client.request(method, "/", headers=host | headers).status_code == status


def test_size(client):
    headers = {"host": "localhost", "origin": "http://localhost"}

    def status(content):
        return client.post("/", headers=headers, content=content).status_code

    assert status(b"x" * MOST_BYTES) == 200
    assert status(b"x" * (MOST_BYTES + 1)) == 413
    assert status(iter([b"x"])) == 413  # of a length that is not told


def test_every_answer_forbids_foreign_content(client):
    for host in ("localhost", "evil.example"):
        headers = client.get("/", headers={"host": host}).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
