"""What an adapter is made of: its factors, one update of one tensor, all updates of a file."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from probes.files.layout import Matrix


@dataclass(frozen=True)
class LowRank:
    """A delta of one matrix, kept as its factors: scaling · B @ A."""

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


@dataclass(frozen=True, kw_only=True)
class AdapterUpdate:
    """One pair of factors and the place in the base that they change.

    Attributes:
        module: the adapted module, as the adapter names it.
        tensor: the base's stored tensor that the whole delta is for; or
        matrix, part: the one matrix of it, and the part of the delta that belongs there.
        A, B, magnitude: names in the adapter's file.
        embedding: A is (r, vocabulary) and B (width, r), so that the delta is (B @ A)ᵀ.
        experts: how many experts' factors lie in A and B; 0 for a plain pair.
    """

    module: str
    tensor: str
    A: str
    B: str
    scaling: float
    magnitude: str | None = None
    matrix: Matrix | None = None
    part: Matrix | None = None
    embedding: bool = False
    experts: int = 0


@dataclass(kw_only=True)
class Targets:
    """What every tensor of an adapter's file means for its base (found by `probes.adapters.targets`).

    Attributes:
        updates: stored tensor -> the factors that change it.
        replaced: stored tensor -> the tensor that takes its place (`modules_to_save`, biases).
        tokens: embedding -> the trained rows, and which they are.
        shifts: bias -> what LoRA adds to it (`lora_bias`), and the scaling.
        untied: embeddings trained as a copy, which a head tied to them in the base does not follow.
        notes: what a reader must know.
    """

    updates: dict[str, list[AdapterUpdate]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    shifts: dict[str, tuple[str, float]] = field(default_factory=dict)
    untied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
