"""Small encoders from random weights on Flickr8K, for a machine without an accelerator.

python -m fne_jax.train --config=configs/flickr8k.py --workdir=runs/flickr8k --config.data.dir=DIR

With FNE in the last two of its ten epochs, where `clip` stands today, on two x86-64 cores at
2.5 GHz, seed 0: 41 min 41 s, rSum 43.3 on 1,000 test images (docs/benchmarks.md).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_epochs = 10.0
    config.global_batch_size = 128
    config.momentum = 0.99
    config.queue_size = 4096

    config.data.vocab_size = 4000

    image, text = config.encoder.image, config.encoder.text
    image.image_size = 128
    image.patch_size = 32
    image.layers, image.width, image.heads, image.mlp_width = 4, 192, 4, 768
    text.layers, text.width, text.heads, text.mlp_width = 2, 192, 4, 768
    text.max_length = 24
    image.dropout = text.dropout = 0.1
    config.encoder.compute_dtype = "float32"

    # Better than `fne` for small encoders from random weights on rendered scenes (docs/study.md).
    config.objective.name = "clip"
    config.objective.temperature = 0.05
    config.warmup.objective = "clip"
    config.warmup.temperature = 0.05
    config.fne.start_epoch = 8.0
    config.evaluation.per_epoch = 1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.weight_decay = 0.05
    return config
