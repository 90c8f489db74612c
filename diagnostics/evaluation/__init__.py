"""Rows through models: losses, answers, interpolated models, paired texts."""
