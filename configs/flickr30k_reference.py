"""The authors' behaviour on Flickr30K, where our defaults differ from it.

Differences that remain: there is no dropout (theirs is on in BERT until each epoch's first
validation), and BERT's embedding of the padding token is trained (in PyTorch it is not). In
RandAugment, autocontrast is PIL's and sharpness saturates (theirs saturates a channel in
autocontrast on a third of the photographs, and wraps around at 0 and 255 in sharpness); crops are
resized to within one level of 255 of PIL's bicubic.

python -m fne_jax.train --config=configs/flickr30k_reference.py --workdir=runs/reference \\
    --config.data.dir=DIR

Not timed or scored: we have had neither the images nor an accelerator for it.
"""

from configs import flickr30k


def get_config():
    config = flickr30k.get_config()
    config.encoder.compute_dtype = "float32"
    # Training pads to the longest caption of the batch, evaluation to 30 tokens.
    config.data.text_length = 64
    config.encoder.text.training_pooling = "mean_to_longest"
    config.encoder.text.pooling = "mean_with_padding"
    config.evaluation.text_length = 30
    config.evaluation.per_epoch = 1
    config.fne.mask_same_image = False
    config.warmup.fill_queue = False
    return config
