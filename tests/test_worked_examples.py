"""The worked examples of docs/, built as a reader would: they work."""

import collections
import contextlib
import http.server
import importlib
import json
import math
import re
import sys
import threading
import time
import types
import xml.etree.ElementTree
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import fne_jax
from fne_jax.data.verdicts import read_verdicts
from fne_jax.encoders import model_types, pretrained_weights
from fne_jax.encoders.architectures import build_from_architecture
from fne_jax.errors import UserError
from fne_jax.objectives.features import Features
from tests.support import TOP, pages_of_docs
from tests.support.sources import jpeg
from tests.support.tiny import tiny_config

PAGE = "architecture.md"


@pytest.fixture
def follow(monkeypatch):
    """Returns a function that follows an example, and returns the modules by their files' names."""

    def follow(heading, page=PAGE):
        text = pages_of_docs.section(page, heading)
        blocks = [
            block
            for block in pages_of_docs.blocks(TOP / "docs" / page)
            if block.title and block.code in text
        ]
        assert 1 <= len(blocks) <= 3
        modules = {}
        for block in blocks:
            name = block.title.removesuffix(".py").replace("/", ".")
            source = block.code
            if block.language == "diff":
                source = pages_of_docs.patched((TOP / block.title).read_text("utf-8"), source)
                name += "_changed"  # the package's own stays as it is
            module = modules[block.title.rpartition("/")[2]] = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(source, block.title, "exec"), vars(module))
        return modules

    return follow


def test_every_example_is_followed():
    headings = re.findall(r"^### (An? .*)$", (TOP / "docs" / PAGE).read_text("utf-8"), re.MULTILINE)
    assert headings == [
        "An objective: soft-margin triplets",
        "A source: captions in file names",
        "An encoder: ELECTRA",
    ]


def test_the_objective(follow):
    registry = follow("### An objective: soft-margin triplets")["registry.py"]
    config = ml_collections.ConfigDict(tiny_config().to_dict())
    config.objective.name = "soft_margin"
    config.objective.temperature = 0.1
    objective = registry.main_objective(config)
    assert "objective.temperature" in registry.fields_after_warmup(config)

    rng = np.random.default_rng(0)
    image, text = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 5, 3))
    )
    image_id = np.array([0, 1, 2, 1, 3])  # pairs 1 and 3 show one image
    same_image = image_id[:, None] == image_id

    def loss(image, text):
        features = Features(image, text, image, text, image_id, same_image=same_image)
        return objective(features, None, None, jax.random.key(0))[0]

    expected = 0.0
    for anchors, keys in ((image, text), (text, image)):
        for row in range(5):
            others = [key for key in range(5) if image_id[key] != image_id[row]]
            hardest = max(anchors[row] @ keys[key] for key in others)
            gap = (hardest - anchors[row] @ keys[row]) / 0.1
            expected += np.log1p(np.exp(gap)) / 5 / 2
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.array(image), jnp.array(text))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(gradient).all() and gradient.any() for gradient in gradients)


def test_the_source(follow, tmp_path):
    source = follow("### A source: captions in file names")["registry.py"].find_source("file_names")
    for split, names in (("train", "ba"), ("val", "c"), ("test", "d")):
        (tmp_path / split).mkdir()
        for name in names:
            (tmp_path / split / f"a {name}.jpg").write_bytes(jpeg())
    data = ml_collections.ConfigDict({"dir": str(tmp_path)})
    images = source.read(data).images
    assert [image.split for image in images] == ["train", "train", "val", "test"]
    assert [image.captions for image in images] == [["a a"], ["a b"], ["a c"], ["a d"]]
    assert [image.image_id for image in images] == [0, 1, 2, 3]
    (tmp_path / "train" / "a a.jpg").unlink()
    (tmp_path / "train" / "a b.jpg").unlink()
    with pytest.raises(UserError, match="no image of the split 'train'"):
        source.read(data)


@pytest.fixture
def electra(follow, monkeypatch):
    """Lets the package know ELECTRA, as the example says; returns a tiny one's config.json."""
    modules = follow("### An encoder: ELECTRA")
    monkeypatch.setitem(model_types.MODELS, "electra", modules["model_types.py"].MODELS["electra"])
    monkeypatch.setattr(pretrained_weights, "IGNORED", modules["layouts.py"].IGNORED)
    return {
        "model_type": "electra",
        "vocab_size": 30,
        "embedding_size": 6,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 9,
    }


def test_the_encoder_is_built_from_its_config(electra):
    module = build_from_architecture(electra, "config.json")
    ids = jnp.ones((2, 7), int)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    assert shapes["word_embedding"].shape == (30, 6)
    assert shapes["embedding_projection"]["kernel"].shape == (6, 8)


