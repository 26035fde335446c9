"""DINOv2-S and MiniLM on photographs with captions, on a machine without an accelerator.

python -m fne_jax.train --config=configs/photographs.py --workdir=runs/photographs \\
    --config.data.dir=DIR

DIR holds `dataset_flickr8k.json` and `images`; --config.data.source=csv takes a table of your own.
Without network give folders: --config.encoder.image.pretrained=DINOV2
--config.encoder.text.pretrained=MINILM.

On two x86-64 cores, with Flickr8K at 160 pixels (our split), seed 0, captions cleaned like the
authors' (--config.data.cleaning=authors), from preparing to evaluating: 18.2 minutes, rSum 230.8 on
1,000 test images; with --config.encoder.image.image_size=224 --config.num_epochs=4 40 minutes,
242.4. docs/pretrained.md has more.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_epochs = 2.0
    config.global_batch_size = 128
    config.momentum = 0.99
    config.queue_size = 4096

    image, text = config.encoder.image, config.encoder.text
    image.pretrained = "facebook/dinov2-small"
    image.image_size = 168
    image.pooling = "first_and_mean"
    image.pooled_layers = 4
    image.frozen_layers = "all"
    text.pretrained = "sentence-transformers/all-MiniLM-L6-v2"
    text.frozen_layers = "2"
    text.pooled_layers = 4
    config.encoder.projection_dim = 1024
    config.encoder.projection_hidden = 2048
    config.encoder.compute_dtype = "float32"

    # The image tower runs once over each image; then its output is read from a file.
    config.data.augmentation = "none"
    config.data.keep_frozen = True
    config.data.text_length = 20

    config.objective.name = "clip"
    config.objective.temperature = 0.07
    config.fne.start_epoch = 0.0  # no warm-up
    config.evaluation.per_epoch = 1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.text_factor = 0.2
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.2
    config.optimizer.weight_decay = 0.05
    return config
