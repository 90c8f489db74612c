"""The command `tunescope`."""
