"""Work counted in small programs whose figures are known by hand, and the command on top of it."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fne_jax import configuration, plan
from fne_jax.errors import UserError
from fne_jax.model.model import build_module
from fne_jax.planning import program, published, summary, topology
from fne_jax.planning.accounting import Account, Collective
from fne_jax.planning.useful import matrix_flops, useful_flops
from tests.support import TOP
from tests.support.runs import mesh_of
from tests.support.tiny import tiny_config

# As XLA prints programs for TPUs: no trip counts, products as convolutions, S(1) for memory on the
# chip, and a collective that overlaps with others written into each of their fusions.
TPU_PROGRAM = """
HloModule small, is_scheduled=true

%body (arg: (s32[], f32[8,16], f32[3,16,16])) -> (s32[], f32[8,16], f32[3,16,16]) {
  %arg = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[3,16,16]{2,1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %stack = f32[3,16,16]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%count, %one)
  %y = f32[8,16]{1,0:T(8,128)} fusion(%x, %stack, %count), kind=kOutput, calls=%layer, \
metadata={op_name="jit(step)/encoders/while/body/dot_general"}
  ROOT %out = (s32[], f32[8,16], f32[3,16,16]) tuple(%next, %y, %stack)
}

%layer (p0: f32[8,16], p1: f32[3,16,16], p2: s32[]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %p1 = f32[3,16,16]{2,1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,16,16]{2,1,0:T(8,128)} dynamic-slice(%p1, %p2, %zero, /*index=3*/%zero), \
dynamic_slice_sizes={1,16,16}
  %w = f32[16,16]{1,0:T(8,128)} bitcast(%slice)
  ROOT %product = f32[8,16]{1,0:T(8,128)} convolution(%p0, %w), dim_labels=bf_io->bf, \
operand_precision={highest,highest}
}

