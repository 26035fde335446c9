"""Kernels that programs call by name: their products and traffic, as XLA prints the calls."""

from fne_jax.planning.accounting import Account, Kernel
from fne_jax.planning.operations import Float32

# Of `flash_attention` of jax.experimental.pallas, compiled for a v5e; its inside is left out. Two
# images of three heads, queries and tokens padded to 256 and 384, heads of a width of 64.
FLASH = """
HloModule flash, is_scheduled=true

ENTRY %main (q: bf16[2,3,256,64], k: bf16[2,3,384,64], s: s32[2,8,384], l: f32[2,3,256,128]) -> \
bf16[2,3,256,64] {
  %q = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[2,3,384,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %s = s32[2,8,384]{2,1,0:T(8,128)} parameter(2)
  %l = f32[2,3,256,128]{3,2,1,0:T(8,128)} parameter(3)
  %flash_attention.1 = (bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)}, f32[2,3,256,128]{3,2,1,0:T(8,128)\
S(1)}) custom-call(%q, %k, %k, %s), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={}}, \
metadata={op_name="jit(step)/jvp(encoders)/shard_map/jit(flash_attention)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1"}}}
  %o = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%flash_attention.1), index=0
  %dq.1 = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %k, %s, %l, /*index=5*/%q), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp(encoders))/\
shard_map/jit(flash_attention)/flash_mha_bwd_dq_block_q_major=128/pallas_call"}
  %dkv.1 = (bf16[2,3,384,64]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[2,3,384,64]{3,2,1,0:T(8,128)(2,1)\
S(1)}) custom-call(%q, %k, %k, %s, %l, /*index=5*/%q), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/transpose(jvp(encoders))/shard_map/jit(flash_attention)/\
flash_mha_bwd_dkv_block_q_major=128/pallas_call"}
  %buffer = bf16[2,3,256,64]{3,2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %sum = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} add(%o, %dq.1)
}
"""
FLASH_PRODUCT = 2 * 2 * 3 * 256 * 384 * 64


def test_flash_attention_on_tpus():
    found = Account(FLASH, ("encoders",))
    flops = [2 * FLASH_PRODUCT, 3 * FLASH_PRODUCT, 4 * FLASH_PRODUCT]
    assert [(kernel.flops, kernel.scope) for kernel in found.kernels] == [
        (number, "encoders") for number in flops
    ]
    assert found.kernels[1].name == "flash_mha_bwd_dq_block_q_major=128"
    work = found.work["encoders"]
    query, segments, sums = 2 * 3 * 256 * 64, 2 * 8 * 384, 2 * 3 * 256 * 128
    assert work.matrix_passes == sum(flops)
    assert work.flops == sum(flops) + query
    # Keys, values and one of the outputs lie on the chip.
    forward = 2 * query + 4 * segments + 2 * query
    backward = 2 * (2 * query + 4 * segments + 4 * sums + 2 * query) + 2 * query
    assert work.bytes == forward + backward + 3 * 2 * query


# Of `splash_attention`, whose backward pass is one kernel, with widths before lengths in what it is
# given; the mask's blocks come first, and its metadata take lines of their own.
SPLASH = """
HloModule splash, is_scheduled=true

ENTRY %main (m: s8[1,1,1], q: bf16[2,3,64,256], k: bf16[2,3,64,384], o: bf16[2,3,256,64]) -> \
bf16[2,3,256,64] {
  %m = s8[1,1,1]{2,1,0:T(4,128)(4,1)} parameter(0)
  %q = bf16[2,3,64,256]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[2,3,64,384]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %o = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %splash.1 = (f32[2,128,128]{2,1,0:T(8,128)}, f32[2,128,64]{2,1,0:T(8,128)}, \
bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)}, f32[2,3,256,128]{3,2,1,0:T(8,128)}) \
custom-call(%m, %m, %q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}, metadata={op_name="jit(step)/jvp(encoders)/attention_200x300/vmap(static_sparsity_splash)/\
jit(_splash_attention)/splash_mha_fwd_residuals/splash_mha_fwd_residuals/pallas_call"}
  %backward.1 = (f32[2,128,64]{2,1,0:T(8,128)}, f32[2,128,64]{2,1,0:T(8,128)}, \
bf16[2,1,3,256,64]{4,3,2,1,0:T(8,128)(2,1)}, bf16[2,3,384,64]{3,2,1,0:T(8,128)(2,1)}, \
bf16[2,3,384,64]{3,2,1,0:T(8,128)(2,1)}) custom-call(%m, %m, %q, %k, %k, /*index=5*/%o), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}, metadata={op_name="jit(step)/transpose(jvp(encoders))/attention_200x300/\
vmap(static_sparsity_splash)/jit(_splash_attention)/splash_mha_dkv_no_residuals/pallas_call"}
  %other.1 = f32[8]{0} custom-call(%q), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/encoders/my_kernel/pallas_call"}
  ROOT %out = bf16[2,3,256,64]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%splash.1), index=2
}
"""


