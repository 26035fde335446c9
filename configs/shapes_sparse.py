"""`shapes` whose captions state four facts each, where false negatives are sparse (1.4 %).

bash launch/local.sh configs/shapes_sparse.py runs/shapes_sparse
"""

from configs import shapes


def get_config():
    config = shapes.get_config()
    config.data.shapes.facts = "four"
    config.data.shapes.shapes, config.data.shapes.colours = 8, 3
    config.fne.prior = 0.014  # the share of false negatives
    return config
