"""What a layer keeps for its backward pass; all else is computed again there, to save memory."""

from __future__ import annotations

import flax.linen as nn
import jax

from fne_jax.encoders.fused_attention import KERNEL_OUTPUT

NONE = "none"


def _is_cudnn(primitive, *_, **__):
    """Returns whether a result is cuDNN's attention, whose sums of the softmax have no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


_KERNELS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT), _is_cudnn
)
# By the names that `config.encoder.remat` gives them: which results are kept, of those that the
# backward pass asks for.
REMATS = {
    # All of them: nothing is computed again.
    NONE: jax.checkpoint_policies.everything_saveable,
    # Those of matrix products and of fused attention: norms and activations are computed again.
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KERNELS
    ),
    # Those of fused attention.
    "attention": _KERNELS,
    # None: a layer keeps its input alone.
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(layer: type[nn.Module], remat: str, *, scanned: bool) -> type[nn.Module]:
    """Returns a kind of layer that keeps for its backward pass what a key of `REMATS` says.

    The layer is called with hidden states, a mask and a Python bool. In the body of a loop
    (`scanned`), equal computations are not merged anyhow.
    """
    if remat == NONE:
        return layer
    # Argument 3, with self, must stay a Python bool.
    return nn.remat(layer, prevent_cse=not scanned, static_argnums=(3,), policy=REMATS[remat])
