"""Reading what is in models: weights, one matrix at a time, and what they do when they run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.adapters import LowRank as LowRank
    from probes.checkpoint import Checkpoint as Checkpoint
    from probes.checkpoint import open_checkpoint as open_checkpoint
    from probes.forward import score_examples as score_examples
    from probes.hooks import capture as capture
    from probes.layout import Matrix as Matrix
    from probes.loading import Runnable as Runnable
    from probes.models import RunnablePair as RunnablePair
    from probes.models import open_model as open_model
    from probes.pair import CheckpointPair as CheckpointPair

# Loaded when asked for: the command line imports this package and must not wait for torch.
EXPORTS = {
    "Checkpoint": "probes.checkpoint",
    "CheckpointPair": "probes.pair",
    "LowRank": "probes.adapters",
    "Matrix": "probes.layout",
    "Runnable": "probes.loading",
    "RunnablePair": "probes.models",
    "capture": "probes.hooks",
    "open_checkpoint": "probes.checkpoint",
    "open_model": "probes.models",
    "score_examples": "probes.forward",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
