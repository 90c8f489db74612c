"""Drift: how far representations moved between base and tuned, layer by layer."""

from diagnostics.analyses.drift.analysis import representation_drift as representation_drift
