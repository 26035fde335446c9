"""Training objectives as pure functions of arrays: the FNE strategy and its baselines.

All losses are called alike, `loss(features, queue, stats, rng, **settings)`, with what a batch is,
and return a number and what they chose, or None. Each takes the settings that it names, and leaves
out what it does not use.
"""
