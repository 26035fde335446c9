"""Where captioned images come from: one file a source."""
