"""A run goes to a stand-in of the Hugging Face hub and comes back, and what fails on the way."""

import functools
import hashlib
import json
import pathlib
import re
import shutil
import types
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from fne_jax import audit, convert, evaluate, review, search, train
from fne_jax.conversion import hub as conversion_hub
from fne_jax.errors import UserError
from fne_jax.model.model import load_workdir, stored_model
from fne_jax.training import loop
from tests.support.runs import content_of
from tests.support.tiny import LinearTowers, tiny_config

# Of the hub's client, as it sends large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_of_a_test"


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that its client takes for pushing and downloading a model."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        for pattern, status in hub.faults.items():
            if re.search(pattern, hub.asked[-1]):
                if status == "cut":
                    self.connection.shutdown(2)
                    self.close_connection = True
                    return
                self._read()
                return self._answer({"error": "as the test wants"}, status)
        body = self._read()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories[name] = {"private": asked["visibility"] == "private", "commits": [{}]}
            return self._answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = body
            return self._answer()
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git/info/lfs/objects/(batch)|/([a-z]+)/([^/]+)(?:/(.*))?)?",
            path,
        )
        name, batch, verb, revision, file = found.groups()
        if name not in hub.repositories:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if batch:
            actions = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"objects": actions})
        return getattr(self, f"_{verb or 'revision'}")(hub.repositories[name], revision, file, body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _commit_of(self, repository, revision):
        commits = repository["commits"]
        if re.fullmatch("(?!main|0{7}).*", revision or "main"):
            return None, None
        number = len(commits) - 1 if revision in (None, "main") else int(revision[:8], 16)
        return f"{number:08x}{'c' * 32}", commits[number]

    def _revision(self, repository, revision, file, body):
        sha, files = self._commit_of(repository, revision)
        if sha is None:
            return self._answer({}, 404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": name} for name in [".gitattributes", *files]]
        private = repository["private"]
        self._answer({"id": "x", "sha": sha, "private": private, "siblings": siblings})

    def _preupload(self, repository, revision, file, body):
        # Text by the commit, all else by LFS, as the hub's own .gitattributes have it.
        mode = {True: "regular", False: "lfs"}
        self._answer(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": mode[one["path"].endswith(".json")],
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
            }
        )

    def _commit(self, repository, revision, file, body):
        files = dict(repository["commits"][-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository["commits"].append(files)
        sha, _ = self._commit_of(repository, "main")
        self._answer({"commitUrl": f"{self.server.url}/a/b/commit/{sha}", "commitOid": sha})

    def _tree(self, repository, revision, file, body):
        _, files = self._commit_of(repository, revision)
        kind = {"type": "file"}
        listed = [
            kind | {"path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        self._answer(listed)

    def _resolve(self, repository, revision, file, body):
        sha, files = self._commit_of(repository, revision)
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        self._answer(files[file], X_Repo_Commit=sha, ETag=etag)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and its client logged in there, with a cache that is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.objects, server.faults, server.asked = {}, {}, {}, []
    thread = Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # It waits between its tries.
    idle = types.SimpleNamespace(sleep=lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", idle)
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_config(num_epochs=0.3, checkpoint__every_steps=1)
    loop.train_and_evaluate(config, workdir, module=LinearTowers())
    return workdir


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, which commands read with its towers."""
    for module in (conversion_hub, audit, evaluate, review, search):
        for name, read in {"stored_model": stored_model, "load_workdir": load_workdir}.items():
            if hasattr(module, name):
                restore = functools.partial(read, module=LinearTowers())
                monkeypatch.setattr(module, name, restore)
    return shutil.copytree(trained, tmp_path / "run")


def push(folder, *arguments):
    convert.main(["push", "anna/run", f"--from={folder}", *arguments])


@pytest.mark.slow
def test_a_run_comes_back_to_the_bit(run, hub, capsys):
    evaluation = {"split": "test", "verdicts": {"number": 2, "reviewers": ["anna"]}}
    (run / "eval_test.json").write_text(json.dumps(evaluation))
    for private in ("notes.txt", "reviews/verdicts.sqlite", "audit_train/1.html"):
        (run / private).parent.mkdir(exist_ok=True)
        (run / private).write_text("not for the hub")
    push(run, "--dry-run")
    assert not hub.asked
    dry = capsys.readouterr().out.splitlines()
    push(run)
    *listed, total, pushed = capsys.readouterr().out.splitlines()
    assert {one.split()[-1] for one in dry} >= {"config.json", "(private)"}
    assert pushed.startswith(f"pushed: {hub.url}")
    (repository,) = hub.repositories.values()
    assert repository["private"] and len(repository["commits"]) == 2
    sent = repository["commits"][-1]
    sizes = {name: len(content) for name, content in sorted(sent.items())}
    assert listed == [f"{size:16,}  {name}" for name, size in sizes.items()]
    assert (
        total == f"{sum(sizes.values()):16,}  bytes in {len(sizes)} files, for anna/run (private)"
    )
    kinds = {name.partition("/")[0] for name in sent}
    assert kinds == {"config.json", "data.json", "eval_test.json", "tokenizer", "checkpoints"}
    assert "anna" not in sent["eval_test.json"].decode()
    checkpoint = next((run / "checkpoints").iterdir())
    before = sum(map(len, content_of(checkpoint).values()))
    assert sum(size for name, size in sizes.items() if name.startswith("checkpoints")) < before

    ours, theirs = (
        load_workdir(folder, module=LinearTowers()) for folder in (run, "hf://anna/run@main")
    )
    assert theirs.step == ours.step and theirs.data == ours.data
    for _ in ("online", "momentum"):
        split = ours.load_split("test")
        first, second = ours.embed_split(split), theirs.embed_split(split)
        np.testing.assert_array_equal(first.image_emb, second.image_emb)
        np.testing.assert_array_equal(first.text_emb, second.text_emb)
        ours, theirs = ours.momentum(), theirs.momentum()


@pytest.mark.slow
def test_commands_only_read_a_run_of_the_hub(run, hub, tmp_path, capsys):
    push(run)
    given = "--workdir=hf://anna/run"
    for main, arguments, flag in (
        (evaluate.main, [], "--out"),
        (audit.main, [], "--out"),
        (review.main, [], "--store"),
        (search.main, ["--images=test"], "--index-dir"),
    ):
        with pytest.raises(UserError, match=f"the cache of the Hugging Face hub is only r.*{flag}"):
            main([given, *arguments])
    (commit,) = tmp_path.glob("cache/*/snapshots/*")
    before = content_of(commit)
    evaluate.main([given, f"--out={tmp_path / 'eval.json'}"])
    assert json.loads((tmp_path / "eval.json").read_text())["name"] == f"anna/run@{commit.name[:7]}"
    search.main([given, "--images=test", f"--index-dir={tmp_path}", "w1"])
    audit.main([given, "--split=test", f"--out={tmp_path / 'audit'}"])
    assert content_of(commit) == before and not [p for p in commit.iterdir() if p.name == "reviews"]

    with pytest.raises(
        UserError, match=r"is to be read, not to be resumed: it holds no .*opt_state"
    ):
        loop.train_and_evaluate(
            load_workdir(run, module=LinearTowers()).config,
            shutil.copytree(commit, tmp_path / "copy"),
            module=LinearTowers(),
        )
    assert content_of(tmp_path / "copy").keys() - before.keys() <= {pathlib.Path("run.lock")}
    for address, told in (
        ("hf://anna/run@v2", r"\(404 Not Found for GET http"),
        ("hf://anna/other", r"404 Not Found for GET http.*hf auth login"),
        ("hf://anna", "expected hf://OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=told):
            load_workdir(address)
    with pytest.raises(UserError, match="expected a folder on a mounted file system"):
        train.main(["--config=configs/shapes.py", given])


@pytest.fixture
def exported(tmp_path):
    """A folder as `convert export` leaves it, but for what is in its files, and with more."""
    names = ["README.md", "image_text_encoder.json", "image_text_encoder.py", "text/config.json"]
    for name in [*names, "text/model.safetensors", "captions.csv", "text/notes.txt"]:
        path = tmp_path / "exported" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "exported/README.md").write_text(f"of {pathlib.Path.home()}/runs")
    return tmp_path / "exported"


def test_an_exported_folder_takes_the_place_of_what_is_there(exported, hub, capsys):
    push(exported, "--public")
    assert "README.md\n                  which names folders in" in capsys.readouterr().out
    repository = hub.repositories["anna/run"]
    (exported / "text/config.json").unlink()
    for arguments, told in (
        ([], "anna/run is there and public: push with --public, or change"),
        (["--public"], "is there with 4 files, such as image_text_encoder.json; give --replace"),
    ):
        with pytest.raises(UserError, match=told):
            push(exported, *arguments)
    assert len(repository["commits"]) == 2
    with pytest.raises(UserError, match=r"^hf://anna/run is no run: it has no checkpoints$"):
        load_workdir("hf://anna/run")
    (exported / "image.onnx").write_bytes(b"a graph")
    push(exported, "--public", "--replace")
    _, first, second = repository["commits"]
    assert first.keys() - second.keys() == {"text/config.json"}
    assert second.keys() == {
        *("README.md", "image_text_encoder.json", "image_text_encoder.py"),
        *("image.onnx", "text/model.safetensors"),
    }


@pytest.mark.parametrize(
    ("fault", "status", "code", "told"),
    [
        (
            "GET /api/models",
            500,
            74,
            r"\(500 Internal Server Error for GET http.*: as the test wants",
        ),
        ("GET /api/models", "cut", 74, r"\(Server disconnected"),
        ("create", 403, 2, r"\(403 Forbidden for POST http.*: as the test wants\).*hf auth login"),
        ("preupload", 503, 74, r"\(503 Service Unavailable"),
        ("lfs/objects", 401, 2, r"\(401 Unauthorized"),
        ("PUT /lfs", 500, 74, r"\(500 Internal Server Error for PUT"),
        ("PUT /lfs", "cut", 74, r"\("),
        ("/commit/", 403, 2, r"\(403 Forbidden"),
        ("/commit/", "cut", 74, r"\(Server disconnected"),
    ],
)
def test_what_fails_is_told_in_one_line_and_leaves_nothing(
    exported, hub, fault, status, code, told
):
    hub.faults[fault] = status
    with pytest.raises(UserError, match=f"^pushing to anna/run failed {told}") as error:
        push(exported)
    assert error.value.exit_code == code and "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert all(commits == [{}] for commits in (r["commits"] for r in hub.repositories.values()))
    hub.faults.clear()
    push(exported)  # the same command again
    assert len(hub.repositories["anna/run"]["commits"][-1]) == 5


def test_what_cannot_be_pushed(exported, hub, monkeypatch, tmp_path):
    def refused(*arguments):
        with pytest.raises(UserError) as error:
            convert.main(["push", *arguments])
        assert not hub.repositories
        return str(error.value)

    given = f"--from={exported}"
    assert "'run' is no repository; expected OWNER/NAME" in refused("run", given)
    assert "unknown argument '--privat'" in refused("anna/run", given, "--privat")
    assert "expected the folder of a run" in refused("anna/run", f"--from={tmp_path}")
    assert "--checkpoint is of runs" in refused("anna/run", given, "--checkpoint=best")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "([Errno 111] Connection refused)" in refused("anna/run", given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused("anna/run", given)
    monkeypatch.delenv("HF_TOKEN")
    assert "run `hf auth login`, or set HF_TOKEN" in refused("anna/run", given)
