"""The authors' behaviour on COCO; see configs/flickr30k_reference.py.

python -m fne_jax.train --config=configs/coco_reference.py --workdir=runs/coco_reference \\
    --config.data.dir=DIR

Not timed or scored: we have had neither the images nor an accelerator for it.
"""

from configs import flickr30k_reference


def get_config():
    config = flickr30k_reference.get_config()
    config.data.source = "coco"
    return config
