"""The paper's setting on photographs: encoders pretrained separately, hardest negatives, then FNE.

python -m fne_jax.train --config=configs/photographs_fne.py --workdir=runs/photographs_fne \\
    --config.data.dir=DIR

On two x86-64 cores, with Flickr8K at 160 pixels (our split), seed 0, from preparing to evaluating:
28 minutes at most (other programs ran beside it), rSum 95.7 on 1,000 test images, where
configs/photographs.py has 230.8. docs/pretrained.md says more.
"""

from configs import photographs


def get_config():
    config = photographs.get_config()
    paper = photographs.base.get_config()
    config.num_epochs = 2.0
    config.global_batch_size = paper.global_batch_size
    config.momentum = paper.momentum
    config.queue_size = paper.queue_size
    config.objective.name = paper.objective.name
    config.warmup.objective = paper.warmup.objective
    config.fne = paper.fne
    config.optimizer.learning_rate = 2e-4
    return config
