"""Where arrays live on the mesh, what moves between devices, and batches in parts."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fne_jax
from fne_jax import configuration
from fne_jax.encoders.dual_encoder import pool_mean_to_longest
from fne_jax.encoders.towers import build_dual_encoder
from fne_jax.errors import UserError
from fne_jax.model.model import build_model, build_module
from fne_jax.parallel import sharding
from fne_jax.planning.accounting import Account
from fne_jax.planning.summary import SCOPES
from fne_jax.training.encoder_passes import MicroBatches
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import abstract_state, first_state
from tests.support.runs import mesh_of, new_state, training_of
from tests.support.tiny import LinearTowers, tiny_config


def test_meshes_are_filled_and_checked():
    shapes = {
        (data, fsdp): tuple(sharding.create_mesh(data, fsdp).shape.values())
        for data, fsdp in ((-1, 1), (-1, 4), (2, -1), (4, 2))
    }
    assert shapes == {(-1, 1): (8, 1), (-1, 4): (2, 4), (2, -1): (2, 4), (4, 2): (4, 2)}
    for data, fsdp in ((-1, 3), (2, 2), (16, -1)):
        with pytest.raises(UserError, match=f"data={data} and fsdp={fsdp}, which do not .* 8 dev"):
            sharding.create_mesh(data, fsdp)


BOTH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((768, 3072), (BOTH, None)),
        ((12, 3072, 768), (None, BOTH, None)),
        ((30522, 768), (None, BOTH)),  # 8 does not divide the vocabulary
        ((30522, 36), ("data", "fsdp")),  # nor 36, but 2 and 4 divide one each
        ((30521, 36), (None, "fsdp")),
        ((30521, 767), ()),
        ((12, 3072), ()),  # stacked biases are small
        ((), ()),
    ],
)
def test_parameters_are_split_into_as_many_parts_as_divide_them(shape, spec):
    found = sharding.parameter_sharding(mesh_of(2, 4), shape).spec
    assert found == PartitionSpec(*spec)
    assert sharding.parameter_sharding(mesh_of(1), shape).spec == PartitionSpec()


def test_pretrained_weights_are_placed_in_parts(golden, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    config = tiny_config(data__tokenizer="x")
    for tower, folder in (("image", "vit"), ("text", "bert")):
        config.encoder[tower].pretrained = str(golden / "encoders" / folder)
    config.encoder.image.image_size = 32
    config, architectures = configuration.resolve(config)
    module = build_module(config, architectures, 50)
    model = build_model(config, architectures, None, mesh_of(2, 4), module=module)
    schedule = learning_rate_schedule(config.optimizer, 3, 6)
    like = abstract_state(model, schedule)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    assert places.queue.image.spec == places.step.spec == PartitionSpec()
    assert {leaf.spec for leaf in jax.tree.leaves(places.params)} > {PartitionSpec()}
    state = first_state(model, like)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    for tower, folder in (("image", "vit"), ("text", "bert")):
        source = golden / "encoders" / folder
        expected = fne_jax.load_pretrained(
            source, **({"image_size": 32} if tower == "image" else {})
        )
        jax.tree.map(np.testing.assert_array_equal, dict(state.params[tower]), expected[1])


def lowered_split_step(module=None, **fields):
    """Returns a step over 2 x 4 devices, not compiled yet, with a state and a batch."""
    config = tiny_config(queue_size=384, fne__start_epoch=0.0, **fields)
    mesh = mesh_of(2, 4)
    module = module or build_dual_encoder(config.encoder, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
        training = training_of(config, module, mesh, 10)
        state = new_state(training)
        batch = {
            "image": np.zeros((16, 8, 8, 3), np.uint8),
            "input_ids": np.ones((16, 8), np.int32),
            "attention_mask": np.ones((16, 8), np.int32),
            "image_id": np.arange(16, dtype=np.int32),
            "pair_id": np.arange(16, dtype=np.int32),
        }
        batch = sharding.to_devices(batch, mesh)
        return training.steps[Phase.FNE].lower(state, batch), state, batch


def moved(text):
    """Returns the bytes that a program moves between devices, by kind and scope, and the most."""
    total, largest = collections.Counter(), collections.Counter()
    for one in Account(text, SCOPES).collectives:
        total[one.kind, one.scope] += one.bytes * one.count
        largest[one.kind, one.scope] = max(largest[one.kind, one.scope], one.bytes)
    return total, largest


@pytest.fixture(scope="module")
def split_step():
    """A step over 2 x 4 devices: its program, its state before, donated, and after."""
    lowered, state, batch = lowered_split_step()
    compiled = lowered.compile()
    after, _, _ = compiled(state, batch)
    return compiled, state, after


def test_the_state_is_donated_and_keeps_its_places(split_step):
    compiled, before, after = split_step
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    places = [[leaf.sharding for leaf in jax.tree.leaves(state)] for state in (before, after)]
    assert places[0] == places[1]
    # No second copy: each device writes the new state where the old one was.
    on_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
    assert compiled.memory_analysis().alias_size_in_bytes == on_device


def test_each_device_keeps_an_eighth_of_what_is_large(split_step):
    *_, state = split_step
    for field in set(sharding.SHARDED_FIELDS) - {"frozen_params"}:  # there are none here
        leaves = [leaf for leaf in jax.tree.leaves(getattr(state, field)) if leaf.size >= 64]
        assert len(leaves) >= 16
        for leaf in leaves:
            parts = {shard.data.size for shard in leaf.addressable_shards}
            # 5 and 17 positions, 30 and 2 rows of tables: 8 divides the width of 16.
            assert parts == {leaf.size // 8}, leaf.shape


def test_only_intended_collectives_are_compiled(split_step):
    compiled, _, state = split_step
    total, largest = moved(compiled.as_text())
    leaves = jax.tree.leaves(state.params)
    split = sum(leaf.nbytes for leaf in leaves if leaf.sharding.spec != PartitionSpec())
    assert set(total) == {
        ("all-gather", "online_encoders"),
        ("all-gather", "momentum_encoders"),
        ("reduce-scatter", "online_encoders"),
        ("all-reduce", "online_encoders"),
        ("all-reduce", "optimizer"),
        ("all-gather", "queue"),
        ("all-gather", "objective"),
        ("all-reduce", "objective"),
        ("all-to-all", "objective"),
    }
    # Split parameters are gathered once for either encoder; gradients are summed once.
    assert total["all-gather", "online_encoders"] == split
    # The momentum embeddings are gathered for the queue; jax 0.12 counts that to the encoders.
    batch, dim, queue, block = 16, 16, 384, 16
    of_encoders = total["all-gather", "momentum_encoders"]
    assert of_encoders in (split, split + 2 * batch * dim * 4)
    assert total["reduce-scatter", "online_encoders"] == split
    small = sum(leaf.nbytes for leaf in leaves) - split
    assert total["all-reduce", "online_encoders"] == small
    assert total["all-reduce", "optimizer"] <= 4 * len(leaves)  # norms of the gradients
    # The strategy moves embeddings of the batch and rows of its similarities, never the memory.
    assert largest["all-gather", "queue"] <= largest["all-gather", "objective"] == batch * dim * 4
    assert largest["all-reduce", "objective"] <= 2 * batch * 4 + 4
    # Partial maxima of the columns of the batch's own similarities; and the two tables of either
    # direction, which each device makes of its eighth of the queue for the anchors of all.
    tables = 2 * 2 * batch * (queue // block) * 4
    assert total["all-to-all", "objective"] == (batch * batch * 4 + tables) / 8


@pytest.mark.slow
def test_micro_batches_move_what_a_whole_batch_does():
    programs = (lowered_split_step(LinearTowers(), micro_batches=n)[0].compile() for n in (1, 2))
    whole, parts = (moved(program.as_text())[0] for program in programs)
    assert whole["reduce-scatter", "online_encoders"] > 0
    for kind, scope in whole.keys() | parts.keys():
        if scope.endswith("encoders"):
            assert parts[kind, scope] == whole[kind, scope], (kind, scope)


def test_kernels_are_gathered_in_the_compute_dtype_and_their_gradients_summed_in_float32():
    texts = {
        dtype: lowered_split_step(encoder__compute_dtype=dtype)[0].as_text()
        for dtype in ("float32", "bfloat16")
    }
    assert "bf16" not in texts["float32"]
    # Asked of what is handed to the compiler: that for CPUs moves float32 in any case.
    text = texts["bfloat16"]
    gathers = [line for line in text.splitlines() if '"stablehlo.all_gather"' in line]
    # The kernels of both towers' layer, four of attention and two of the MLP: once for the online,
    # once for the momentum encoders.
    assert sum("bf16" in line for line in gathers) == 2 * 12
    pattern = r'"stablehlo\.(reduce_scatter|all_reduce)".*\n *\^bb0\(%\w+: tensor<(\w+)>'
    counts = collections.Counter(re.findall(pattern, text))
    assert counts["reduce_scatter", "f32"] >= 12
    assert {dtype for _, dtype in counts} == {"f32"}


def test_rows_on_several_devices_count_to_the_longest_text_of_all():
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(16, 7, 3)), jnp.float32)
    lengths = np.array([2, 3, 1, 2, 6] + [2] * 11)
    mask = jnp.asarray(np.arange(7)[None] < lengths[:, None], jnp.int32)
    layout = sharding.StepLayout(mesh_of(2, 4))

    @jax.jit
    def pooled(hidden, mask):
        return layout.on_rows(
            lambda params, rows, rng: pool_mean_to_longest(*rows), {}, (hidden, mask), None
        )

    np.testing.assert_allclose(pooled(hidden, mask), hidden[:, :6].mean(axis=1), rtol=1e-6)


def embed_with_dropout(params, inputs, rng):
    keep = 1.0 if rng is None else jax.random.bernoulli(rng, 0.5, (len(inputs), 5))
    hidden = jnp.tanh(inputs @ params["image"]) * keep
    return hidden, jnp.sin(inputs @ params["text"])


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
    params = {n: jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for n in ("image", "text")}
    key, layout = jax.random.key(1), sharding.StepLayout(mesh_of(1))
    parts = [inputs[k::3] for k in range(3)]

    def loss_fn(image, text, learned=None):  # every pair of rows takes part
        return jnp.square(image @ text.T - jnp.eye(12)).sum(), image

    def plain(params):
        pairs = [
            embed_with_dropout(params, part, part_key)
            for part, part_key in zip(parts, jax.random.split(key, 3), strict=True)
        ]
        image, text = (jnp.stack(x, axis=1).reshape(12, 5) for x in zip(*pairs, strict=True))
        return loss_fn(image, text)

    expected = jax.value_and_grad(plain, has_aux=True)(params)
    passes = MicroBatches(layout, 3)

    def embed(params, inputs, key):
        trained, frozen = params
        return embed_with_dropout(trained | frozen, inputs, key)

    trained, frozen = {"text": params["text"]}, {"image": params["image"]}
    found = passes.loss_and_gradients(embed, params, {}, inputs, key, loss_fn)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected
    )
    _, of_trained = passes.loss_and_gradients(embed, trained, frozen, inputs, key, loss_fn)
    np.testing.assert_allclose(of_trained.pop("text"), found[1]["text"], rtol=1e-6)
    assert not of_trained
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        passes.embed(embed_with_dropout, params, inputs),
        embed_with_dropout(params, inputs, None),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh__fsdp": 0}, "config.mesh.fsdp is 0; expected a whole number from 1 to .*, or -1"),
        ({"micro_batches": 0}, "config.micro_batches is 0"),
        ({"micro_batches": 3}, "config.micro_batches=3 does not divide"),
        (
            {"micro_batches": 2, "encoder__text__training_pooling": "mean_to_longest"},
            "mean_to_longest, looks at the whole batch",
        ),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        configuration.validate(tiny_config(**fields))
