"""The paper's regime on rendered scenes, for `study`.

Small batches, a warm-up with the hardest negative, and FNE as published, prior included. The towers
are pretrained separately, then aligned with `clip` for an epoch, as the hardest negative would
collapse the embeddings otherwise. The encoders are smaller than the paper's, and the learning rate
higher. docs/study.md has the commands; `fne`, seed 0: rSum 92.2 on 1,000 test images, one x86-64
core, not timed.
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