def test_splash_attention_on_tpus():
    found = Account(SPLASH, ("encoders",))
    forward, backward, other = found.kernels
    product = 2 * 2 * 3 * 200 * 300 * 64  # without padding
    assert (forward.name, forward.flops) == ("splash_mha_fwd_residuals", 2 * product)
    assert (backward.name, backward.flops) == ("splash_mha_dkv_no_residuals", 5 * product)
    assert other == Kernel("my_kernel", "encoders", None, 1)
    assert found.work["encoders"].flops == 7 * product
    assert found.work["encoders"].matrix_passes == 7 * FLASH_PRODUCT
    without_lengths = Account(SPLASH.replace("attention_200x300", "attention"), ("encoders",))
    assert without_lengths.kernels[0].flops == 2 * FLASH_PRODUCT


# As compiled for an H100: cuBLAS lists the room that it works in beside its result.
GPU = """
HloModule gpu, is_scheduled=true

ENTRY %main (x: bf16[640,256], w: bf16[256,512], b: bf16[512], y: f32[6,64,96], q: bf16[2,192,3,64]\
, k: bf16[2,320,3,64]) -> bf16[640,512] {
  %x = bf16[640,256]{1,0} parameter(0)
  %w = bf16[256,512]{1,0} parameter(1)
  %b = bf16[512]{0} parameter(2)
  %y = f32[6,64,96]{2,1,0} parameter(3)
  %q = bf16[2,192,3,64]{3,2,1,0} parameter(4)
  %k = bf16[2,320,3,64]{3,2,1,0} parameter(5)
  %cublas-lt-matmul.2 = (bf16[640,512]{1,0}, s8[4194304]{0}) custom-call(%x, %w, %b), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/mlp/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]\
,"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},\
"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]},"epilogue":"BIAS_RELU"}}
  %gemm.1 = (f32[6,64,64]{2,1,0}, s8[4194304]{0}) custom-call(%y, %y), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/scores/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]\
,"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},\
"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %fmha.1 = (bf16[2,3,192,64]{3,1,2,0}, f32[2,3,192]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/jvp(attend)/\
attention_190x300/custom_partitioning"}, backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"dimensions": ["2", "3", "192", "320"], "layout": \
{"minor_to_major": ["3", "2", "1", "0"]}, "is_dynamic_dimension": [false]}}}
  %sums = f32[2,3,192]{2,1,0} get-tuple-element(%fmha.1), index=1
  %fmha.2 = (bf16[2,3,192,64]{3,1,2,0}, bf16[2,3,320,64]{3,1,2,0}, bf16[2,3,320,64]{3,1,2,0}, \
u8[9000]{0}) custom-call(%q, %k, %k, %sums, %q, /*index=5*/%q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(f)/transpose(jvp(attend))\
/attention_190x300/custom_partitioning"}, backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"dimensions": ["2", "3", "192", "320"]}}}
  ROOT %out = bf16[640,512]{1,0} get-tuple-element(%cublas-lt-matmul.2), index=0
}
"""


def test_kernels_on_gpus():
    found = Account(GPU, ("mlp", "scores", "attend"), float32=Float32(default=2, highest=16))
    mlp, scores, attend = (found.work[name] for name in ("mlp", "scores", "attend"))
    assert mlp.flops == mlp.matrix_passes == 2 * 640 * 256 * 512
    assert mlp.bytes == 2 * (640 * 256 + 256 * 512 + 512 + 640 * 512)
    assert scores.flops == 2 * 6 * 64 * 64 * 96
    assert scores.matrix_passes == 16 * scores.flops
    assert scores.bytes == 4 * (2 * 6 * 64 * 96 + 6 * 64 * 64)
    assert attend.flops == (2 + 5) * 2 * 2 * 3 * 190 * 300 * 64
    assert attend.matrix_passes == (2 + 5) * 2 * 2 * 3 * 192 * 320 * 64
    query, key, sums = 2 * (2 * 3 * 192 * 64), 2 * (2 * 3 * 320 * 64), 4 * (2 * 3 * 192)
    forward = query + 2 * key + query + sums
    backward = query + 2 * key + sums + 2 * query + query + 2 * key
    assert attend.bytes == forward + backward
    assert [kernel.name for kernel in found.kernels] == [
        "__cublas$lt$matmul",
        "__cublas$gemm",
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    ]
    text = GPU.replace('["HIGHEST","HIGHEST"]', '["DEFAULT","DEFAULT"]')
    default = Account(text, ("scores",), float32=Float32(default=2, highest=16)).work["scores"]
    assert default.matrix_passes == 2 * default.flops
