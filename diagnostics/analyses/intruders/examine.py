"""Reads the matrices of a pair and decides their vectors, in this process or on workers."""

import logging
import zlib
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diagnostics.analyses.intruders.decide import Decision, decide_all, decide_exactly
from diagnostics.analyses.intruders.delta_shape import DeltaShape, update_of
from diagnostics.execution import jobs
from diagnostics.execution.engines import runs_in_this_process
from diagnostics.execution.lockstep import run_in_lockstep
from diagnostics.execution.prefetch import prefetch, run_halving_on_oom
from diagnostics.numerics import linalg
from diagnostics.store.factor_cache import NO_RECALL, FactorCache
from probes import CheckpointPair
from probes.adapters.parts import LowRank
from probes.checkpoints.rounding import settled
from probes.files.layout import Matrix

log = logging.getLogger(__name__)

# Largest share of epsilon that the random floor may reach; above it chance alone counts as near the base.
LARGEST_FLOOR = 0.8
# A cosine this near epsilon is undecided by float64 and by the choice of a basis.
ON_THRESHOLD = 1e-6
# Bytes of base matrices that a GPU decides in one batch.
BATCH_BYTES = 2**30
# Frozen: its bytes are the base's. Not applicable: too small for epsilon or k.
Status: TypeAlias = Literal["measured", "frozen", "not applicable"]


@dataclass(frozen=True)
class MatrixResult:
    """The outcome for one matrix."""

    matrix: Matrix
    status: Status
    decision: Decision | None = None
    update: DeltaShape | None = None
    verified: bool | None = None  # whether the full decomposition agreed; None if it was not run

    def below(self, k: int, epsilon: float) -> tuple[int, int]:
        """Lower and upper bound on the number of the k leading vectors below epsilon."""
        if self.decision is None:
            return 0, 0
        return int((self.decision.high[:k] < epsilon).sum()), int((self.decision.low[:k] < epsilon).sum())


@dataclass(frozen=True, kw_only=True)
class IntruderSettings:
    """The settings of `examine`."""

    k: int
    depth: int
    epsilon: float
    side: str
    method: str
    device: str
    dtype: str
    seed: int
    cache: FactorCache | None = None


def floor_of(matrix: Matrix, side: str) -> float:
    """Largest cosine of a random vector with the base's vectors of that side."""
    return linalg.random_floor(matrix.rows if side == "left" else matrix.columns)


@dataclass(frozen=True)
class FetchedMatrix:
    """A matrix read from both checkpoints."""

    matrix: Matrix
    stored: tuple[Tensor, Tensor] | None  # base and tuned; None if both hold the same bytes
    low: LowRank | None = None  # an adapter's delta, if it is a product of factors


def fetch(pair: CheckpointPair, names: list[str], device: str) -> list[FetchedMatrix]:
    """Read matrices from both checkpoints; for a GPU into pinned memory."""
    fetched = []
    for name in names:
        stored = None
        # Of an adapter the frozen matrices are known without reading.
        if not (pair.tuned.kind == "adapter" and pair.identical(name)):
            base, tuned = pair.read(name)
            stored = base, settled(base, tuned, dtypes=pair.dtypes(name))
        if stored is None or torch.equal(stored[0].to(stored[1].dtype), stored[1]):
            fetched.append(FetchedMatrix(pair.matrices[name], None))
            continue
        if device.startswith("cuda"):
            stored = stored[0].contiguous().pin_memory(), stored[1].contiguous().pin_memory()
        fetched.append(FetchedMatrix(pair.matrices[name], stored, pair.delta(name)))
    return fetched


def examine(
    pair: CheckpointPair, names: list[str], settings: IntruderSettings, verify: set[str]
) -> list[MatrixResult]:
    """Read and decide matrices of one shape; only names travel to a worker. `verify`: those decided again."""
    return examine_fetched(fetch(pair, names, settings.device), settings, verify)


def examine_fetched(
    fetched: list[FetchedMatrix], settings: IntruderSettings, verify: set[str]
) -> list[MatrixResult]:
    """Decide matrices of one shape that were read."""
    results = {item.matrix.name: MatrixResult(item.matrix, "frozen") for item in fetched}
    changed = [item for item in fetched if item.stored is not None]
    if changed:
        with linalg.threads_for(min(changed[0].matrix.rows, changed[0].matrix.columns)):
            label = "{0.matrix.name}, {0.matrix.rows}x{0.matrix.columns}".format
            for result in run_halving_on_oom(lambda part: _measure(part, settings, verify), changed, label):
                results[result.matrix.name] = result
    return list(results.values())


