"""Looking up a base's tensors by the names of a model in memory."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from probes.files.layout import Header, Matrix
from probes.naming.matrices import matrices as name_matrices

_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
# Names of sub-models that one file has and another leaves out or reorders.
_WRAPPERS = frozenset({"model", "transformer", "language_model", "base_model"})


class Lookup:
    """A base's tensors, by the names of a model in memory."""

    def __init__(self, headers: Mapping[str, Header], matrices: Mapping[str, Matrix]):
        self.headers = headers
        self.tied = {alias: matrix.tensor for matrix in matrices.values() for alias in matrix.tied}
        self.embeddings = [m.tensor for m in matrices.values() if m.component == "embed"]
        self.heads = [m.tensor for m in matrices.values() if m.component == "lm_head"]
        # Embeddings that a tied head reads, as far as a file tells: it has no head of its own, or a copy.
        self.shared = set(self.tied.values()) | (set() if self.heads else set(self.embeddings))
        unpacked = [m for m in matrices.values() if m.experts is None]
        self.transposed = {m.tensor for m in unpacked if m.transposed}
        self.stacked = {m.tensor for m in unpacked if m.expert is not None}
        self.by_role: dict[Role, list[Matrix]] = defaultdict(list)
        for matrix in matrices.values():
            self.by_role[_role(matrix)].append(matrix)
        self.endings: dict[str, list[str]] = defaultdict(list)
        self.bare: dict[str, list[str]] = defaultdict(list)
        for name in headers:
            self.bare[_bare(name)].append(name)
            segments = name.split(".")
            for start in range(1, len(segments)):
                self.endings[".".join(segments[start:])].append(name)

    def find(self, name: str) -> str | None:
        """The stored tensor called `name`, up to a model's prefix."""
        if name in self.headers:
            return name
        for candidates in (self.endings.get(name, ()), self.bare.get(_bare(name), ())):
            if len(candidates) == 1:
                return candidates[0]
        prefix, _, shorter = name.partition(".")  # `roberta.encoder…`, saved from the bare encoder
        if shorter in self.headers and not prefix.isdigit():
            return shorter
        return self.heads[0] if len(self.heads) == 1 and is_head(name) else None  # `embed_out` in the file

    def weight(self, name: str) -> str | None:
        """The stored tensor with the values of `name`, which may be tied to another."""
        stored = self.tied.get(name) or self.find(name)
        if stored is None and len(self.embeddings) == 1 and is_head(name):
            return self.embeddings[0]  # a file without its own unembedding: the model ties it
        return stored

    def alike(self, theirs: Matrix) -> Matrix | None:
        """The base's one matrix of the same layer, component and expert, under any name."""
        matches = self.by_role.get(_role(theirs), [])
        return matches[0] if len(matches) == 1 and theirs.layer is not None else None

    def experts(self, name: str) -> int:
        """Number of the base's experts for the stacked parameter `name`; 0 if it is no stack."""
        stacked = [role[:3] for role in self.by_role if role[3] is not None]
        return max((stacked.count(_role(matrix)[:3]) for matrix in probe(name, 1, 2, 2)), default=0)


Role = tuple[int | None, str, bool, int | None]


def _role(matrix: Matrix) -> Role:
    """Layer, component, whether it is a router's or an expert's that all tokens share, and expert."""
    named = _EXPERT.search(matrix.name)
    expert = matrix.expert if named is None else int(named[1])
    return matrix.layer, matrix.component, "shared" in matrix.name, expert


def is_head(name: str) -> bool:
    """Whether a tensor of this name is an unembedding."""
    return [matrix.component for matrix in probe(name)][:1] == ["lm_head"]


def probe(name: str, *shape: int) -> list[Matrix]:
    """The matrices that a tensor of this name would hold."""
    header = Header(name, shape or (1, 1), torch.float32)
    return list(name_matrices({name: header}, {}).values())


def _bare(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
