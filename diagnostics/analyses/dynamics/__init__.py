"""Training dynamics of a series."""

from diagnostics.analyses.dynamics.analysis import training_dynamics as training_dynamics
