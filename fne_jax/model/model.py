"""The model as one object: module, parameters, tokenizer and image preprocessing.

It is built from a config (`build_model`), restored from a run's workdir (`load_workdir`), or taken
from pretrained towers as they are (`pretrained_model`); and it embeds images, texts and splits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import transformers

from fne_jax import configuration, files
from fne_jax.data import captions as caption_lib
from fne_jax.data.identity import DatasetIdentity, read_identities
from fne_jax.data.images.usable_images import AnyImage, evaluation_pixels, read_ahead
from fne_jax.data.pairs import PairDataset, with_captions_per_image
from fne_jax.data.sources import listing
from fne_jax.data.sources.registry import load_split
from fne_jax.encoders import freezing, towers
from fne_jax.encoders.hub_files import run_folder
from fne_jax.errors import UserError
from fne_jax.model import checkpoints, kept_features, tokenizers
from fne_jax.model.embedded_split import EmbeddedSplit
from fne_jax.model.embedder import Embedder
from fne_jax.objectives import learned_scalars
from fne_jax.objectives.memory_queue import MemoryQueue
from fne_jax.objectives.similarity_statistics import SimilarityStatistics
from fne_jax.parallel import sharding

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """Two encoders with all that they need to embed images and texts; each is compiled once.

    Attributes:
      config: The resolved config.
      tokenizer: The tokenizer of the captions.
      module: The flax module of both towers.
      mesh: The devices that a batch is spread over.
      embedder: What embeds arrays; copies of the model share its compiled programs.
      params: The parameters of `module`, on `mesh`; None until they are known.
      step: How many updates the parameters have had.
      momentum_params: Those of the momentum encoders; None without a training run.
      queue: The queue of momentum embeddings; None without a training run.
      stats: The similarity statistics; None without a training run.
      data: The identity of each split that the run was trained with; empty where nobody knows.
    """

    config: ml_collections.ConfigDict
    tokenizer: transformers.PreTrainedTokenizerBase
    module: nn.Module
    mesh: jax.sharding.Mesh
    embedder: Embedder
    params: Any = None
    step: int = 0
    momentum_params: Any = None
    queue: MemoryQueue | None = None
    stats: SimilarityStatistics | None = None
    data: Mapping[str, DatasetIdentity] = dataclasses.field(default_factory=dict)

    def with_params(self, params: Any) -> Model:
        """Returns the model with other parameters, which embeds without compiling again.

        Each device gets a full copy of them, gathered once where they lie in parts.
        """
        return dataclasses.replace(
            self, params=jax.device_put(params, sharding.replicated(self.mesh))
        )

    def momentum(self) -> Model:
        """Returns the momentum encoders as a model of their own."""
        return self.with_params(self.momentum_params)

    def tokenize(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids and masks of raw captions, both [captions, length] int32."""
        cleaned = tokenizers.clean_captions(self.config, captions)
        return caption_lib.tokenize(self.tokenizer, cleaned, length)

    def tokenize_split(self, dataset: PairDataset, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids and masks of a split's captions, both [captions, length] integers.

        Those of a prepared split are kept beside it, and read by memory map from then on.
        """
        if dataset.in_memory or not self.tokenizer.is_fast:
            return self.tokenize(dataset.captions, length)
        return tokenizers.kept_tokens(self.config, self.tokenizer, dataset, length)

    def load_split(self, name: str) -> PairDataset:
        """Returns a split of the config's dataset, with a warning if it is not as in training.

        Args:
          name: `train`, `val` or `test`.

        Raises:
          UserError: if the dataset cannot be read, or what should be held out may have been
            trained on: neither its images nor those of the training split are the run's.
        """
        side = self.config.encoder.image.image_size
        dataset = load_split(self.config.data, side, name)
        before, now = self.data.get(name, dataset.identity), dataset.identity
        if before == now:
            return dataset
        told = f"the {name} split is not that of the run, which had {before}; it has {now}"
        if name != "train" and before.image_checksum != now.image_checksum:
            own = (
                "give the run's own data (--config.data.dir=DIR), and another dataset beside it by "
                f"--config.data.{name}=SOURCE:DIR"
            )
            unknown = f"{told}, and whether it was trained on cannot be told"
            with files.as_user_error(unknown, own, UserError):
                train = load_split(self.config.data, side, "train").identity
            if train.image_checksum != self.data["train"].image_checksum:
                raise UserError(
                    f"{told}. Nor is the training split, so that images of {name} may have been "
                    f"trained on: restore the splits, {own}, or train a new run"
                )
        _log.warning("%s", told)
        return dataset

    def load_evaluation_split(self, name: str) -> PairDataset:
        """Returns a split as `load_split` does, with the captions that count in evaluation."""
        return with_captions_per_image(
            self.load_split(name), self.config.evaluation.captions_per_image
        )

    def embed_split(self, dataset: PairDataset) -> EmbeddedSplit:
        """Returns a split's embeddings, with all that the model and the split tell beside them.

        Raises:
          UserError: naming the images or captions whose embeddings are not finite.
        """
        tokens = self.tokenize_split(dataset, self.config.evaluation.text_length)
        read = self.with_kept(dataset, tokens)
        split = EmbeddedSplit(
            self.embedder.images(self.params, read),
            self.embedder.captions(self.params, tokens, read.kept.get("text")),
            dataset.caption_image,
            dataset.image_id,
            dataset.caption_id,
            None if dataset.truth is None else dataset.truth.matrix(),
            read,
            step=self.step,
            config=self.config,
            stats=jax.device_get(self.stats),
        )
        for kind, rows in (("images", split.image_emb), ("captions", split.text_emb)):
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(bad):
                raise UserError(
                    f"the model's embeddings of {len(bad)} {kind} are not finite, first rows "
                    f"{bad[:10].tolist()}; its training diverged, or an image is damaged"
                )
        return split

    def with_kept(
        self,
        dataset: PairDataset,
        tokens: tuple[np.ndarray, np.ndarray],
        *,
        training: bool = False,
    ) -> PairDataset:
        """Returns a split with what the frozen parts of the encoders make of it, where it is kept.

        With `config.data.keep_frozen` it is computed once and read from then on.

        Args:
          dataset: The split.
          tokens: The ids and the masks of its captions, both [captions, length] int32.
          training: Whether the split is trained on, rather than evaluated.

        Raises:
          UserError: If the folder of prepared data cannot hold it, or what is kept is damaged.
        """
        if dataset.kept:
            return dataset
        kept = kept_features.keep(
            self.embedder, self.params, self.config, dataset, tokens, training=training
        )
        return dataclasses.replace(dataset, kept=kept) if kept else dataset

    def embed_images(self, images: AnyImage | Iterable[AnyImage]) -> np.ndarray:
        """Returns the [images, dim] float32 unit embeddings of images of any size.

        They are prepared as the images of a dataset are, read by several threads a batch ahead, so
        that memory holds two batches of them.

        Args:
          images: Paths or contents of image files, images of PIL, or arrays, mixed as you like; or
            a single one, which gives one row.

        Raises:
          UserError: Naming the image that cannot be read.
        """
        several = isinstance(images, np.ndarray) and images.ndim == 4
        if isinstance(images, AnyImage) and not several:
            images = [images]
        with contextlib.closing(
            read_ahead(
                lambda row: self.read_image(row[1], f"images[{row[0]}]"),
                enumerate(images),
                self.embedder.batch_size,
            )
        ) as batches:
            return self.embedder.pixels(self.params, map(_stacked, batches))

    def read_image(self, image: AnyImage, name: str) -> np.ndarray:
        """Returns the [side, side, 3] uint8 pixels of an image, as the image tower takes them.

        Raises:
          UserError: If it cannot be read; `name` is what it calls an image that is not a file.
        """
        size, resize_to = self.config.encoder.image.image_size, self.config.data.resize_to
        return evaluation_pixels(image, size, resize_to=resize_to, name=name)

    def embed_texts(self, texts: str | Iterable[str]) -> np.ndarray:
        """Returns the [texts, dim] float32 unit embeddings of sentences.

        They are cleaned and cut to the run's length as its captions were.

        Args:
          texts: Sentences, or a single one, which gives one row.

        Raises:
          UserError: Naming what is no sentence.
        """
        texts = [texts] if isinstance(texts, str | bytes) else list(texts)
        for row, text in enumerate(texts):
            listing.check_text(f"texts[{row}]", text)
        tokens = self.tokenize(texts, self.config.evaluation.text_length)
        return self.embedder.texts(self.params, tokens)

    def unread(
        self, texts: Sequence[str], tokens: tuple[np.ndarray, np.ndarray] | None = None
    ) -> str:
        """Returns in a line what `embed_texts` leaves out of sentences; "" where it reads all.

        Args:
          texts: The sentences, such as raw captions.
          tokens: Their ids and masks, where they are known.
        """
        tokens = tokens or self.tokenize(texts, self.config.evaluation.text_length)
        return tokenizers.unread(self.config, texts, self.tokenizer, tokens)

    def identity(self) -> dict[str, Any]:
        """Returns what tells the model's embeddings from another's, as JSON has it."""
        config, data = self.config, self.config.data
        parts = [config.encoder.to_json_best_effort(), config.image_mean, config.image_std]
        parts += [data.resize_to, data.cleaning, data.max_words, config.evaluation.text_length]
        parts += [data.prompt] if data.prompt else []
        return {
            "step": self.step,
            "params": checkpoints.fingerprints({"params": self.params})["params"],
            "config": hashlib.sha256(repr(parts).encode()).hexdigest()[:16],
        }


def _stacked(batch):
    """Returns the pixels of a batch; raises the first error of its reading."""
    for _, read in batch:
        if isinstance(read, UserError):
            raise read
    return np.stack([read for _, read in batch])


def load_evaluation_split(config: ml_collections.ConfigDict, name: str) -> PairDataset:
    """Returns a split of the config's dataset with the captions that count in evaluation.

    Args:
      config: The resolved config.
      name: `train`, `val` or `test`.

    Raises:
      UserError: if the dataset cannot be read.
    """
    dataset = load_split(config.data, config.encoder.image.image_size, name)
    return with_captions_per_image(dataset, config.evaluation.captions_per_image)


def build_model(
    config: ml_collections.ConfigDict,
    architectures: Mapping[str, Mapping[str, Any]],
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    mesh: jax.sharding.Mesh,
    *,
    module: nn.Module | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Model:
    """Returns the model that a config describes, its parameters still to come.

    Args:
      config: The resolved config.
      architectures: What `encoders.towers.read_architectures` returned.
      tokenizer: The tokenizer of the captions; None for a model that embeds no raw captions, with
        a `module` of its own.
      mesh: The devices to spread batches over.
      module: The two towers, in place of those that the config describes.
      before_batch: Called before each batch that is embedded; what it raises ends the embedding.

    Raises:
      UserError: if sources, sizes and tokenizer do not fit together.
    """
    if module is None:
        module = build_module(config, architectures, len(tokenizer), mesh)
    embedder = Embedder(
        module,
        mesh,
        batch_size=config.evaluation.batch_size,
        image_size=config.encoder.image.image_size,
        pixel_statistics=(config.image_mean, config.image_std),
        before_batch=before_batch,
    )
    return Model(config, tokenizer, module, mesh, embedder)


def build_module(
    config: ml_collections.ConfigDict,
    architectures: Mapping[str, Mapping[str, Any]],
    vocab_size: int,
    mesh: jax.sharding.Mesh | None = None,
) -> nn.Module:
    """Returns the flax module of both towers.

    Args:
      config: The resolved config.
      architectures: What `encoders.towers.read_architectures` returned.
      vocab_size: The number of the tokenizer's ids.
      mesh: The devices to spread batches over; None for the default device alone.

    Raises:
      UserError: if sources, sizes and tokenizer do not fit together.
    """
    return towers.build_dual_encoder(config.encoder, vocab_size, architectures, mesh)


def initial_params(
    module: nn.Module, config: ml_collections.ConfigDict, rng: jax.Array
) -> tuple[Any, int]:
    """Returns random parameters and the embeddings' dimension.

    Beside those of the towers there may be those that the objective learns.

    Args:
      module: The two towers.
      config: The resolved config, for the sizes of their inputs.
      rng: A typed PRNG key.
    """
    size = config.encoder.image.image_size
    pixels = jnp.zeros((1, size, size, 3), jnp.float32)
    tokens = jnp.zeros((1, config.data.text_length), jnp.int32)
    (image_emb, _), variables = module.init_with_output(rng, pixels, tokens, tokens + 1)
    params = variables["params"]
    if config.objective.learn_temperature:
        params = params | learned_scalars.initial()
    return params, image_emb.shape[-1]


def load_workdir(
    workdir: str | os.PathLike,
    checkpoint: str | int = "best",
    *,
    overrides: Sequence[str] = (),
    module: nn.Module | None = None,
) -> Model:
    """Returns the model of a run with the weights of one checkpoint, a full copy on each device.

    Args:
      workdir: The folder of the run, or `hf://OWNER/NAME[@REVISION]` for one on the hub.
      checkpoint: `best`, `latest` or a step.
      overrides: `--config.x=y` of fields that may change when a run resumes, such as `data.dir`.
      module: The two towers, in place of those that the run's config describes.

    Raises:
      UserError: if the folder is not a run's, or the checkpoint is missing or damaged.
    """
    workdir = run_folder(workdir)
    model = stored_model(workdir, overrides=overrides, module=module)
    with checkpoints.reader(workdir) as manager:
        step = checkpoints.find_step(manager, str(checkpoint))
        fields, _ = checkpoints.read(manager, step, abstract_fields(model))
    frozen = fields.pop("frozen_params")
    whole = {name: freezing.merge(fields[name], frozen) for name in ("params", "momentum_params")}
    return dataclasses.replace(model, step=step, **fields | whole)


def stored_model(
    workdir: pathlib.Path,
    *,
    overrides: Sequence[str] = (),
    mesh: jax.sharding.Mesh | None = None,
    module: nn.Module | None = None,
) -> Model:
    """Returns the model of a run without its weights.

    Args:
      workdir: The folder of the run.
      overrides: As for `load_workdir`.
      mesh: The devices; None for all that are here.
      module: The two towers, in place of those that the run's config describes.

    Raises:
      UserError: If the folder is not a run's, or what it holds beside checkpoints is damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a run")
    config = configuration.override(configuration.read_config(workdir), overrides)
    mesh = sharding.create_mesh() if mesh is None else mesh
    architectures = towers.read_architectures(config.encoder, workdir)
    tokenizer = tokenizers.stored_tokenizer(workdir)
    model = build_model(config, architectures, tokenizer, mesh, module=module)
    return dataclasses.replace(model, data=read_identities(workdir))


def pretrained_model(config: ml_collections.ConfigDict) -> Model:
    """Returns the pretrained towers of a config as they come, without any training.

    Raises:
      UserError: if anything of them would be random.
    """
    config, architectures = configuration.resolve(config)
    for tower in towers.TOWERS:
        if not config.encoder[tower].pretrained:
            raise UserError(
                f"config.encoder.{tower}.pretrained is empty: from random weights there is nothing "
                "to score without training"
            )
    if config.encoder.projection_dim:
        raise UserError(
            f"config.encoder.projection_dim is {config.encoder.projection_dim}: a projection "
            "starts from random weights, so there is nothing to score without training"
        )
    mesh = sharding.create_mesh()
    tokenizer = caption_lib.load_tokenizer(config.data.tokenizer)
    model = build_model(config, architectures, tokenizer, mesh)
    return model.with_params(towers.pretrained_params(config.encoder, {}))


def abstract_fields(model: Model) -> dict[str, Any]:
    """Returns the abstract arrays that a model takes from a checkpoint, each device having all."""
    config = model.config

    def create(rng):
        params, dim = initial_params(model.module, config, rng)
        params, frozen_params = freezing.trained_and_frozen(model.module, params)
        return {
            "params": params,
            "frozen_params": frozen_params,
            "momentum_params": params,
            "queue": MemoryQueue.create(rng, config.queue_size, dim),
            "stats": SimilarityStatistics.create(),
        }

    place = sharding.replicated(model.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(create, jax.random.key(0)),
    )
