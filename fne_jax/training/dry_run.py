"""What a run would be, without running it: data, model, mesh, memory and the first batch."""

from __future__ import annotations

import pathlib

import jax
import ml_collections

from fne_jax import configuration
from fne_jax.data.sources.registry import load_split
from fne_jax.model.model import build_model
from fne_jax.model.tokenizers import run_tokenizer
from fne_jax.parallel import sharding
from fne_jax.training import workdir as run_folder
from fne_jax.training.compiled_steps import jitted_steps
from fne_jax.training.loop import batch_order, batches_of
from fne_jax.training.matches import known_matches
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import abstract_state, find_source_run


def describe(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """Returns the description as text; nothing is written but the prepared dataset.

    Args:
      config: The config, see configs/base.py.
      workdir: The folder that the run would have.

    Raises:
      UserError: on whatever would stop the run before its first step.
    """
    begun = run_folder.is_begun(workdir)
    own = workdir if begun else None
    config, architectures = configuration.resolve(config, own)
    if begun:
        run_folder.check_begun(workdir, config)
    mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
    configuration.check_batches(config, mesh.size)
    train = load_split(config.data, config.encoder.image.image_size, "train")
    known = known_matches(config, train, mesh)
    if begun:
        run_folder.check_data(workdir, {"train": train.identity} | known.data)
    order = batch_order(config, train)
    timeline = Timeline.of(config, order.steps_per_epoch)
    tokenizer = run_tokenizer(config, own, train.captions)
    model = build_model(config, architectures, tokenizer, mesh)
    schedule = learning_rate_schedule(
        config.optimizer, timeline.steps_per_epoch, timeline.total_steps
    )
    state = abstract_state(model, schedule)
    find_source_run(config, state)
    tokens = model.tokenize(train.captions, config.data.text_length)
    batch = next(batches_of(config, train, tokens, order, range(1), mesh))
    step = jitted_steps(config, timeline, model, schedule, state)[Phase.FNE]
    rows = sharding.to_devices(batch, mesh)
    compiled = step.lower(state, rows, *known.tables).compile()
    first = int(batch["pair_id"][0])
    lines = [
        *_parameter_lines(state.all_params),
        f"mesh: {dict(mesh.shape)} on {mesh.size} {jax.default_backend()} device(s)",
        _memory_line(compiled.memory_analysis()),
        f"steps: {timeline.steps_per_epoch} an epoch, {timeline.total_steps} in all, "
        f"queue filled from {timeline.filling_start_step}, FNE from {timeline.fne_start_step}"
        + (" (never)" if timeline.fne_start_step >= timeline.total_steps else ""),
        "first batch",
        *(f"  {name:16}{array.shape!s:>24} {array.dtype}" for name, array in batch.items()),
        f"  first caption   {train.captions[first]!r}",
        f"  its tokens      {tokenizer.convert_ids_to_tokens(batch['input_ids'][0])}",
    ]
    return "\n".join(lines)


def _parameter_lines(params):
    yield "parameters"
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        yield f"  {name:58}{leaf.shape!s:>22}{leaf.size:>14,}"
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    yield f"  {'total':58}{'':22}{total:>14,}"


def _memory_line(memory):
    return (
        f"memory a device: {memory.argument_size_in_bytes / 2**20:.0f} MiB state and batch, "
        f"{memory.temp_size_in_bytes / 2**20:.0f} MiB activations and scratch"
    )
