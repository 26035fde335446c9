"""Find the matches that nobody labelled, judge them, and measure by what was judged."""
