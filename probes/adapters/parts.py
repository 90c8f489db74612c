"""The parts of an adapter: the factors of a delta, one update of a tensor, all updates of a file."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from probes.files.layout import Matrix


@dataclass(frozen=True)
class LowRank:
    """A delta of one matrix, kept as its factors: scaling · B @ A.

    >>> import torch
    >>> LowRank(A=torch.ones(1, 3), B=torch.ones(2, 1), scaling=0.5).dense()
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    scaling: float

    @property
    def rank(self) -> int:
        """Number of factors; the delta's rank is at most this."""
        return self.A.shape[0]

    def dense(self) -> Float[Tensor, "out in"]:
        """The delta itself, in float32."""
        return (self.B.float() @ self.A.float()) * self.scaling


def sum_of(first: LowRank, *others: LowRank) -> LowRank:
    """The sum of deltas of one matrix as one product."""
    if not others:
        return first
    lows = (first, *others)
    A = torch.cat([low.A.float() for low in lows])
    return LowRank(A, torch.cat([low.B.float() * low.scaling for low in lows], dim=1), 1.0)


@dataclass(frozen=True, kw_only=True)
class AdapterUpdate:
    """One pair of factors, by their names in the adapter's file, and what they change in the base."""

    module: str  # as the adapter names it
    tensor: str  # the base's stored tensor
    A: str
    B: str
    scaling: float
    magnitude: str | None = None
    matrix: Matrix | None = None  # the one matrix of the tensor that they change; None: the whole tensor
    part: Matrix | None = None  # the part of the delta that belongs to `matrix`
    embedding: bool = False  # A is (r, vocabulary) and B (width, r), so that the delta is (B @ A)ᵀ
    experts: int = 0  # how many experts' factors lie in A and B; 0 for a plain pair
    exchanged: bool = False  # of experts, A is over the outputs and B over the inputs
    grouped: bool = False  # of experts, the columns of B lie expert after expert


@dataclass(kw_only=True)
class Targets:
    """The role of every tensor of an adapter's file, by the base's stored tensor."""

    updates: dict[str, list[AdapterUpdate]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)  # by `modules_to_save`, biases
    tokens: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # trained rows and their indices
    tied_tokens: list[str] = field(default_factory=list)  # weights tied to one with trained rows
    shifts: dict[str, tuple[str, float]] = field(default_factory=dict)  # `lora_bias`, and its scaling
    untied: dict[str, str] = field(default_factory=dict)  # weights of their own that the base ties to another
    in_place: dict[str, str] = field(default_factory=dict)  # PEFT loads them over the base's tied weights
    mirrors: dict[str, str] = field(
        default_factory=dict
    )  # tensors of the file that repeat another, transposed
    transposed_stacks: bool = False  # stacks of experts are stored as (experts, in, out)
    notes: list[str] = field(default_factory=list)