@pytest.mark.slow
def test_the_encoder_agrees_with_transformers(electra, tmp_path):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    theirs = transformers.ElectraForPreTraining(transformers.ElectraConfig(**electra)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.array([[5, 7, 9, 11], [6, 8, 0, 0]])
    mask = (ids != 0).astype(int)
    with torch.no_grad():
        expected = theirs.electra(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    module, params = fne_jax.load_pretrained(tmp_path / "theirs")
    assert type(module).__name__ == "Electra"
    hidden = module.apply({"params": params}, jnp.array(ids), jnp.array(mask)).last_hidden_state
    np.testing.assert_allclose(
        np.where(mask[..., None], hidden, 0), np.where(mask[..., None], expected, 0), atol=2e-6
    )
    fne_jax.save_pretrained(tmp_path / "ours", module, params)
    jax.tree.map(
        np.testing.assert_array_equal, params, fne_jax.load_pretrained(tmp_path / "ours")[1]
    )


QUESTIONS = [
    {"split": "val", "image_id": number % 7, "caption_id": number, "source_image_id": "",
     "caption": f'caption {number} "é"', "sample": "s", "image": f"images/{number % 7}.jpg"}
    for number in range(24)
]  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    """The path of a file of questions, as `review --questions` writes it, beside their images."""
    (tmp_path / "images").mkdir()
    for number in range(7):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg())
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def reply(content, *tokens):
    """Returns what a server says: a text, and for each token others with their probabilities."""
    said = [
        {"token": token, "top_logprobs": [
            {"token": name, "logprob": math.log(chance)} for name, chance in others.items()]}
        for token, others in tokens
    ]  # fmt: skip
    return {"choices": [{"message": {"content": content}, "logprobs": {"content": said}}]}


YES = reply("Yes", ("Yes", {"Yes": 0.5, " yes": 0.1, "No": 0.2, "Maybe": 0.2}))
REPLIES = {
    3: reply("**No**, there", ("**", {"**": 1.0}), ("No", {"No": 0.75, "yes": 0.25}), (",", {})),
    4: reply("Sure! Yes", ("Sure", {"Sure": 0.9, "Yes": 0.1}), ("!", {}), (" Yes", {"Yes": 1.0})),
    5: {"choices": [{"message": {"content": " No."}}]},  # of a server without log-probabilities
    6: {"choices": [{"message": {"content": ""}, "logprobs": None}]},
}


class Model(http.server.BaseHTTPRequestHandler):
    """Answers by the number of the caption; at first some slowly, wrongly or not at all."""

    asked: ClassVar = collections.Counter()
    broken = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        (image, text) = body["messages"][0]["content"]
        assert self.path == "/v1/chat/completions" and body["logprobs"] and body["model"] == "llm"
        assert image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
        number = int(re.search(r'caption (\d+) "é"', text["text"]).group(1))
        self.asked[number] += 1
        at_first = self.asked[number] == 1
        content = json.dumps(REPLIES.get(number, YES)).encode()
        if number == 8 and at_first:
            time.sleep(1.5)
        if number == 9 and at_first:
            content = b"<html>busy</html>"
        if number == 10 and at_first:
            content = b'{"choices": []}'
        failing = self.broken or (number == 11 and at_first) or number == 12
        with contextlib.suppress(BrokenPipeError):
            self.send_response(500 if failing else 200)
            self.send_header("content-length", str(len(content) + 9 * (number == 7 and at_first)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_the_judge_by_a_model(follow, questions, tmp_path, monkeypatch):
    judge = follow("### A model behind an OpenAI-compatible server", "verdicts.md")["judge.py"]
    monkeypatch.setattr(judge, "TIMEOUT", 1)
    monkeypatch.setattr(judge, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 32)
    answers = tmp_path / "answers.jsonl"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = questions, answers, f"http://127.0.0.1:{server.server_port}/v1", "llm"
        monkeypatch.setattr(Model, "broken", True)
        with pytest.raises(SystemExit, match="does not answer; run this again"):
            judge.main(*arguments)
        assert not answers.read_text()
        monkeypatch.setattr(Model, "broken", False)
        Model.asked.clear()
        questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[:15]))
        judge.main(*arguments)
        questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        judge.main(*arguments)
        server.shutdown()
    # What failed was asked again, but nothing that was answered before the first end.
    assert all(Model.asked[number] >= 2 for number in range(7, 12)) and Model.asked[12] == 8
    found = read_verdicts(answers)
    assert [one.caption_id for one in found] == [number for number in range(24) if number != 12]
    said = {one.caption_id: (one.verdict, one.probability) for one in found}
    assert said.pop(3) == ("no_match", pytest.approx(0.25))
    assert (said.pop(4), said.pop(5), said.pop(6)) == (
        ("unsure", None), ("no_match", None), ("unsure", None)
    )  # fmt: skip
    assert all(one == ("match", pytest.approx(0.75)) for one in said.values())
    assert {(one.reviewer, one.instructions) for one in found} == {("llm", judge.HASH)}


def test_label_studio(follow, questions):
    example = follow("### Label Studio", "verdicts.md")["label_studio.py"]
    tasks = json.loads(example.tasks(questions.read_text()))
    assert len(tasks) == 24 and tasks[0]["data"]["image"] == "/data/local-files/?d=images/0.jpg"
    view = xml.etree.ElementTree.fromstring(example.CONFIG)
    names = {one.get("name"): one for one in view if one.get("name")}
    assert names["answer"].get("toName") in names
    for one in (names["image"], names["caption"]):
        assert one.get("value").removeprefix("$") in tasks[0]["data"]

    def annotation(word, who, **more):
        result = {"from_name": "answer", "to_name": "image", "type": "choices"}
        part = result | {"value": {"choices": [word]}}
        time = "2026-11-22T22:16:08.728353Z"
        return {"completed_by": who, "updated_at": time, "was_cancelled": False} | {
            "result": [part]
        } | more  # fmt: skip

    words = [one.get("value") for one in names["answer"]]
    export = [
        {"id": number, "data": task["data"], "annotations": [annotation(word, 7)]}
        for number, (task, word) in enumerate(zip(tasks, words, strict=False))
    ]
    export[0]["annotations"] += [
        annotation("no", {"id": 8, "email": "bob@x.org"}),
        annotation("no", 9, was_cancelled=True),
        annotation("no", 9, result=[]),
    ]
    path = questions.parent / "answers.jsonl"
    path.write_text(example.answers(json.dumps(export)))
    assert [(one.caption_id, one.verdict, one.reviewer) for one in read_verdicts(path)] == [
        (0, "match", "annotator 7"), (0, "no_match", "bob@x.org"),
        (1, "no_match", "annotator 7"), (2, "unsure", "annotator 7"),
    ]  # fmt: skip