%condition (arg.1: (s32[], f32[8,16], f32[3,16,16])) -> pred[] {
  %arg.1 = (s32[], f32[8,16], f32[3,16,16]) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

%gather_a (p: f32[4,16]) -> f32[8,16] {
  %p = f32[4,16]{1,0} parameter(0)
  ROOT %gathered = f32[8,16]{1,0} all-gather(%p), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/encoders/objective/dot_general"}
}

%gather_b (p.1: f32[4,16]) -> f32[8,16] {
  %p.1 = f32[4,16]{1,0} parameter(0)
  ROOT %gathered.1 = f32[8,16]{1,0} all-gather(%p.1), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/encoders/objective/dot_general"}
}

ENTRY %main (a: f32[8,16], b: f32[3,16,16], c: f32[4,16], q: f32[5,4,6], k: f32[5,7,6]) -> \
f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[3,16,16]{2,1,0} parameter(1)
  %c = f32[4,16]{1,0:T(8,128)S(1)} parameter(2)
  %q = f32[5,4,6]{2,1,0} parameter(3)
  %k = f32[5,7,6]{2,1,0} parameter(4)
  %start = s32[] constant(0)
  %state = (s32[], f32[8,16], f32[3,16,16]) tuple(%start, %a, %b)
  %loop = (s32[], f32[8,16], f32[3,16,16]) while(%state), condition=%condition, body=%body
  %first = f32[8,16]{1,0:S(1)} fusion(%c), kind=kLoop, calls=%gather_a, \
metadata={op_name="jit(step)/encoders/objective/dot_general"}
  %second = f32[8,16]{1,0:S(1)} fusion(%c), kind=kLoop, calls=%gather_b, \
metadata={op_name="jit(step)/encoders/objective/dot_general"}
  %batched = f32[5,4,7]{2,1,0} convolution(%q, %k), window={size=5 stride=4 lhs_dilate=5}, \
dim_labels=0bf_0oi->0bf, metadata={op_name="jit(step)/encoders/bqd,bkd->bqk"}
  ROOT %end = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


# A gather that overlaps with two sums: its parts are written into both, which hand on the buffer
# that it fills; another of the same channel and shape does not overlap.
OVERLAPPING_PROGRAM = """HloModule overlapping

%start (p: f32[4,16]) -> (f32[4,16], f32[8,16]) {
  %p = f32[4,16]{1,0} parameter(0)
  %opened = f32[8,16]{1,0} custom-call(%p), custom_call_target="AsyncCollectiveStart"
  ROOT %both = (f32[4,16]{1,0}, f32[8,16]{1,0}) tuple(%p, %opened)
}

%overlap (p0: f32[4,16], p1: f32[8,16], p2: f32[2,2]) -> (f32[2,2], f32[4,16], f32[8,16]) {
  %p0 = f32[4,16]{1,0} parameter(0)
  %p1 = f32[8,16]{1,0} parameter(1)
  %p2 = f32[2,2]{1,0} parameter(2)
  %part = f32[8,16]{1,0} all-gather(%p0), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="0"}
  %sum = f32[2,2]{1,0} add(%p2, %p2)
  ROOT %all = (f32[2,2]{1,0}, f32[4,16]{1,0}, f32[8,16]{1,0}) tuple(%sum, %p0, %part)
}

ENTRY %main (a: f32[4,16], b: f32[2,2]) -> f32[2,2] {
  %a = f32[4,16]{1,0} parameter(0)
  %b = f32[2,2]{1,0} parameter(1)
  %begun = (f32[4,16]{1,0}, f32[8,16]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %shard = f32[4,16]{1,0} get-tuple-element(%begun), index=0
  %whole = f32[8,16]{1,0} get-tuple-element(%begun), index=1
  %one = (f32[2,2]{1,0}, f32[4,16]{1,0}, f32[8,16]{1,0}) fusion(%shard, %whole, %b), \
kind=kOutput, calls=%overlap
  %c = f32[2,2]{1,0} get-tuple-element(%one), index=0
  %two = (f32[2,2]{1,0}, f32[4,16]{1,0}, f32[8,16]{1,0}) fusion(%shard, %whole, %c), \
kind=kOutput, calls=%overlap
  %other = f32[8,16]{1,0} all-gather(%a), channel_id=1, dimensions={0}
  ROOT %d = f32[2,2]{1,0} get-tuple-element(%two), index=0
}
"""


def test_a_gather_that_overlaps_with_others_is_counted_once():
    found = Account(OVERLAPPING_PROGRAM, ("encoders",))
    assert [(one.kind, one.bytes) for one in found.collectives] == [("all-gather", 8 * 16 * 4)] * 2
    gathers = 2 * (4 * 16 + 8 * 16) * 4
    # The start passes the shard on: it is neither read nor written there twice.
    assert found.work["other"].bytes == gathers + 4 * 16 * 4 + 2 * (2 * 2 * 2 * 4)


def test_a_tpu_program_is_counted_as_by_hand():
    found = Account(TPU_PROGRAM, ("encoders", "objective"))
    layers, batched = 3 * (2 * 8 * 16 * 16), 2 * 5 * 4 * 7 * 6
    encoders = found.work["encoders"]
    assert encoders.flops == layers + batched + 3  # and the counter
    assert encoders.matrix_passes == 6 * layers + batched
    # Each layer reads and writes a row of activations, and reads its own slice of the stack.
    layer = 4 * (8 * 16 + 16 * 16 + 8 * 16 + 1)
    counter = 4 * 3
    assert encoders.bytes == 3 * (layer + counter) + 4 * (5 * 4 * 6 + 5 * 7 * 6 + 5 * 4 * 7)
    assert found.work["objective"].flops == found.work["objective"].bytes == 0
    assert found.collectives == [Collective("all-gather", "objective", 8 * 16 * 4, 1)]


def test_arrays_of_tpus_are_padded_to_tiles():
    text = """
HloModule tiles

ENTRY %main (a: bf16[3,5,64], b: bf16[3,5,64]) -> f32[300] {
  %a = bf16[3,5,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[3,5,64]{1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = bf16[3,5,64]{1,2,0:T(8,128)(2,1)} copy(%a)
  ROOT %d = f32[300]{0:T(256)} custom-call(%c, %b), custom_call_target="tpu_custom_call"
}
"""
    size = 2 * 3 * 5 * 64
    assert Account(text, ("x",)).work["other"].bytes == 3 * size + 4 * 300
    padded = Account(text, ("x",), in_tiles=True).work["other"]
    # [3, 8, 128]; then the 5 lie closest together, and there is [3, 64, 128].
    assert padded.bytes == 2 * 3 * 8 * 128 + 2 * (2 * 3 * 64 * 128) + 4 * 512
    plain = Account(text, ("x",)).work["other"]
    assert padded.flops == plain.flops


def test_loops_count_as_often_as_they_run():
    @jax.jit
    def step(x, weights):
        with jax.named_scope("layers"):
            x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, weights)
        with jax.named_scope("head"):
            return x @ weights[0]

    text = step.lower(jnp.ones((32, 48)), jnp.ones((7, 48, 48))).compile().as_text()
    work = Account(text, ("layers", "head")).work
    assert work["layers"].matrix_passes == 7 * 2 * 32 * 48 * 48
    assert work["head"].matrix_passes == 2 * 32 * 48 * 48
    # At least: the stack once and the activations in and out of every layer.
    least = 4 * (7 * 48 * 48 + 7 * 2 * 32 * 48)
    assert least <= work["layers"].bytes <= 3 * least


