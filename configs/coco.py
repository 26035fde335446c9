"""ViT-B/16 and BERT-base on COCO, for a slice of 16 or more accelerators.

python -m fne_jax.plan --config=configs/coco.py --topology v5e:4x4    # does it fit?
python -m fne_jax.train --config=configs/coco.py --workdir=runs/coco --config.data.dir=DIR

The paper trains with batches of 32 pairs; these are k = 32 times as large. Nothing here has been
trained yet: the values follow from the paper's by the rules given beside each.
"""

from configs import flickr30k


def get_config():
    config = flickr30k.get_config()
    config.data.source = "coco"
    config.global_batch_size = 1024
    # 64 batches.
    config.queue_size = 65536
    # The paper's momentum averages the last 1 / (1 - 0.995) = 200 steps, 0.78 of the 257 that its
    # queue spans, so that all keys come from a similar encoder. 0.98 averages 50 steps, 0.78 of the
    # 64 here. (The same number of training pairs, 0.995^32 = 0.85, would be 7 steps of 64: the
    # oldest keys would be stale.)
    config.momentum = 0.98

    # Adam: the square root of k (Malladi et al. 2022, arXiv 2205.10287), 2e-5 * 32^0.5, with a
    # warm-up of half an epoch, 276 steps, which batches of 32 do without.
    config.optimizer.learning_rate = 1.13e-4
    config.optimizer.warmup_epochs = 0.5

    # By fne_jax.plan this takes 6.3 of 16 GB on v5e:4x4, and matrix products bound the step, at an
    # MFU of 84 % (docs/benchmarks.md). Not measured.
    config.encoder.remat = "attention"
    return config
