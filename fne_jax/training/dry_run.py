"""What a run would be, without running it: data, model, mesh, memory and the first batch."""

from __future__ import annotations

import jax
import ml_collections

from fne_jax.data import captions
from fne_jax.data.batches import training_batches
from fne_jax.data.pairs import load_split
from fne_jax.encoders.towers import read_architectures, with_model_defaults
from fne_jax.parallel import sharding
from fne_jax.training import run
from fne_jax.training.compiled_steps import jitted_steps
from fne_jax.training.loop import batch_order
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.phases import Phase, RunPlan


def describe(config: ml_collections.ConfigDict) -> str:
    """Returns the description as text; nothing is written but the prepared dataset.

    Raises:
      UserError: on whatever would stop the run before its first step.
    """
    architectures = read_architectures(config.encoder)
    config = with_model_defaults(config, architectures)
    image_size = config.encoder.image.image_size
    train = load_split(config.data, image_size, "train")
    order = batch_order(config, train)
    plan = RunPlan.of(config, order.steps_per_epoch)
    if config.data.tokenizer == captions.TRAIN:
        tokenizer = captions.fit_tokenizer(
            run.clean_captions(config, train.captions), config.data.vocab_size
        )
    else:
        tokenizer = captions.load_tokenizer(config.data.tokenizer)
    tokens = run.tokenize_captions(config, tokenizer, train.captions, config.data.text_length)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    module = run.build_module(config, architectures, len(tokenizer))
    schedule = learning_rate_schedule(config.optimizer, plan.steps_per_epoch, plan.total_steps)
    state = run.abstract_state(config, module, mesh, schedule)
    batch = next(
        training_batches(
            train,
            tokens,
            order,
            range(1),
            image_size=image_size,
            augmentation=config.data.augmentation,
            augment_on=config.data.augment_on,
        )
    )
    step = jitted_steps(config, plan, mesh, schedule, state)[Phase.FNE]
    compiled = step.lower(state, sharding.to_devices(batch, mesh)).compile()
    memory = compiled.memory_analysis()
    lines = ["parameters"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = "/".join(key.key for key in path)
        lines.append(f"  {name:58}{leaf.shape!s:>22}{leaf.size:>14,}")
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    lines += [
        f"  {'total':58}{'':22}{total:>14,}",
        f"mesh: {dict(mesh.shape)} on {mesh.size} {jax.default_backend()} device(s)",
        f"memory a device: {memory.argument_size_in_bytes / 2**20:.0f} MiB state and batch, "
        f"{memory.temp_size_in_bytes / 2**20:.0f} MiB activations and scratch",
        f"steps: {plan.steps_per_epoch} an epoch, {plan.total_steps} in all, "
        f"memory filled from {plan.filling_start_step}, FNE from {plan.fne_start_step}",
        "first batch",
    ]
    lines += [f"  {name:16}{array.shape!s:>24} {array.dtype}" for name, array in batch.items()]
    first = int(batch["pair_id"][0])
    lines += [
        f"  first caption   {train.captions[first]!r}",
        f"  its tokens      {tokenizer.convert_ids_to_tokens(batch['input_ids'][0])}",
    ]
    return "\n".join(lines)
