"""Image and text encoders in flax.linen."""
