"""Where work runs: engines, jobs, workers, prefetch, GPUs."""