def test_gradients_keep_the_scope_of_what_they_are_of():
    def loss(w, x):
        with jax.named_scope("inner"):
            y = jnp.tanh(x @ w)
        return jnp.square(y).sum()

    step = jax.jit(lambda w, x: jax.named_scope("outer")(jax.grad(loss))(w, x))
    text = step.lower(jnp.ones((24, 40)), jnp.ones((16, 24))).compile().as_text()
    work = Account(text, ("outer", "inner")).work
    # Forward, and the gradient of the weights.
    assert work["inner"].matrix_passes == 2 * 2 * 16 * 24 * 40


def test_useful_operations_are_those_of_the_trace():
    x, stack, kernel = jnp.ones((6, 5)), jnp.ones((3, 5, 5)), jnp.ones((2, 2, 3, 7))

    @jax.checkpoint
    def layer(x, w):
        return jax.nn.relu(x @ w), None  # its derivative is a function of its own

    def function(x, stack, image):
        x, _ = jax.lax.scan(layer, x, stack)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ stack[0], lambda x: x, x)
        patches = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.einsum("bik,bjk->bij", x[None], x[None]), patches

    products = 4 * (2 * 6 * 5 * 5) + 2 * 6 * 6 * 5
    patches = 2 * (3 * 2) * 7 * (2 * 2 * 3)  # of 6 x 4 pixels with three channels
    image = jax.ShapeDtypeStruct((1, 6, 4, 3), jnp.float32)
    assert matrix_flops(jax.jit(function), x, stack, image) == products + patches
    with pytest.raises(ValueError, match="the operations of a while are not known"):
        matrix_flops(lambda x: jax.lax.while_loop(jnp.any, lambda x: x - 1, x), x[0, 0])


def test_collectives_are_counted_in_bytes():
    mesh = mesh_of(8)

    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    def total(x):
        with jax.named_scope("sum"):
            return jax.lax.psum(x, "data")

    text = jax.jit(total).lower(jnp.ones((16, 5))).compile().as_text()
    (found,) = Account(text, ("sum",)).collectives
    assert found == Collective("all-reduce", "sum", 2 * 5 * 4, 1)


# As for GPUs: what starts a collective lists what it takes beside what it gives, but for a sum.
GPU_COLLECTIVES = """
HloModule collectives, is_scheduled=true

ENTRY %main (a: f32[16,8], b: s32[16]) -> f32[4,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %b = s32[16]{0} parameter(1)
  %gather = ((f32[16,8]{1,0}, s32[16]{0}), (f32[64,8]{1,0}, s32[64]{0})) all-gather-start(%a, %b), \
channel_id=1, dimensions={0}, metadata={op_name="jit(step)/queue/all_gather"}
  %gathered = (f32[64,8]{1,0}, s32[64]{0}) all-gather-done(%gather)
  %reduce = f32[16,8]{1,0} all-reduce-start(%a), channel_id=2, to_apply=%add, \
metadata={op_name="jit(step)/encoders/psum"}
  %reduced = f32[16,8]{1,0} all-reduce-done(%reduce), metadata={op_name="jit(step)/encoders/psum"}
  %scatter = ((f32[16,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%reduced), channel_id=3, \
dimensions={0}, to_apply=%add, metadata={op_name="jit(step)/optimizer/reduce_scatter"}
  ROOT %scattered = f32[4,8]{1,0} reduce-scatter-done(%scatter)
}
"""


def test_collectives_of_gpus():
    found = Account(GPU_COLLECTIVES, ("queue", "encoders", "optimizer"))
    row = 8 * 4
    kinds = [(one.kind, one.scope, one.bytes) for one in found.collectives]
    gathered = 64 * row + 64 * 4
    assert kinds[-2:] == [
        ("all-reduce", "encoders", 16 * row),
        ("reduce-scatter", "optimizer", 16 * row),
    ]
    assert {one[0] for one in kinds[:-2]} == {"all-gather"}
    assert sum(one[2] for one in kinds[:-2]) == gathered
    # Each reads what it takes and writes what it gives; waiting for them is free.
    assert found.work["queue"].bytes == 16 * row + 16 * 4 + gathered
    assert found.work["encoders"].bytes == 2 * 16 * row
    assert found.work["optimizer"].bytes == 16 * row + 4 * row


