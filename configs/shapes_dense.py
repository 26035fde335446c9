"""`shapes` with four facts in each caption, where false negatives are dense (3.2 %).

bash launch/local.sh configs/shapes_dense.py runs/shapes_dense
"""

from configs import shapes_sparse


def get_config():
    config = shapes_sparse.get_config()
    config.data.shapes.shapes = 5
    config.fne.prior = 0.032
    return config
