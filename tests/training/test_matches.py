"""Runs that know of matches beyond the labels: what they draw, on which devices, and resumed."""

import dataclasses

import jax
import numpy as np
import pytest

from fne_jax.data import match_files
from fne_jax.data.batches import training_batches
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pair_columns import Pairs
from fne_jax.data.sources.registry import load_split
from fne_jax.data.verdicts import Verdict, write_verdicts
from fne_jax.errors import UserError
from fne_jax.evaluation.embedding_files import write_embeddings
from fne_jax.model import checkpoints
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.parallel import sharding
from fne_jax.planning.accounting import Account
from fne_jax.planning.program import compile_step
from fne_jax.planning.summary import SCOPES
from fne_jax.planning.topology import Topology
from fne_jax.training import dry_run, loop, setup
from fne_jax.training.matches import known_matches, read_matches, refuted_labels
from fne_jax.training.step_results import true_false_negative_rates
from fne_jax.training.timeline import Phase
from fne_jax.training.train_step import OBJECTIVE
from tests.support.fne import unit_rows
from tests.support.runs import mesh_of, new_state, stored_state, training_of
from tests.support.tiny import LinearTowers, smooth_config, tiny_config


@dataclasses.dataclass(frozen=True)
class MatrixTruth:
    """A truth that was made up, [images, pairs] bool."""

    truth: np.ndarray

    def matrix(self):
        return self.truth

    def packed(self):
        return np.packbits(self.truth.T, axis=1, bitorder="little")

    def is_true(self, caption, image):
        return self.truth[image, caption]

    def of_captions(self, rows):
        return MatrixTruth(self.truth[:, rows])


def split_with_truth(config):
    """Returns a split of 61 images, of which captions match a quarter beside their own."""
    train = load_split(config.data, 8, "train")
    images, pairs = len(train.image_id), len(train.captions)
    truth = np.random.default_rng(0).random((images, pairs)) < 0.25
    truth[train.caption_image, np.arange(pairs)] = True
    return dataclasses.replace(train, truth=MatrixTruth(truth))


def config_of(**fields):
    return smooth_config(data__synthetic__images=61, **fields)


def run_steps(config, mesh, steps=12):
    """Returns the states, the scalars and the drawn negatives of steps, and compilations."""
    train = split_with_truth(config)
    order = setup.batch_order(config, train)
    tokens = np.arange(len(train.captions), dtype=np.int32)[:, None] + np.arange(8, dtype=np.int32)
    training = training_of(config, LinearTowers(), mesh, order.steps_per_epoch)
    state, jitted = new_state(training), training.steps
    known, _ = known_matches(config, train, mesh)
    batches = training_batches(
        train,
        (tokens % 30, np.ones_like(tokens)),
        order.rows(range(steps)),
        TrainingImages(8, config.data.augmentation, config.seed),
    )
    results = []
    for step, batch in enumerate(batches):
        rows = sharding.to_devices(batch, mesh)
        state, scalars, negatives = jitted[training.timeline.phase(step)](state, rows, *known)
        result = jax.device_get((state.params, scalars, negatives))
        rates = {}
        if negatives:
            rates = true_false_negative_rates(train.truth, train.caption_image, result[2])
        results.append((*result, rates))
    return results, {phase: step._cache_size() for phase, step in jitted.items()}


@pytest.fixture(scope="module")
def plain():
    return run_steps(config_of(), mesh_of(1))


@pytest.fixture(scope="module")
def dropping():
    return run_steps(config_of(objective__oracle="drop"), mesh_of(1))


def test_no_step_draws_a_known_match(plain, dropping):
    for name in ("sampled_false_negative_rate", "hardest_false_negative_rate"):
        rates = [[rates[name] for *_, rates in run[0] if rates] for run in (plain, dropping)]
        assert len(rates[0]) == len(rates[1]) == 5
        assert min(rates[0]) > 0.05 and max(rates[1]) == 0


def test_the_warm_up_does_not_look_at_the_truth(plain, dropping):
    for (params, scalars, _, _), (others, other_scalars, _, _) in zip(
        plain[0][:7], dropping[0][:7], strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, (params, scalars), (others, other_scalars))
    assert plain[0][7][1]["loss"] != dropping[0][7][1]["loss"]