def test_a_loop_of_unknown_length_is_an_error():
    text = TPU_PROGRAM.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="loop: the loop's trip count cannot be read"):
        Account(text, ("encoders",))


@pytest.fixture(scope="module")
def tiny_plan():
    config = tiny_config(encoder__scan_layers=True)
    machine = topology.find("cpu:4")
    compiled = program.compile_step(config, machine, 3)
    return config, compiled, summary.summarize(compiled, machine, 48, 3)


def test_the_plan_of_a_tiny_run(tiny_plan):
    config, compiled, found = tiny_plan
    assert found["fits"] and found["devices"] == 4 and found["mesh"] == {"data": 4, "fsdp": 1}
    sizes = found["bytes_per_chip"]
    assert sizes["parameters"] == sizes["momentum"]
    # Two moments and a few counters; two sides, two ids and a pointer; a quarter of the batch.
    assert 2 * sizes["parameters"] <= sizes["adam"] <= 2 * sizes["parameters"] + 16
    assert sizes["queue"] == 40 * (2 * 16 + 2) * 4 + 4
    assert sizes["batch"] == (16 // 4) * (8 * 8 * 3 + 2 * 8 * 4 + 2 * 4)
    assert found["hbm_bytes_per_chip"] >= sum(sizes.values()) * 0.9
    scopes = [scope for scope in summary.SCOPES if scope != "frozen_encoders"]  # nothing is frozen
    shares = [found["work_per_chip"][s]["flops"] / found["flops_per_chip"] for s in scopes]
    np.testing.assert_allclose(sum(shares), 1, atol=0.02)
    assert found["strategy_flop_share"] == pytest.approx(sum(shares[3:]), abs=0.02)
    assert found["flops"] == 4 * found["flops_per_chip"]

    def tower(tokens):  # four projections, two of the MLP, scores and their product with values
        return 2 * tokens * 16 * (4 * 16 + 2 * 16) + 2 * (2 * tokens * tokens * 16)

    # Four rows on each device, of 4 patches of 4 x 4 pixels, a class token and 8 words.
    forward = 4 * (tower(5) + tower(8) + 2 * 4 * 48 * 16)
    assert compiled.useful_flops == forward
    assert found["useful_flops_per_chip"] == 4 * forward
    work = Account(compiled.text, summary.SCOPES).work
    # Float32 takes six passes of a matrix unit. Backwards is twice as much, but for the gradient of
    # the pixels.
    assert work["momentum_encoders"].matrix_passes == 6 * forward
    assert work["online_encoders"].matrix_passes == 6 * (3 * forward - 4 * (2 * 4 * 48 * 16))
    assert json.loads(json.dumps(found)) == found
    text = summary.render(found)
    assert "fits: yes" in text and "no roofline" in text and "momentum_encoders" in text
    assert config.encoder.attention == "auto"


def test_rooflines_and_hours(tiny_plan):
    config, _, _ = tiny_plan
    chip = topology.Chip(flops=1e9, main_memory=1.0, memory_bandwidth=1e6, link_bandwidth=1e12)
    machine = topology.Topology("made-up", jax.devices()[:1], chip)
    kernel = """  %kernel = f32[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/momentum_encoders/mine/pallas_call"}
  ROOT %end = """
    text = TPU_PROGRAM.replace("  ROOT %end = ", kernel)
    compiled = program.Program(training_of_nothing(config), 500, 2, scratch=1, text=text)
    found = summary.summarize(compiled, machine, 48, 3)
    assert not found["fits"]  # 2 bytes of 1
    assert found["roofline_bound_by"] == "memory"
    seconds = found["hbm_traffic_bytes_per_chip"] / 1e6
    assert found["roofline_step_seconds"] == seconds
    # Useful operations on each pair of the batch of 16.
    assert found["roofline_mfu"] == pytest.approx(500 * 16 / (1e9 * seconds))
    assert found["roofline_pairs_per_second"] == pytest.approx(16 / seconds)
    assert found["roofline_hours"] == pytest.approx(2 * 3 * seconds / 3600)
    mine = {"kernel": "mine", "scope": "momentum_encoders", "count": 1, "flops": None}
    assert found["kernels"] == [mine]
    rendered = summary.render(found)
    assert "fits: NO" in rendered and "bound by memory" in rendered
    assert "unknown FLOPs  mine" in rendered and "roofline_mfu" in rendered


def test_frozen_layers_are_useful_once_and_kept_ones_never():
    def flops(**fields):
        layers = {"encoder__image__layers": 2, "encoder__text__layers": 2}
        config = tiny_config(data__augmentation="none", **layers, **fields)
        return useful_flops(program.training_without_data(config, mesh_of(1)).model)

    def layer(tokens):  # four projections, two of the MLP, scores and their product with values
        return 2 * tokens * 16 * (4 * 16 + 2 * 16) + 2 * (2 * tokens * tokens * 16)

    patches = 2 * 4 * 48 * 16
    image, text = 2 * layer(5) + patches, 2 * layer(8)
    assert flops() == 4 * (image + text)
    assert flops(objective__name="clip") == 3 * (image + text)  # without momentum encoders
    half = {"encoder__image__frozen_layers": "1"}
    assert flops(**half) == 4 * (layer(5) + text) + layer(5) + patches
    assert flops(**half, data__keep_frozen=True) == 4 * (layer(5) + text)
    projected = 2 * 2 * 16 * 12
    whole = {"encoder__text__frozen_layers": "all", "encoder__projection_dim": 12}
    assert flops(**whole) == 4 * (image + projected) + text


def training_of_nothing(config):
    """A training without arrays, whose sizes do not matter."""
    state = types.SimpleNamespace(
        params={}, frozen_params={}, momentum_params={}, opt_state=(), queue=None
    )
    model = types.SimpleNamespace(config=config, mesh=mesh_of(1))
    return types.SimpleNamespace(model=model, state=state, abstract_batch=dict)


@pytest.mark.slow
def test_the_command_prints_one_object(capsys):
    sizes = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 16}
    overrides = [
        f"--config.encoder.{tower}.{field}={value}"
        for tower in ("image", "text")
        for field, value in sizes.items()
    ]
    shapes = TOP / "configs" / "shapes.py"
    plan.main([f"--config={shapes}", "--topology=cpu:2", "--batch=8", "--json", *overrides])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["global_batch_size"] == 8 and found["training_pairs"] is None


