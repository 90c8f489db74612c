"""Tensors that a checkpoint must have and that are empty."""

from dataclasses import dataclass

from probes.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Problem:
    """A tensor that makes a checkpoint unusable, and why."""

    tensor: str
    what: str


def problems(checkpoint: Checkpoint) -> tuple[Problem, ...]:
    """What makes a checkpoint unusable, without reading a tensor."""
    empty = [name for name, header in checkpoint.headers.items() if not header.entries]
    return tuple(Problem(name, "is empty") for name in empty)
