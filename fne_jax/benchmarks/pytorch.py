"""A train step in PyTorch, as plain as such code is written."""

from __future__ import annotations

import copy
import json
from typing import Any

import ml_collections
import torch
import transformers

from fne_jax.benchmarks.step import made_up_batch, training_on_one_device
from fne_jax.benchmarks.timing import window_seconds
from fne_jax.encoders.architectures import config_json
from fne_jax.encoders.towers import TOWERS
from fne_jax.errors import UserError

# By precision, how attention is computed: float32 as the authors run it, the scores kept; and
# bfloat16 by autocast with PyTorch's fused attention.
ATTENTIONS = {"float32": "eager", "bfloat16": "sdpa"}


def pytorch_step(
    config: ml_collections.ConfigDict,
    precision: str,
    steps: int,
    windows: int,
    *,
    platform: str | None = None,
) -> dict[str, Any]:
    """Times steps on the first GPU, or on the CPU where there is none.

    A step moves the momentum encoders, embeds the batch with them and with the online encoders
    (transformers' ViT and BERT, the mean over tokens at unit length), scores both directions
    against the batch's momentum embeddings and the queue, takes each anchor's hardest key as its
    negative in a hinge loss, clips the gradient, makes a step of AdamW and writes the queue. What
    FNE adds, statistics and sampling by weights, is left out. Nothing is computed again in the
    backward pass and nothing is compiled, whatever `config.encoder` says of ours.

    The precision is a key of `ATTENTIONS`. A window of steps is waited for as a whole; three steps
    before the first are not timed. The platform is "gpu" if there must be a GPU, "cpu" if none is
    to be used, None for what there is.

    Returns:
      Seconds a step of each window, and the most bytes that tensors took and that PyTorch held on
      the GPU (None on a CPU).

    Raises UserError if there is no GPU, or the config does not suit a made-up batch.
    """
    available = torch.cuda.is_available()
    if platform == "gpu" and not available:
        raise UserError(
            f"PyTorch {torch.__version__} sees no GPU, and JAX does; install its build for CUDA"
        )
    device = torch.device("cuda" if available and platform != "cpu" else "cpu")
    run = Step(training_on_one_device(config), precision, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = window_seconds(run, wait, steps, windows)
    on_gpu = device.type == "cuda"
    return {
        "platform": "gpu" if on_gpu else "cpu",
        "dtype": precision,
        "attention": ATTENTIONS[precision],
        "window_step_s": seconds,
        "applied": bool(torch.isfinite(run.loss)),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "pytorch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Step:
    """State, batch and queue; a call makes one step."""

    def __init__(self, training, precision, device):
        config = self._config = training.model.config
        self._precision, self._device = precision, device
        towers = {name: getattr(training.model.module, name) for name in TOWERS}
        modules = {
            name: _peer(tower, tower.dropout, ATTENTIONS[precision])
            for name, tower in towers.items()
        }
        dim = config.encoder.projection_dim
        for name in TOWERS if dim else ():
            modules[f"{name}_head"] = torch.nn.Linear(towers[name].width, dim, bias=False)
        self.online = torch.nn.ModuleDict(modules).to(device).train()
        self.momentum = copy.deepcopy(self.online).requires_grad_(False).eval()
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self.online.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        batch = made_up_batch(training)
        self._pixels = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
        self._ids, self._mask = (
            torch.from_numpy(batch[name]).long().to(device)
            for name in ("input_ids", "attention_mask")
        )
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (config.image_mean, config.image_std)
        )
        self.queues = [
            torch.nn.functional.normalize(
                torch.randn(config.queue_size, dim or tower.width, device=device)
            )
            for tower in towers.values()
        ]
        self._next_slot = 0
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        """Makes one step."""
        config = self._config
        pixels = (self._pixels.float() / 255 - self._mean) / self._std
        with torch.no_grad():
            moved = list(self.momentum.parameters())
            torch._foreach_mul_(moved, config.momentum)
            torch._foreach_add_(moved, list(self.online.parameters()), alpha=1 - config.momentum)
            momentum = self._embed(self.momentum, pixels)
        image, text = self._embed(self.online, pixels)
        keys = [torch.cat((new, queue)) for new, queue in zip(momentum, self.queues, strict=True)]
        margin = config.fne.margin
        self.loss = hinge(image, keys[1], margin) + hinge(text, keys[0], margin)
        self._optimizer.zero_grad(set_to_none=True)
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.online.parameters(), config.optimizer.clip_norm)
        self._optimizer.step()
        slots = (self._next_slot + torch.arange(len(image), device=self._device)) % len(
            self.queues[0]
        )
        for queue, new in zip(self.queues, momentum, strict=True):
            queue[slots] = new
        self._next_slot = (self._next_slot + len(image)) % len(self.queues[0])

    def _embed(self, modules, pixels):
        half = self._precision == "bfloat16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            image = modules["image"](pixel_values=pixels).last_hidden_state
            text = modules["text"](input_ids=self._ids, attention_mask=self._mask).last_hidden_state
            weights = self._mask[..., None]
            pooled = {"image": image.mean(1), "text": (text * weights).sum(1) / weights.sum(1)}
            if "image_head" in modules:
                pooled = {name: modules[f"{name}_head"](x) for name, x in pooled.items()}
        return [torch.nn.functional.normalize(pooled[name].float()) for name in TOWERS]


def hinge(anchors, keys, margin):
    """Returns the loss of the hardest key, of which the batch's own come first."""
    scores = anchors @ keys.T
    own = torch.arange(len(anchors), device=anchors.device)
    positive = scores[own, own]
    others = scores.detach().clone()
    others[own, own] = -torch.inf
    negative = scores[own, others.argmax(dim=1)]
    return torch.relu(margin + negative - positive).mean()


def _peer(tower, dropout, attention):
    """Returns transformers' model of a tower's sizes, of random weights."""
    fields = json.loads(config_json(tower))
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(
        fields | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    )
    model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    model.pooler = None
    return model
