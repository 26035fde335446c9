"""Pages and figures that show what a run did and what its data hides."""