def test_a_program_that_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (66.48G) exceeds available HBM (15.75G)."
    )
    assert program.out_of_memory(message) == (int(66.48 * 2**30), int(15.75 * 2**30))
    assert program.out_of_memory("Used 512.5M of 0.25G hbm") == (int(512.5 * 2**20), 2**28)
    assert program.out_of_memory("INTERNAL: something else") is None
    config = tiny_config()
    machine = topology.Topology("made-up", jax.devices()[:1], None)
    compiled = program.Program(training_of_nothing(config), 1, 3, 2)
    found = summary.summarize(compiled, machine, 48, 3)
    assert not found["fits"] and found["hbm_limit_bytes_per_chip"] == 2
    assert "fits: NO, at least 3 B of 2 B a device" in summary.render(found)


@pytest.mark.parametrize("name", ["v5e", "v4:2x2x1", "v5e:0x4", "cpu:0", "cpu:4x4", "gpu:8", ""])
def test_unknown_machines(name):
    with pytest.raises(UserError, match=r"there is no such machine; expected one as v5e:4x4"):
        topology.find(name)


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="cpu:64: JAX has 8 CPU device"):
        topology.find("cpu:64")


def test_training_pairs_are_told_or_known():
    assert published.training_pairs("coco_reference") == 566_747
    assert published.training_pairs("shapes") is None
    with pytest.raises(UserError, match="--pairs is 0; expected a number above 0"):
        plan.main(["--config=configs/coco.py", "--topology=cpu:1", "--pairs=0"])


def test_published_towers_need_no_hub_and_coco_divides_its_slices():
    for name, batch in (("coco", 1024), ("flickr30k", 32)):
        config = configuration.load_config(str(TOP / "configs" / f"{name}.py"), [])
        assert config.global_batch_size == batch
        architectures = published.read_architectures(config.encoder)
        resolved = configuration.with_model_defaults(config, architectures)
        module = build_module(resolved, architectures, 1)
        assert (module.image.layers, module.image.image_size, module.text.vocab_size) == (
            12, 384, 30522,
        )  # fmt: skip
        assert resolved.data.text_length == 30
    for devices in (8, 16, 64, 256):
        configuration.check_batches(
            configuration.load_config(str(TOP / "configs" / "coco.py"), []), devices
        )
    with pytest.raises(UserError, match="global_batch_size is 32, which the 64 devices do not"):
        configuration.check_batches(config, 64)
