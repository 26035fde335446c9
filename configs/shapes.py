"""Small encoders from random weights on drawn scenes whose false negatives are known.

bash launch/local.sh configs/shapes.py runs/shapes
"""

from configs import base


def get_config():
    config = base.get_config()
    config.num_epochs = 2.0
    config.global_batch_size = 128
    config.momentum = 0.99
    config.queue_size = 4096

    config.data.source = "shapes"
    config.data.augmentation = "none"  # mirrored, "left of" would be a lie
    config.data.tokenizer = "train"
    config.data.text_length = 18

    image, text = config.encoder.image, config.encoder.text
    image.image_size = 64
    image.patch_size = 16
    image.layers, image.width, image.heads, image.mlp_width = 3, 128, 4, 512
    text.layers, text.width, text.heads, text.mlp_width = 2, 128, 4, 512
    text.max_length = 18
    config.encoder.compute_dtype = "float32"

    config.warmup.objective = "infonce"
    config.fne.start_epoch = 1.2
    config.fne.prior = 0.01  # the density of false negatives is known here

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.weight_decay = 0.01
    return config
