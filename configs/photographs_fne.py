"""The paper's setting on photographs: encoders pretrained apart, hardest negatives, then FNE.

python -m fne_jax.train --config=configs/photographs_fne.py --workdir=runs/photographs_fne \\
    --config.data.dir=DIR

No run of it to the end has been timed or scored yet.
"""

from configs import photographs


def get_config():
    config = photographs.get_config()
    paper = photographs.base.get_config()
    config.num_epochs = 3.0
    config.global_batch_size = paper.global_batch_size
    config.momentum = paper.momentum
    config.queue_size = paper.queue_size
    config.objective.name = paper.objective.name
    config.warmup.objective = paper.warmup.objective
    config.fne = paper.fne
    config.optimizer.learning_rate = 2e-4
    return config
