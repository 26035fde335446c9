"""The paper's own regime on rendered scenes, for `study --pretraining`.

Small batches, the hardest negative as warm-up, and False Negative Elimination as published, prior
included; the towers are to be pretrained apart. What differs from the paper is the size of the
encoders, and with it the learning rate.

python -m fne_jax.study --config=configs/shapes_reference.py --pretraining=2000 --seeds=3 \\
    --objectives=fne,fne_no_elimination,semi_hard,hardest,infonce --baseline=infonce
"""

from configs import shapes_sparse


def get_config():
    config = shapes_sparse.get_config()
    config.objective.name = "fne"
    config.global_batch_size = 32
    config.momentum = 0.995
    config.queue_size = 8224
    config.num_epochs = 3.0
    config.warmup.objective = "hardest"
    config.warmup.fill_queue = False
    config.fne.start_epoch = 1.0
    config.fne.prior = 1e-4
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "step"
    config.optimizer.step_epochs = (2.0,)
    return config
