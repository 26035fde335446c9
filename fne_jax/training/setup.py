"""What a run is made of before its first step: data, model, state and steps, from its config."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fne_jax import configuration
from fne_jax.data.batches import Batch, BatchOrder, training_batches
from fne_jax.data.identity import DatasetIdentity
from fne_jax.data.images.preprocessing import TrainingImages
from fne_jax.data.pairs import SPLITS, PairDataset, with_captions_per_image
from fne_jax.data.sources.registry import load_splits
from fne_jax.encoders.inputs import FEATURES, READ, frozen_features
from fne_jax.encoders.transformer import cast_kernels
from fne_jax.errors import UserError
from fne_jax.model.kept_features import kept_towers
from fne_jax.model.model import Model, build_model
from fne_jax.model.tokenizers import run_tokenizer
from fne_jax.objectives import registry
from fne_jax.objectives.known_matches import KnownMatches
from fne_jax.objectives.similarity_statistics import StatisticsRule
from fne_jax.objectives.teacher import Teacher
from fne_jax.parallel import processes, sharding
from fne_jax.training import workdir as run_folder
from fne_jax.training.encoder_passes import MicroBatches, WholeBatch
from fne_jax.training.matches import known_matches, refuted_labels
from fne_jax.training.optimizer import learning_rate_schedule
from fne_jax.training.timeline import Phase, Timeline
from fne_jax.training.train_state import TrainState, abstract_state
from fne_jax.training.train_step import StepSettings, train_step
from fne_jax.training.wandb_log import check_installed


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
      model: The model.
      timeline: The step counts.
      state: The shapes, dtypes and shardings of the state; nothing is allocated.
      steps: The train step of each phase, compiled on its first use; it donates the state. With an
        oracle or a file of matches it takes the table of these as a third argument.
    """

    model: Model
    timeline: Timeline
    state: TrainState
    steps: dict[Phase, Callable]

    @classmethod
    def of(cls, model: Model, steps_per_epoch: int) -> Training:
        """Returns the training that the model's config describes, over epochs of so many updates.

        Raises:
          UserError: If the config names an objective that there is not, or more epochs than steps
            are counted.
        """
        config = model.config
        timeline = Timeline.of(config, steps_per_epoch)
        schedule = learning_rate_schedule(config.optimizer, steps_per_epoch, timeline.total_steps)
        state = abstract_state(model, schedule)
        return cls(model, timeline, state, _jitted_steps(model, steps_per_epoch, schedule, state))

    def compiled(
        self, phases: Collection[Phase], known: tuple[KnownMatches | Teacher | None, ...] = ()
    ) -> dict[Phase, jax.stages.Compiled]:
        """Returns the compiled steps of some phases."""
        batch = self.abstract_batch()
        return {
            phase: self.steps[phase].lower(self.state, batch, *known).compile() for phase in phases
        }

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of a batch of the steps."""
        model, config = self.model, self.model.config
        batch, side = config.global_batch_size, config.encoder.image.image_size
        tokens = (batch, config.data.text_length)
        shapes = {
            "image": ((batch, side, side, 3), jnp.uint8),
            "input_ids": (tokens, jnp.int32),
            "attention_mask": (tokens, jnp.int32),
            "image_id": ((batch,), jnp.int32),
            "pair_id": ((batch,), jnp.int32),
        }
        arrays = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        statistics = config.image_mean, config.image_std
        run = functools.partial(frozen_features, model.module.apply, pixel_statistics=statistics)
        for tower in kept_towers(model.module, config, training=True):
            own = {name: arrays[name] for name in READ[tower]}
            arrays[FEATURES[tower]] = jax.eval_shape(run, self.state.all_params, own)
            if tower == "image":
                del arrays["image"]
        rows = sharding.batch_sharding(model.mesh)
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
            for name, array in arrays.items()
        }


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A run with its data, before its first step.

    Attributes:
      begun: Whether its folder holds a checkpoint of it, so that it is gone on with.
      architectures: What `encoders.towers.read_architectures` returned.
      train: The training split.
      val: The validation split.
      data: The identity of each split by name, and as `matches`, `teacher` and `refuted` those of
        these files.
      known: What the steps take beside state and batch, see `matches.known_matches`.
      order: The order of the training pairs.
      training: How its model is trained.
    """

    begun: bool
    architectures: Mapping[str, Mapping[str, Any]]
    train: PairDataset
    val: PairDataset
    data: Mapping[str, DatasetIdentity]
    known: tuple[KnownMatches | Teacher | None, ...]
    order: BatchOrder
    training: Training

    @classmethod
    def of(
        cls,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        *,
        module: nn.Module | None = None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> RunSetup:
        """Returns the run of a config; nothing is written but the prepared dataset.

        Args:
          config: The config, see configs/base.py.
          workdir: The folder that the run has, or would have.
          module: The two towers, in place of those that the config describes.
          before_batch: Called before each batch that is embedded; what it raises ends that.

        Raises:
          UserError: On wrong input, also if the folder holds a run of another config or data.
        """
        begun = run_folder.is_begun(workdir)
        own = workdir if begun else None
        config, architectures = configuration.resolve(config, own)
        if begun:
            with processes.failing_together(f"--workdir={workdir}"):
                configuration.check_stored(config, workdir)
        with processes.failing_together("config.logging.wandb"):
            check_installed(config.logging)
        mesh = sharding.create_mesh(config.mesh.data, config.mesh.fsdp)
        configuration.check_batches(config, mesh.size)
        with processes.first_process_first("data"):
            side = config.encoder.image.image_size
            train, val, test = load_splits(config.data, side)
        with processes.failing_together("config.data.matches"):
            known, source = known_matches(config, train, mesh)
        with processes.failing_together("config.data.refuted"):
            refuted = refuted_labels(config, train)
            source |= {"refuted": refuted.identity} if len(refuted) else {}
        splits = dict(zip(SPLITS, (train, val, test), strict=True))
        data = {name: split.identity for name, split in splits.items()} | source
        if begun:
            run_folder.check_data(workdir, data)
        val = with_captions_per_image(val, config.evaluation.captions_per_image)
        order = batch_order(config, train, refuted.caption)
        tokenizer = run_tokenizer(config, own, train.captions)
        model = build_model(
            config, architectures, tokenizer, mesh, module=module, before_batch=before_batch
        )
        training = Training.of(model, order.steps_per_epoch)
        return cls(begun, architectures, train, val, data, known, order, training)

    def with_kept(self, params: Any, tokens: tuple[np.ndarray, np.ndarray]) -> RunSetup:
        """Returns the run with what frozen encoders make of its data, where the config keeps that.

        Args:
          params: All parameters of the online encoders.
          tokens: The ids and the masks of the training captions, both [captions, length] int32.
        """
        model, config = self.training.model, self.training.model.config
        if not config.data.keep_frozen:
            return self
        model = model.with_params(params)
        val_tokens = model.tokenize_split(self.val, config.evaluation.text_length)
        return dataclasses.replace(
            self,
            train=model.with_kept(self.train, tokens, training=True),
            val=model.with_kept(self.val, val_tokens),
        )

    def batches(self, tokens: tuple[np.ndarray, np.ndarray], steps: range) -> Iterator[Batch]:
        """Returns this process's rows of the batches of steps, the tokens as in `with_kept`."""
        model, config = self.training.model, self.training.model.config
        return training_batches(
            self.train,
            tokens,
            self.order.rows(steps, sharding.local_rows(model.mesh, config.global_batch_size)),
            TrainingImages(config.encoder.image.image_size, config.data.augmentation, config.seed),
            config.data.prefetch,
        )


def batch_order(
    config: ml_collections.ConfigDict, train: PairDataset, left_out: Sequence[int] = ()
) -> BatchOrder:
    """Returns the order of the training pairs, without some rows.

    Raises:
      UserError: if there are fewer pairs than a batch takes.
    """
    rows = tuple(map(int, left_out))
    order = BatchOrder(config.seed, len(train.captions), config.global_batch_size, rows)
    if not order.steps_per_epoch:
        raise UserError(
            f"config.global_batch_size is {config.global_batch_size}, more than the "
            f"{order.pairs - len(rows)} training pairs; lower it"
        )
    return order


def _jitted_steps(model, steps_per_epoch, learning_rate, state):
    """Returns the train step of each phase, which donates the state."""
    config, mesh = model.config, model.mesh
    cast = functools.partial(cast_kernels, dtype=jnp.dtype(config.encoder.compute_dtype))
    layout = sharding.StepLayout(mesh, cast)
    passes = WholeBatch(layout)
    if config.micro_batches > 1:
        passes = MicroBatches(layout, config.micro_batches)
    settings = StepSettings(
        module=model.module,
        passes=passes,
        momentum=config.momentum,
        mask_same_image=config.fne.mask_same_image,
        pixel_statistics=(config.image_mean, config.image_std),
        learning_rate=learning_rate,
        statistics_rule=StatisticsRule(config.fne.ema_decay, steps_per_epoch),
    )
    warmup, main = registry.warmup_objective(config), registry.main_objective(config)
    use_keys = registry.uses_keys(config)
    steps = {
        Phase.WARMUP: functools.partial(_warmup_step, objective=warmup, use_keys=False),
        Phase.WARMUP_FILLING: functools.partial(_warmup_step, objective=warmup, use_keys=True),
        Phase.FNE: functools.partial(train_step, objective=main, use_keys=use_keys),
    }
    replicated, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    placed = sharding.state_shardings(mesh, state)
    known = (replicated, replicated) if registry.uses_known(config) else ()
    return {
        phase: jax.jit(
            functools.partial(step, settings=settings),
            in_shardings=(placed, rows, *known),
            out_shardings=(placed, replicated, replicated),
            donate_argnums=0,
        )
        for phase, step in steps.items()
    }


def _warmup_step(state, batch, *known, **settings):
    """`train_step` of the warm-up, which runs of other matches share: it looks at none of them."""
    del known
    return train_step(state, batch, **settings)
