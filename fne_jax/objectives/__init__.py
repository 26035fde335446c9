"""Training objectives as pure functions of arrays: the FNE strategy and its baselines."""