def examine_groups(
    pair: CheckpointPair, groups: list[list[str]], settings: IntruderSettings, verify: set[str]
) -> Generator[MatrixResult, None, None]:
    """Decide groups of matrices on the engine; in this process the next group is read meanwhile."""
    if not runs_in_this_process():
        calls = (partial(examine, pair, group, settings, verify.intersection(group)) for group in groups)
        for results in jobs.run_jobs(calls, device=settings.device):
            yield from results
        return
    with closing(prefetch(lambda group: fetch(pair, group, settings.device), groups)) as reading:
        for fetched in reading:
            results = examine_fetched(fetched, settings, verify)
            del fetched  # before the next but one is read
            yield from results


def _measure(
    changed: list[FetchedMatrix], settings: IntruderSettings, verify: set[str]
) -> list[MatrixResult]:
    matrices = [item.matrix for item in changed]
    generators = [
        torch.Generator(settings.device).manual_seed(zlib.crc32(matrix.name.encode()) ^ settings.seed)
        for matrix in matrices
    ]
    dtype = getattr(torch, settings.dtype)
    # Converted on the device: half precision halves the copy.
    sides = [
        [W.to(settings.device, non_blocking=True).to(dtype) for W in side]
        for side in zip(*(item.stored or () for item in changed), strict=True)
    ]
    updates = run_in_lockstep([
        update_of(base, tuned, item.low, generator)
        for item, base, tuned, generator in zip(changed, *sides, generators, strict=True)
    ])  # fmt: skip
    # A single matrix is not copied.
    bases, tuneds = (side[0][None] if len(side) == 1 else torch.stack(side) for side in sides)
    del sides
    if settings.side == "right":
        bases, tuneds = bases.mT.contiguous(), tuneds.mT.contiguous()
    recalls = [
        settings.cache.of(item.stored[0], base) if settings.cache and item.stored else NO_RECALL
        for item, base in zip(changed, bases, strict=True)
    ]
    depth = min(settings.depth, *bases.shape[1:])
    floor = floor_of(matrices[0], settings.side)
    applicable = depth >= settings.k and floor <= LARGEST_FLOOR * settings.epsilon
    if settings.method == "exact" or not applicable:
        decisions = [
            decide_exactly(base, tuned, depth, recall=recall)
            for base, tuned, recall in zip(bases, tuneds, recalls, strict=True)
        ]
    else:
        decisions = decide_all(bases, tuneds, depth, settings.epsilon, generators, True, recalls)
    status: Status = "measured" if applicable else "not applicable"
    results = []
    for i, (matrix, decision, update) in enumerate(zip(matrices, decisions, updates, strict=True)):
        verified = None
        if matrix.name in verify and applicable and not set(decision.tier) <= {"exact"}:
            exact = decide_exactly(bases[i], tuneds[i], depth, recall=recalls[i])
            verified = agrees(decision, exact, settings.epsilon)
            if not verified:
                log.warning(
                    "%s: the certified decision and the full decomposition differ; kept the latter",
                    matrix.name,
                )
                decision = exact
        results.append(MatrixResult(matrix, status, decision, update, verified))
    return results


def groups_of(pair: CheckpointPair, names: list[str], device: str) -> list[list[str]]:
    """Batches of matrices: of one shape on a GPU, single ones elsewhere."""
    if not device.startswith("cuda"):
        return [[name] for name in names]
    by_shape = defaultdict[tuple[int, int], list[str]](list)
    for name in names:
        by_shape[pair.matrices[name].rows, pair.matrices[name].columns].append(name)
    return [
        group[i : i + size]
        for (rows, columns), group in by_shape.items()
        for size in [max(1, BATCH_BYTES // (4 * rows * columns))]
        for i in range(0, len(group), size)
    ]


def agrees(decision: Decision, exact: Decision, epsilon: float) -> bool:
    """Whether a decision agrees with the full decomposition, up to vectors on the threshold."""
    near = np.abs(exact.low - epsilon) < ON_THRESHOLD
    same = (decision.high < epsilon) == (exact.low < epsilon)
    held = (decision.low <= exact.low + ON_THRESHOLD) & (exact.low <= decision.high + ON_THRESHOLD)
    return bool(((same & held) | near | np.isnan(exact.low)).all())
