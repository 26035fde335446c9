"""What a run would be, without running it: data, model, mesh, memory and the first batch."""

from __future__ import annotations

import pathlib

import jax
import ml_collections

from fne_jax.training.setup import RunSetup
from fne_jax.training.timeline import Phase
from fne_jax.training.train_state import find_source_run


def describe(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
    """Returns the description as text; nothing is written but the prepared dataset.

    Raises UserError on whatever would stop the run before its first step.
    """
    run = RunSetup.of(config, workdir)
    training, config = run.training, run.training.model.config
    timeline, model = training.timeline, training.model
    find_source_run(model, training.state)
    tokens = model.tokenize_split(run.train, config.data.text_length)
    batch = next(run.batches(tokens, range(1)))
    compiled = training.compiled([Phase.FNE], run.known)[Phase.FNE]
    first = int(batch["pair_id"][0])
    lines = [
        *_parameter_lines(training.state.all_params),
        f"mesh: {dict(model.mesh.shape)} on {model.mesh.size} {jax.default_backend()} device(s)",
        _memory_line(compiled.memory_analysis()),
        f"{timeline}, queue filled from {timeline.filling_start_step}",
        "first batch",
        *(f"  {name:16}{array.shape!s:>24} {array.dtype}" for name, array in batch.items()),
        f"  first caption   {run.train.captions[first]!r}",
        f"  its tokens      {model.tokenizer.convert_ids_to_tokens(batch['input_ids'][0])}",
        *filter(None, [model.unread(run.train.captions, tokens)]),
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
