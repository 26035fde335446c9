"""ViT-B/16 and BERT-base on COCO, for a slice of 16 or more accelerators.

python -m fne_jax.plan --config=configs/coco.py --topology v5e:4x4    # what it would take
python -m fne_jax.train --config=configs/coco.py --workdir=runs/coco --config.data.dir=DIR

The paper trains with batches of 32 pairs; these are k = 32 times as large. Nothing here was trained
yet: the values follow from the paper's by the rules given beside each.
"""

from configs import flickr30k


def get_config():
    config = flickr30k.get_config()
    config.data.source = "coco"
    config.global_batch_size = 1024
    # 64 batches.
    config.queue_size = 65536
    # The paper's momentum averages the last 1 / (1 - 0.995) = 200 steps, 0.78 of the 257 that its
    # memory spans, so that keys of one memory stem from much the same encoder. 0.98 averages 50
    # steps, 0.78 of the 64 here. (Equal spans of training pairs, 0.995^32 = 0.85, would be 7 steps
    # of 64: the oldest keys would come from encoders of long ago.)
    config.momentum = 0.98

    # Adam: the square root of k (Malladi et al. 2022, arXiv 2205.10287), 2e-5 * 32^0.5. The rise
    # from 0, which batches of 32 do without, takes half an epoch, 276 steps.
    config.optimizer.learning_rate = 1.13e-4
    config.optimizer.warmup_epochs = 0.5

    # Of what layers compute, the results of fused attention are kept. On v5e:4x4 that takes 10.4 of
    # 16 GB, and matrix products bound the step, 86 % of the peak being useful ones; with the
    # results of products kept too ("products", 15.5 GB) memory traffic does, 80 %. These are
    # figures of fne_jax.plan; nothing was measured.
    config.encoder.remat = "attention"
    return config
