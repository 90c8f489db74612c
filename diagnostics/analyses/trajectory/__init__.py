"""The trajectory of a series: troughs, detours, metrics that part from the loss."""

from diagnostics.analyses.trajectory.analysis import training_trajectory as training_trajectory
