"""`python -m tests.support.review_server STORE REVIEWER [PORT [QUESTIONS]]` serves a review.

It ends as the command does, and tells the address in the first line of its output.
"""

import pathlib

from fne_jax import command_line
from fne_jax.errors import Interrupted
from fne_jax.false_negatives.review_app import serving
from fne_jax.false_negatives.review_app.app import create_app
from fne_jax.training.interruption import stop_signals
from tests.support.pages import hostile_split
from tests.support.reviews import some_review


def main(arguments):
    store, reviewer, *more = arguments
    port, count = int(more[0]) if more else 0, int(more[1]) if more[1:] else 24
    split = hostile_split(images=count // 2)
    review = some_review(pathlib.Path(store), split, reviewer, count=count)
    bound = serving.bind("127.0.0.1", port)
    url = serving.address("127.0.0.1", bound)
    number = serving.serve(
        create_app(review), bound, stop_signals(), lambda: print(url, flush=True)
    )
    raise Interrupted(number, "stopped")


if __name__ == "__main__":
    command_line.run(main)
