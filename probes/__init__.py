"""Reading what is in models: weights, one matrix at a time, and what they do when they run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.adapters.parts import LowRank as LowRank
    from probes.checkpoints.checkpoint import Checkpoint as Checkpoint
    from probes.checkpoints.opening import open_checkpoint as open_checkpoint
    from probes.checkpoints.pair import CheckpointPair as CheckpointPair
    from probes.files.layout import Matrix as Matrix
    from probes.models.loading import Runnable as Runnable
    from probes.models.runnable import RunnablePair as RunnablePair
    from probes.models.runnable import open_model as open_model
    from probes.passes.activations import capture as capture
    from probes.passes.scores import score_examples as score_examples

# Loaded when asked for: the command line imports this package and must not wait for torch.
EXPORTS = {
    "Checkpoint": "probes.checkpoints.checkpoint",
    "CheckpointPair": "probes.checkpoints.pair",
    "LowRank": "probes.adapters.parts",
    "Matrix": "probes.files.layout",
    "Runnable": "probes.models.loading",
    "RunnablePair": "probes.models.runnable",
    "capture": "probes.passes.activations",
    "open_checkpoint": "probes.checkpoints.opening",
    "open_model": "probes.models.runnable",
    "score_examples": "probes.passes.scores",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
