"""Work on several matrices in step, so that a GPU is waited for once for all of them and not for each.

The work on one matrix is a generator. Where it depends on values, it yields the tensors that hold them and
is sent these as arrays; all that stand at such a place are read in one copy.
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


def read(asked: Sequence[Tensor]) -> Values:
    """The values of tensors of one device, as float64 arrays of their shapes, in one copy."""
    flat = torch.cat([each.detach().double().flatten() for each in asked]).cpu().numpy()
    ends = np.cumsum([each.numel() for each in asked])
    return [
        part.reshape(tuple(each.shape)) for part, each in zip(np.split(flat, ends[:-1]), asked, strict=True)
    ]


def in_step(jobs: Sequence[Steps[Outcome]]) -> list[Outcome]:
    """What the jobs return, in their order; whatever they ask for is read together, round by round.

    An error of one job ends the others.
    """
    outcomes: dict[int, Outcome] = {}
    told: dict[int, Values | None] = dict.fromkeys(range(len(jobs)))
    try:
        while told:
            asked: dict[int, Sequence[Tensor]] = {}
            for place, values in told.items():
                try:
                    asked[place] = next(jobs[place]) if values is None else jobs[place].send(values)
                except StopIteration as end:
                    outcomes[place] = end.value
            values = read([each for tensors in asked.values() for each in tensors]) if asked else []
            told = {}
            for place, tensors in asked.items():
                told[place], values = values[: len(tensors)], values[len(tensors) :]
    finally:
        for job in jobs:
            job.close()
    return [outcomes[place] for place in range(len(jobs))]


def alone(job: Steps[Outcome]) -> Outcome:
    """What one job returns."""
    return in_step([job])[0]
