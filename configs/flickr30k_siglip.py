"""SigLIP-B/16 fine-tuned on Flickr30K with FNE.

python -m fne_jax.train --config=configs/flickr30k_siglip.py --workdir=runs/flickr30k_siglip \\
    --config.data.dir=DIR

Not timed or scored: we have had neither the images nor an accelerator for it.
"""

from configs import flickr30k


def get_config():
    config = flickr30k.get_config()
    for tower in (config.encoder.image, config.encoder.text):
        tower.pretrained = "google/siglip-base-patch16-384"
    return config
