"""Where captioned images come from: a file for each source, and the registry of all of them."""
