"""Read models: their weights, one matrix at a time, and their activations and scores when they run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.adapters.parts import LowRank as LowRank
    from probes.checkpoints.checkpoint import Checkpoint as Checkpoint
    from probes.checkpoints.opening import open_checkpoint as open_checkpoint
    from probes.checkpoints.pair import CheckpointPair as CheckpointPair
    from probes.checkpoints.series import CheckpointSeries as CheckpointSeries
    from probes.errors import InputError as InputError
    from probes.errors import UnknownNameError as UnknownNameError
    from probes.files.layout import Matrix as Matrix
    from probes.models.loading import Runnable as Runnable
    from probes.models.runnable import RunnablePair as RunnablePair
    from probes.models.runnable import open_model as open_model
    from probes.passes.activations import capture as capture
    from probes.passes.scores import score_examples as score_examples
    from probes.text.batches import Batch as Batch
    from probes.text.batches import Example as Example
    from probes.text.batches import batches as batches
    from probes.text.encode import encode as encode
    from probes.text.rows import Row as Row
    from probes.text.rows import Task as Task
    from probes.text.rows import read_task as read_task
    from probes.text.rows import task_of as task_of

# Loaded when asked for: the command line imports this package and must not wait for torch.
MODULES = {
    "probes.adapters.parts": ["LowRank"],
    "probes.checkpoints.checkpoint": ["Checkpoint"],
    "probes.checkpoints.opening": ["open_checkpoint"],
    "probes.checkpoints.pair": ["CheckpointPair"],
    "probes.checkpoints.series": ["CheckpointSeries"],
    "probes.errors": ["InputError", "UnknownNameError"],
    "probes.files.layout": ["Matrix"],
    "probes.models.loading": ["Runnable"],
    "probes.models.runnable": ["RunnablePair", "open_model"],
    "probes.passes.activations": ["capture"],
    "probes.passes.scores": ["score_examples"],
    "probes.text.batches": ["Batch", "Example", "batches"],
    "probes.text.encode": ["encode"],
    "probes.text.rows": ["Row", "Task", "read_task", "task_of"],
}
EXPORTS = {name: module for module, names in MODULES.items() for name in names}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