def listed(path, train, probability):
    """Writes a list of the unlabelled matches, by number as likely as given; 0 lists one not."""
    image, caption = np.nonzero(train.truth.matrix())
    other = train.caption_image[caption] != image
    pairs = Pairs(caption[other], image[other])
    pairs = pairs.replace(probability=1.0 * probability(np.arange(len(pairs))))
    pairs = pairs[pairs.probability > 0]
    match_files.write_match_list(path, train, pairs, {})
    return pairs


def thirds(number):
    return np.array([0.3, 0.6, 0.9])[number % 3]


ZONES = {"data__matches_positive": 0.9, "data__matches_negative": 0.5}


def test_a_list_of_all_matches_does_what_the_truth_does(dropping, tmp_path):
    zones = ZONES | {"data__matches_negative": 0.3}
    config = config_of(data__matches=str(tmp_path / "all.npz"), **zones)
    listed(tmp_path / "all.npz", split_with_truth(config), thirds)
    results, compilations = run_steps(config, mesh_of(1))
    for ours, theirs in zip(results, dropping[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours[:3], theirs[:3])
    assert compilations == dropping[1]


def test_listed_matches_are_positives_where_an_anchor_may_have_several(tmp_path):
    paths = {"data__matches": str(tmp_path / "all.npz")}
    fields = {"objective__name": "sigmoid"}
    listed(tmp_path / "all.npz", split_with_truth(config_of()), lambda number: number >= 0)
    ours = run_steps(config_of(**fields, **paths), mesh_of(1), 9)[0]
    theirs = run_steps(config_of(**fields, objective__oracle="positives"), mesh_of(1), 9)[0]
    without = run_steps(config_of(**fields), mesh_of(1), 9)[0]
    assert ours[8][1]["loss"] == theirs[8][1]["loss"] != without[8][1]["loss"]


def test_probabilities_tell_positives_what_is_left_out_and_negatives(tmp_path, caplog):
    config = config_of(data__matches=str(tmp_path / "all.npz"), **ZONES)
    train = split_with_truth(config)
    pairs = listed(tmp_path / "all.npz", train, thirds)
    with caplog.at_level("INFO"):
        (table, _), _ = known_matches(config, train, mesh_of(1))
    weight = np.zeros(train.truth.matrix().shape)
    weight[train.caption_image, np.arange(len(train.captions))] = 1
    weight[pairs.image, pairs.caption] = np.where(pairs.probability > 0.7, 0.9, 0)
    everywhere = np.indices(weight.shape).astype(np.int32)
    np.testing.assert_allclose(table.probability(*everywhere) / 255, weight, atol=0.002)
    out = weight > 0
    out[pairs.image, pairs.caption] = pairs.probability > 0.5
    np.testing.assert_array_equal(table.match(*everywhere), out)
    each = [np.sum(pairs.probability == one) for one in (0.9, 0.6, 0.3)]
    assert "{} of them matches, {} neither these nor negatives, {} neg".format(*each) in caplog.text


def verdicts_on(train, answers):
    """Returns verdicts on rows of captions and images: (caption, image, reviewer, word) each."""
    return [
        Verdict(
            split="train",
            image_id=int(train.image_id[image]),
            caption_id=int(train.caption_id[caption]),
            source_image_id=train.source_image_id[image],
            caption=train.captions[caption],
            verdict=word,
            reviewer=reviewer,
        )
        for caption, image, reviewer, word in answers
    ]


def test_verdicts_are_a_list_of_those_that_most_call_a_match(tmp_path):
    train = split_with_truth(config_of())
    answers = [(0, 9, "a", "match"), (0, 9, "b", "match"), (0, 9, "c", "no_match")]
    answers += [(3, 5, "a", "unsure"), (4, 7, "a", "no_match"), (61, 2, "a", "match")]
    for name in ("verdicts.csv", "verdicts.jsonl"):
        write_verdicts(tmp_path / name, verdicts_on(train, answers))
        pairs = read_matches(str(tmp_path / name), train)
        assert list(zip(pairs.caption, pairs.image, strict=True)) == [(0, 9), (61, 2)]


def test_refuted_labels_are_never_trained_on(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "verdicts.csv"
    config = config_of(data__refuted=str(path))
    train = split_with_truth(config)
    # Image 3 has no other captions; of caption 8 two doubt, and 9 and 11 are confirmed.
    answers = [(6, 3, "a", "no_match"), (7, 3, "a", "no_match"), (8, 4, "a", "no_match")]
    answers += [(8, 4, "b", "match"), (9, 4, "a", "match"), (5, 9, "a", "no_match")]
    answers += [(11, 5, "a", "no_match"), (11, 5, "b", "match"), (11, 5, "c", "match")]
    write_verdicts(path, verdicts_on(train, answers))
    refuted = refuted_labels(config, train)
    assert refuted.rows() == [(6, 3), (7, 3)]
    assert "2 captions are left out of training, and 1 images that have no other" in caplog.text
    order = setup.batch_order(config, train, refuted.caption)
    batches = training_batches(
        train, (np.ones((122, 8), np.int32),) * 2, order.rows(range(3 * order.steps_per_epoch)),
        TrainingImages(8, config.data.augmentation, config.seed),
    )  # fmt: skip
    seen = [(batch["pair_id"], batch["image_id"]) for batch in batches]
    pairs, images = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert set(range(122)) - set(pairs.tolist()) == {6, 7} and train.image_id[3] not in images

    write_verdicts(path, verdicts_on(train, answers[2:4]))
    with pytest.raises(UserError, match=r"verdicts.csv: refutes no caption of its own image"):
        refuted_labels(config, train)
    others = dataclasses.replace(train, captions=[f"not {one}" for one in train.captions])
    write_verdicts(path, verdicts_on(others, answers))
    with pytest.raises(UserError, match="none of its 9 verdicts is of this data: caption 6 was 'n"):
        refuted_labels(config, train)


def test_a_run_goes_on_with_its_own_files_alone(monkeypatch, tmp_path):
    path, workdir = tmp_path / "list.npz", tmp_path / "run"
    refuted = tmp_path / "refuted.csv"
    config = config_of(data__matches=str(path), data__refuted=str(refuted))
    train = split_with_truth(config)
    wrong = verdicts_on(train, [(row, row // 2, "a", "no_match") for row in range(4)])
    monkeypatch.setattr(setup, "load_splits", lambda *arguments: [train] * 3)
    listed(path, train, lambda number: number % 2 == 0)
    write_verdicts(refuted, wrong)
    loop.train_and_evaluate(config, workdir, module=LinearTowers(), warmup_only=True)
    listed(path, train, lambda number: number % 3 == 0)
    with pytest.raises(UserError, match=r"run on other data: its list of matches had .*checksum"):
        loop.train_and_evaluate(config, workdir, module=LinearTowers())
    listed(path, train, lambda number: number % 2 == 0)
    write_verdicts(refuted, wrong[1:])
    with pytest.raises(UserError, match=r"list of refuted pairs had 4 pairs of 2 images .*has 3"):
        loop.train_and_evaluate(config, workdir, module=LinearTowers())
    write_verdicts(refuted, wrong)
    loop.train_and_evaluate(config, workdir, module=LinearTowers())


def test_a_list_and_the_truth_are_rivals(tmp_path):
    with pytest.raises(UserError, match=r"config.data.matches is .*a.npz.*oracle=drop takes"):
        config_of(objective__oracle="drop", data__matches=str(tmp_path / "a.npz"))


def test_a_list_that_is_not_there_is_told_before_anything_is_written(tmp_path):
    config = tiny_config(data__matches=str(tmp_path / "a.npz"))
    for start in (loop.train_and_evaluate, dry_run.describe):
        with pytest.raises(UserError, match=r"a.npz: there is no such file"):
            start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_recompiles(dropping):
    assert dropping[1] == {Phase.WARMUP: 0, Phase.WARMUP_FILLING: 1, Phase.FNE: 1}


LISTED = {"fne__posterior": "listed"}
SEVERAL = {"objective__name": "multi_positive", **ZONES}
TAUGHT = {"objective__guide_margin": 0.2, "objective__teacher": "there"}


def with_files(folder, fields):
    """Returns fields of a config with the list or the teacher's embeddings that they ask for."""
    train = split_with_truth(config_of())
    if "objective__teacher" not in fields:
        listed(folder / "all.npz", train, thirds)
        return {**fields, "data__matches": str(folder / "all.npz")}
    rng = np.random.default_rng(0)
    emb = unit_rows(rng, len(train.image_id), 6), unit_rows(rng, len(train.captions), 6)
    rows = train.caption_image, train.image_id, train.caption_id
    write_embeddings(folder, EmbeddedSplit(*emb, *rows))
    return {**fields, "objective__teacher": str(folder)}


@pytest.mark.parametrize(
    "fields", [None, LISTED, SEVERAL, pytest.param(TAUGHT, marks=pytest.mark.slow)]
)
def test_eight_devices_do_what_one_does(plain, dropping, fields, tmp_path):
    one = dropping
    if fields is None:
        fields = {"objective__oracle": "drop"}
    else:
        fields = with_files(tmp_path, fields)
        one = run_steps(config_of(**fields), mesh_of(1))
        assert one[1] == dropping[1], "steps are compiled again"
        assert one[0][7][1]["loss"] != plain[0][7][1]["loss"]
    eight = run_steps(config_of(**fields), mesh_of(4, 2))
    for ours, theirs in zip(eight[0], one[0], strict=True):
        np.testing.assert_allclose(ours[1]["loss"], theirs[1]["loss"], rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, ours[2], theirs[2])


@pytest.mark.parametrize("by_list", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_devices_look_up_their_own_anchors_only(by_list, tmp_path):
    fields = with_files(tmp_path, LISTED) if by_list else {"objective__oracle": "drop"}
    config = config_of(**fields, queue_size=4000, fne__start_epoch=0.0)
    mesh, train = mesh_of(2, 4), split_with_truth(config)
    training = training_of(config, LinearTowers(), mesh, 7)
    batch = {
        "image": np.zeros((16, 8, 8, 3), np.uint8),
        "input_ids": np.ones((16, 8), np.int32),
        "attention_mask": np.ones((16, 8), np.int32),
        "image_id": np.arange(16, dtype=np.int32),
        "pair_id": np.arange(16, dtype=np.int32),
    }
    rows = sharding.to_devices(batch, mesh)
    known, _ = known_matches(config, train, mesh)
    step = training.steps[Phase.FNE].lower(new_state(training), rows, *known)
    found = Account(step.compile().as_text(), SCOPES).collectives
    largest = max(one.bytes for one in found if one.scope == OBJECTIVE)
    assert largest < config.queue_size, "what is known of the queue moves between devices"


@pytest.mark.slow
def test_a_run_that_is_resumed_is_the_same_to_the_bit(monkeypatch, tmp_path):
    config = config_of(objective__oracle="drop")
    monkeypatch.setattr(setup, "load_splits", lambda *arguments: [split_with_truth(config)] * 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train_and_evaluate(config, whole, module=LinearTowers())
    loop.train_and_evaluate(config, parts, module=LinearTowers(), warmup_only=True)
    loop.train_and_evaluate(config, parts, module=LinearTowers())
    states = [stored_state(folder, module=LinearTowers()) for folder in (whole, parts)]
    assert int(states[0].step) == 14
    assert len({str(checkpoints.fingerprints(state.stored())) for state in states}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective__oracle": "drop"}, "oracle is 'drop', but .* config.data.source=synthetic"),
        (LISTED, "posterior is 'listed', but config.data.matches names no list"),
        (TAUGHT, "config.objective.teacher: --embeddings=there is not a folder"),
    ],
)
def test_what_nobody_knows_is_told_before_anything_is_written(fields, message, tmp_path):
    config = tiny_config(**fields)
    for start in (loop.train_and_evaluate, dry_run.describe):
        with pytest.raises(UserError, match=message):
            start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_knows_of_no_matches():
    topology = Topology("cpu", jax.devices()[:1], chip=None)
    with pytest.raises(UserError, match=r"config.objective.oracle is 'drop', .*: without data"):
        compile_step(tiny_config(objective__oracle="drop"), topology, 10)
