"""Checkpoints, pairs and series; what is blended, pruned and saved."""
