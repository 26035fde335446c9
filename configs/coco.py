"""ViT-B/16 and BERT-base on COCO, the paper's setting with our defaults.

python -m fne_jax.train --config=configs/coco.py --workdir=runs/coco --config.data.dir=DIR
"""

from configs import flickr30k


def get_config():
    config = flickr30k.get_config()
    config.data.source = "coco"
    return config
