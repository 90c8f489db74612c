"""Damping intruder dimensions: choice of singular triples, and their scaling."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.numerics import linalg
from probes.checkpoints.adapter_refit import Edit
from probes.checkpoints.blend import unrounded
from probes.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd


Mode = Literal["top", "all", "update", "neighbour"]

# A leading vector must be known to this sine; otherwise the full decomposition gives it.
ACCURACY = 1e-9
# Below this smaller side the full decomposition costs no more than the search.
SMALL = 640


def leading(W: Float[Tensor, "out in"], count: int) -> Float[Tensor, "out count"]:
    """The `count` leading left singular vectors of W in float64, largest singular value first."""
    if min(W.shape) < max(SMALL, 8 * count):
        return linalg.left_singular(W)[0][:, :count]
    block = count + 16
    generator = torch.Generator(W.device).manual_seed(0)
    start = torch.randn(1, W.shape[0], block, generator=generator, dtype=torch.float64, device=W.device)
    krylov = linalg.BlockKrylov(W.double()[None], start)
    for _ in range(4):
        krylov.extend(4)
        ritz = krylov.ritz(count + 1)
        if bool((ritz.errors()[0, :count] <= ACCURACY).all()):
            return ritz.vectors[0, :, :count]
    del krylov, ritz  # the decomposition needs their memory
    return linalg.left_singular(W)[0][:, :count]


def damp(
    W: Float[Tensor, "out in"], ranks: Sequence[int], scale: float
) -> tuple[Float[Tensor, "out count"], Float[Tensor, "count in"], Float[Tensor, " count"]]:
    """Factors of the edit Σ (λ − 1) s u vᵀ over these ranks (from 1), and the singular values s; float64."""
    U, rows = triples(W, ranks)
    return U, (scale - 1) * rows, torch.linalg.vector_norm(rows, dim=1)


def triples(
    W: Float[Tensor, "out in"], ranks: Sequence[int]
) -> tuple[Float[Tensor, "out count"], Float[Tensor, "count in"]]:
    """u and s vᵀ of W at these ranks (from 1), as columns and rows in float64."""
    with linalg.threads_for(min(W.shape)):
        U = leading(W, max(ranks))[:, [rank - 1 for rank in ranks]]
    # s vᵀ as uᵀ W: damping removes exactly (1 − λ²) s² per triple from ‖W‖², whatever the error of u.
    return U, torch.cat([part.double().mT @ U for part in W.split(1024, dim=1)]).mT


def choose(vectors: "pd.DataFrame", mode: Mode) -> dict[str, list[int]]:
    """The ranks to scale in each matrix with an intruder, from the table `vectors`."""
    chosen = {}
    for name, rows in vectors.groupby("matrix", sort=False):
        flagged = rows.loc[rows["intruder"], "rank"].tolist()
        if not flagged:
            continue
        ranks = {"all": flagged, "top": flagged[:1]}.get(mode)
        if ranks is None:
            others = rows.loc[~rows["intruder"] & rows["cosine_low"].notna(), "rank"].tolist()
            # The nearest in rank; of two the one of larger singular value, so the control is no smaller edit.
            ranks = sorted(others, key=lambda rank: (abs(rank - flagged[0]), rank))[:1]
        if ranks:
            chosen[str(name)] = ranks
    return chosen


def by_tensor(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """Edits by the stored tensor that they change."""
    tensors: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        tensors[edit.matrix.tensor].append(edit)
    return tensors


def applied(tuned: Checkpoint, name: str, stored: Tensor, edits: Sequence[Edit]) -> Tensor:
    """A tensor of tuned with these edits; in a wider dtype than stored if an adapter was merged into it."""
    if edits:
        stored = unrounded(tuned, name, stored)
    for edit in edits:
        stored = edit.apply(stored)
    return stored
