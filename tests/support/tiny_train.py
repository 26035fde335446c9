"""`python -m tests.support.tiny_train --workdir=DIR` trains with towers that compile fast."""

from fne_jax import command_line, train
from tests.support.tiny import LinearTowers, tiny_config


def get_config():
    return tiny_config(checkpoint__every_steps=1)


if __name__ == "__main__":
    command_line.run(
        lambda arguments: train.main([f"--config={__file__}", *arguments], LinearTowers())
    )
