"""Reading what is in models: checkpoints, and pairs of them, one matrix at a time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.adapters import LowRank as LowRank
    from probes.checkpoint import Checkpoint as Checkpoint
    from probes.checkpoint import open_checkpoint as open_checkpoint
    from probes.layout import Matrix as Matrix
    from probes.pair import CheckpointPair as CheckpointPair

# Loaded when asked for: the command line imports this package and must not wait for torch.
EXPORTS = {
    "Checkpoint": "probes.checkpoint",
    "CheckpointPair": "probes.pair",
    "LowRank": "probes.adapters",
    "Matrix": "probes.layout",
    "open_checkpoint": "probes.checkpoint",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
