"""Studies: many runs of one config, compared."""
