"""ViT-B/16 and BERT-base on Flickr30K, the paper's setting with our defaults.

python -m fne_jax.train --config=configs/flickr30k.py --workdir=runs/flickr30k --config.data.dir=DIR

Not timed or scored: we have had neither the images nor an accelerator for it.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.source = "flickr30k"
    config.encoder.image.pretrained = "google/vit-base-patch16-384"
    config.encoder.text.pretrained = "bert-base-uncased"
    config.data.augmentation = "randaugment"
    # So that a batch of 32 fits 16 GB of memory.
    config.encoder.scan_layers = True
    config.encoder.remat = "attention"
    return config
