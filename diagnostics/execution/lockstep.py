"""Run the work on several matrices in lockstep, so that the GPU is waited for once a round.

The work on a matrix is a generator that yields the tensors whose values it needs, and receives arrays.
"""

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = list[NDArray[np.float64]]
Outcome = TypeVar("Outcome")
Steps: TypeAlias = Generator[Sequence[Tensor], Values, Outcome]


def read_values(tensors: Sequence[Tensor]) -> Values:
    """The values of tensors of one device, as float64 arrays of their shapes, in one copy."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tuple(tensor.shape)) for part, tensor in zip(parts, tensors, strict=True)]


def run_in_lockstep(jobs: Sequence[Steps[Outcome]]) -> list[Outcome]:
    """What the jobs return, in order; the tensors that they yield are read together, round by round."""
    outcomes: dict[int, Outcome] = {}
    replies: dict[int, Values | None] = dict.fromkeys(range(len(jobs)))
    try:
        while replies:
            requests: dict[int, Sequence[Tensor]] = {}
            for job, reply in replies.items():
                try:
                    requests[job] = next(jobs[job]) if reply is None else jobs[job].send(reply)
                except StopIteration as end:
                    outcomes[job] = end.value
            wanted = [tensor for tensors in requests.values() for tensor in tensors]
            values = read_values(wanted) if requests else []
            replies = {}
            for job, tensors in requests.items():
                replies[job], values = values[: len(tensors)], values[len(tensors) :]
    finally:
        for steps in jobs:
            steps.close()
    return [outcomes[job] for job in range(len(jobs))]
