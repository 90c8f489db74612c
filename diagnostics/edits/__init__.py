"""Edits that write a new checkpoint: mitigate, graft, interpolate."""
