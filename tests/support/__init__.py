"""What several test modules share: small runs, made-up datasets, meshes, hostile inputs."""

import pathlib

TOP = pathlib.Path(__file__).parent.parent.parent  # of the repository
