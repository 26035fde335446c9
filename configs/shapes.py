"""Small encoders from random weights on rendered scenes with known false negatives.

It demonstrates FNE. Without pretrained encoders `clip` is better (docs/study.md).

bash launch/local.sh configs/shapes.py runs/shapes

On two x86-64 cores, seed 0, without the installation: 6 min 29 s, rSum 374.2 on 1,000 test images
(docs/quickstart.md).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_epochs = 3.5
    config.global_batch_size = 128
    config.momentum = 0.99
    config.queue_size = 2048

    config.data.source = "shapes"
    config.data.augmentation = "none"  # mirroring makes "left of" wrong

    image, text = config.encoder.image, config.encoder.text
    image.image_size = 64
    image.patch_size = 32  # a quarter of the image, where one object can stand
    image.layers, image.width, image.heads, image.mlp_width = 3, 128, 4, 256
    text.layers, text.width, text.heads, text.mlp_width = 2, 128, 4, 256
    text.max_length = 16
    config.encoder.compute_dtype = "float32"

    config.warmup.objective = "clip"
    config.warmup.temperature = 0.05
    config.fne.start_epoch = 2.5
    config.fne.prior = 0.02  # the share of false negatives that `prepare` prints

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.weight_decay = 0.01
    return config
