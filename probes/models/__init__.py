"""Models that run: loaded, edited, interpolated."""
