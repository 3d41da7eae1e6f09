"""Ray Tune runs the trials of a space and stores what they report."""
