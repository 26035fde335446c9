"""The paper's own regime on rendered scenes, for `study`.

Small batches, the hardest negative as warm-up, and False Negative Elimination as published, prior
included; the towers are pretrained apart, then matched by `clip` for an epoch, without which the
hardest negative makes one point of all embeddings. What differs from the paper is the size of the
encoders, and with it the learning rate. docs/study.md has the commands.
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
