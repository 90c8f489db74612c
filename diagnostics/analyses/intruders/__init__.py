"""Intruder dimensions: leading singular vectors of a tuned matrix that the base lacks."""

from diagnostics.analyses.intruders.analysis import intruder_dimensions as intruder_dimensions
