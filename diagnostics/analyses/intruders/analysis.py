"""Intruder dimensions: leading singular vectors of a tuned matrix that the base lacks.

A left singular vector of the tuned matrix is an intruder when its largest absolute cosine with every left
singular vector of the base stays below epsilon.
Source: Shuttleworth et al., arXiv:2410.21228 v3, Algorithm 1; k and epsilon as in its released code.
"""

import logging
import math
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.intruders.decide import SMALL, Decision, decide_all, decide_exactly
from diagnostics.core.analysis import Result, analysis
from diagnostics.execution import jobs
from diagnostics.execution.engines import runs_in_this_process
from diagnostics.execution.lockstep import Steps, run_in_lockstep
from diagnostics.execution.prefetch import prefetch, run_halving_on_oom
from diagnostics.numerics import linalg
from diagnostics.numerics.estimates import Z95
from diagnostics.store.factor_cache import FactorCache, afresh
from probes import CheckpointPair
from probes.adapters.parts import LowRank
from probes.errors import InputError
from probes.files.layout import Matrix, Part

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

# The random floor may reach this share of epsilon; above it chance alone passes for "near the base".
LARGEST_FLOOR = 0.8
SWEEP_DEPTH = 50
# Columns of the random block from which the spectrum of a large delta is estimated.
PROBES = 16
EPSILONS = tuple(round(0.05 * i, 2) for i in range(2, 19))
# A cosine this near epsilon is within what float64 and the choice of a basis leave open.
ON_THRESHOLD = 1e-6
# Bytes of base matrices that a GPU decides side by side.
SIDE_BY_SIDE = 2**30
# A run of so many matrices or more decides some of them twice.
VERIFIED_FROM = 10
# Tuned and base with a smaller cosine between their entries have nothing in common.
UNRELATED = 0.1


@dataclass(frozen=True)
class DeltaShape:
    """The size and shape of the delta of one matrix.

    Attributes:
        norm, base_norm: Frobenius norms of delta and base.
        alignment: cosine of base and tuned as vectors of entries; near 0 for unrelated matrices.
        spectral_norm: largest singular value of the delta.
        effective_rank: `exp` of the entropy of its singular values, with a 95 % interval where estimated.
    """

    norm: float
    base_norm: float
    alignment: float
    spectral_norm: float
    effective_rank: float
    effective_rank_low: float
    effective_rank_high: float


def update_of(
    base: Float[Tensor, "out in"],
    tuned: Float[Tensor, "out in"],
    low: LowRank | None,
    generator: torch.Generator,
) -> Steps[DeltaShape]:
    """Measure the delta: exactly from an adapter's factors or a small matrix, else by Lanczos quadrature."""
    delta = tuned - base
    norms = [torch.linalg.vector_norm(W, dtype=torch.float64) for W in (base, tuned, delta)]
    known, small = low is not None and low.rank < min(base.shape), min(base.shape) < SMALL
    if low is not None and known:
        asked = linalg.product_core(low.B.to(base.device), low.A.to(base.device)) * abs(low.scaling)
    elif small:
        asked = torch.linalg.eigvalsh(linalg.gram(delta))
    else:
        asked = _krylov(delta, generator).projected()[0]
    del delta
    *norms, spectral = yield [*norms, asked]
    base_norm, tuned_norm, norm = map(float, norms)
    product = base_norm * tuned_norm
    # From the three norms: a second pass over both matrices would tell no more.
    alignment = (base_norm**2 + tuned_norm**2 - norm**2) / (2 * product) if product else math.nan
    found = torch.from_numpy(spectral)
    if not (known or small):
        return DeltaShape(norm, base_norm, alignment, *_estimated(found, norm, min(base.shape)))
    S = torch.linalg.svdvals(found) if known else found.clamp(min=0).sqrt().flip(0)
    rank = linalg.effective_rank(S)
    return DeltaShape(norm, base_norm, alignment, float(S[0]) if len(S) else 0.0, rank, rank, rank)


def _krylov(delta: Float[Tensor, "out in"], generator: torch.Generator) -> linalg.BlockKrylov:
    """A block Krylov space of the delta with a random start."""
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.mT
    start = torch.randn(1, wide.shape[0], PROBES, generator=generator, dtype=wide.dtype, device=wide.device)
    krylov = linalg.BlockKrylov(wide[None], start)
    krylov.extend(7)
    return krylov


def _estimated(
    projected: Float[Tensor, "space space"], norm: float, side: int
) -> tuple[float, float, float, float]:
    """Spectral norm, effective rank and its 95 % interval, from such a space.

    Args:
        projected: `BlockKrylov.projected`.
        norm: Frobenius norm of the delta.
        side: its smaller side.
    """
    values, vectors = linalg.descending(projected)
    weights, S = vectors[:PROBES].square(), values.sqrt()
    if values.sum() >= (1 - 1e-6) * norm**2:  # the space holds the whole delta: nothing to estimate
        rank = linalg.effective_rank(S)
        return float(S[0]), rank, rank, rank
    sizes, entropies = S, torch.special.entr(S)
    size, _ = linalg.spectral_sum(sizes, weights, side)
    entropy, _ = linalg.spectral_sum(entropies, weights, side)
    # ln Σs − Σ s ln s / Σs, and its error from the same probes by linearising.
    rank = math.exp(math.log(size) + entropy / size)
    _, error = linalg.spectral_sum(sizes * (1 - entropy / size) / size + entropies / size, weights, side)
    return float(S[0]), rank, rank * math.exp(-Z95 * error), rank * math.exp(Z95 * error)


@dataclass(frozen=True, kw_only=True)
class MatrixResult:
    """One matrix, measured or not.

    Attributes:
        status: `measured`; `frozen`, its bytes are the base's; `not applicable`, too small for epsilon or k.
        verified: whether the full decomposition agreed; None where it was not asked.
    """

    matrix: Matrix
    status: Literal["measured", "frozen", "not applicable"]
    decision: Decision | None = None
    update: DeltaShape | None = None
    verified: bool | None = None

    def below(self, k: int, epsilon: float) -> tuple[int, int]:
        """How many of the k leading vectors lie below epsilon, at least and at most."""
        if self.decision is None:
            return 0, 0
        return int((self.decision.high[:k] < epsilon).sum()), int((self.decision.low[:k] < epsilon).sum())


@dataclass(frozen=True, kw_only=True)
class IntruderSettings:
    """What `examine` needs to know, small enough to be sent to a worker."""

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
    """Largest cosine that a random vector reaches against the base's vectors of that side."""
    return linalg.random_floor(matrix.rows if side == "left" else matrix.columns)


@dataclass(frozen=True)
class FetchedMatrix:
    """A matrix as it was read.

    Attributes:
        stored: base and tuned; None where both hold the same bytes.
        low: what an adapter adds, where that is a product of factors.
    """

    matrix: Matrix
    stored: tuple[Tensor, Tensor] | None
    low: LowRank | None = None


def fetch(pair: CheckpointPair, names: list[str], device: str) -> list[FetchedMatrix]:
    """Read matrices and compare their two sides; for a GPU, into memory that it copies from by itself.

    Raises:
        InputError: NaN or infinite weights.
    """
    found = []
    for name in names:
        stored = None
        # An adapter's frozen matrices are known without reading.
        if not (pair.tuned.kind == "adapter" and pair.identical(name)):
            stored = pair.read(name)
        if stored is None or (stored[0].dtype == stored[1].dtype and torch.equal(*stored)):
            found.append(FetchedMatrix(pair.matrices[name], None))
            continue
        if device.startswith("cuda"):
            stored = stored[0].contiguous().pin_memory(), stored[1].contiguous().pin_memory()
        found.append(FetchedMatrix(pair.matrices[name], stored, pair.delta(name)))
    return found


def examine(
    pair: CheckpointPair, names: list[str], settings: IntruderSettings, verify: set[str]
) -> list[MatrixResult]:
    """Decide matrices of one shape: reads them, so that only their names travel to a worker.

    Args:
        verify: names to decide again by the full decomposition.

    Raises:
        InputError: NaN or infinite weights, or no room for a single matrix.
    """
    return examined(fetch(pair, names, settings.device), settings, verify)


def examined(found: list[FetchedMatrix], settings: IntruderSettings, verify: set[str]) -> list[MatrixResult]:
    """Decide matrices of one shape that were read."""
    results = {
        each.matrix.name: MatrixResult(matrix=each.matrix, status="frozen")
        for each in found
        if each.stored is None
    }
    changed = [each for each in found if each.stored is not None]
    if changed:
        with linalg.threads_for(min(changed[0].matrix.rows, changed[0].matrix.columns)):
            for each in run_halving_on_oom(lambda some: _measure(some, settings, verify), changed, _called):
                results[each.matrix.name] = each
    return [results[each.matrix.name] for each in found]


def _called(each: FetchedMatrix) -> str:
    return f"{each.matrix.name}, {each.matrix.rows}x{each.matrix.columns}"


def _all(
    pair: CheckpointPair, groups: list[list[str]], settings: IntruderSettings, verify: set[str]
) -> Generator[MatrixResult, None, None]:
    """Decide groups of matrices on the engine; in this process, the next group is read meanwhile."""
    if not runs_in_this_process():
        calls = (partial(examine, pair, group, settings, verify.intersection(group)) for group in groups)
        for made in jobs.run_jobs(calls, device=settings.device):
            yield from made
        return
    with closing(prefetch(lambda group: fetch(pair, group, settings.device), groups)) as reading:
        for found in reading:
            made = examined(found, settings, verify)
            del found  # before the next but one is read
            yield from made


def _measure(
    changed: list[FetchedMatrix], settings: IntruderSettings, verify: set[str]
) -> list[MatrixResult]:
    matrices = [each.matrix for each in changed]
    generators = [
        torch.Generator(settings.device).manual_seed(zlib.crc32(matrix.name.encode()) ^ settings.seed)
        for matrix in matrices
    ]
    dtype = getattr(torch, settings.dtype)
    # Converted there: half as much is to be copied.
    sides = [
        [W.to(settings.device, non_blocking=True).to(dtype) for W in side]
        for side in zip(*(each.stored or () for each in changed), strict=True)
    ]
    updates = run_in_lockstep(
        [
            update_of(base, tuned, each.low, generator)
            for each, base, tuned, generator in zip(changed, *sides, generators, strict=True)
        ]
    )
    # A single matrix is not copied.
    bases, tuneds = (side[0][None] if len(side) == 1 else torch.stack(side) for side in sides)
    del sides
    if settings.side == "right":
        bases, tuneds = bases.mT.contiguous(), tuneds.mT.contiguous()
    recalls = [
        settings.cache.of(each.stored[0], base) if settings.cache and each.stored else afresh
        for each, base in zip(changed, bases, strict=True)
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
    status: Literal["measured", "not applicable"] = "measured" if applicable else "not applicable"
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
        results.append(
            MatrixResult(matrix=matrix, status=status, decision=decision, update=update, verified=verified)
        )
    return results


def groups_of(pair: CheckpointPair, names: list[str], device: str) -> list[list[str]]:
    """What is decided side by side: on a GPU matrices of one shape, elsewhere every matrix alone."""
    if not device.startswith("cuda"):
        return [[name] for name in names]
    of_shape: dict[tuple[int, int], list[str]] = {}
    for name in names:
        matrix = pair.matrices[name]
        of_shape.setdefault((matrix.rows, matrix.columns), []).append(name)
    return [
        alike[i : i + size]
        for (rows, columns), alike in of_shape.items()
        for size in [max(1, SIDE_BY_SIDE // (4 * rows * columns))]
        for i in range(0, len(alike), size)
    ]


def agrees(decision: Decision, exact: Decision, epsilon: float) -> bool:
    """Whether a decision says what the full decomposition does, up to vectors on the threshold."""
    near = np.abs(exact.low - epsilon) < ON_THRESHOLD
    same = (decision.high < epsilon) == (exact.low < epsilon)
    held = (decision.low <= exact.low + ON_THRESHOLD) & (exact.low <= decision.high + ON_THRESHOLD)
    return bool(((same & held) | near | np.isnan(exact.low)).all())


METRICS = {
    "intruders": "leading directions of tuned that no base vector comes near, all matrices together",
    "intruders_per_matrix": "their mean over the matrices counted, frozen ones included",
    "intruders_per_changed_matrix": "their mean over the matrices that tuning changed",
    "rate": "their share of the directions examined",
    "matrices": "matrices counted, changed or frozen",
    "changed": "matrices that tuning changed",
    "frozen": "matrices that are bit for bit those of the base",
    "not_applicable": "matrices too small to tell a new direction from chance; not counted",
    "on_threshold": "directions so near epsilon that rounding decides",
    "verified": "matrices decided again by the full decomposition",
    "disagreements": "of these, matrices decided otherwise; 0 unless this program is at fault",
    "descendant": "0 when tuned does not descend from this base, and no intruders are counted",
    "intruders_in_full_finetune": "the intruders again, of a run said to be a full fine-tune",
}


def summary(result: Result) -> str:
    """How many of the directions examined are new, in how many matrices, and where most."""
    metrics, matrices = result.metrics, result.tables["matrices"]
    if not metrics["descendant"]:
        return "tuned does not descend from this base"
    if not metrics["changed"]:
        return f"none of the {metrics['matrices']} matrices that can be examined was changed"
    text = f"{metrics['intruders']} of {int(matrices['examined'].sum())} leading directions are new"
    flagged = matrices[matrices["intruders"] > 0]
    if len(flagged):
        most = int(flagged["intruders"].max())
        top = flagged.loc[flagged["intruders"] == most, "matrix"]
        where = f"most in {top.iloc[0]}" if len(top) == 1 else f"at most {most} in one"
        text += f", in {len(flagged)} of {metrics['matrices']} matrices, {where}"
    floor = matrices.loc[matrices["status"] == "measured", "floor"].max()
    return f"{text} (epsilon {result.parameters['epsilon']:g}, random floor at most {floor:.2g})"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.intruders import figures

    return figures.draw(result)


@analysis(
    "intruders",
    question="Did tuning add dominant directions that the base does not have?",
    reading=(
        "Every changed matrix gives its k leading singular vectors; one that no base vector comes near "
        "(|cosine| below epsilon) is an intruder. 0 is what full fine-tuning gave in the paper. There, more "
        "intruders went with more forgetting, but they are one cause among several, and full fine-tuning "
        "forgets without any: measure what must survive before you decide. A cosine near the random floor is "
        "chance."
    ),
    paper="arXiv:2410.21228",
    cost="two passes over the weights and seconds for a matrix of 4096 rows; no data, no model run",
    draw=draw,
    summary=summary,
    metrics=METRICS,
)
def intruder_dimensions(
    pair: CheckpointPair,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    side: Literal["left", "right"] = "left",
    method: Literal["certified", "exact"] = "certified",
    sweep: bool = False,
    verify: float = 0.01,
    parts: tuple[Part, ...] = ("block",),
    full_finetune: bool = False,
    device: str = "cpu",
    dtype: Literal["float32", "float64"] = "float32",
    seed: int = 0,
    cache: FactorCache | str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Count the intruder dimensions of every matrix of a pair.

    The count of the default method equals that of the full decomposition: every vector is decided by a bound
    that holds, or by the decomposition itself (`tier`). `cosine_low` and `cosine_high` enclose the cosine and
    are equal where it is exact. Estimates, with their intervals: `effective_rank` of a large dense delta.
    `critical_spike` is a law of random matrices, to be trusted within a factor of 2.

    Args:
        pair: base and tuned.
        k: leading singular vectors examined per matrix (paper: 10).
        epsilon: cosine in (0, 1] under which a vector counts as new (paper: 0.5).
        side: singular vectors of the output (`left`, the paper's) or of the input (`right`).
        method: `certified` decides in tiers; `exact` decomposes every matrix in float64.
        sweep: exact cosines of up to 50 vectors a matrix, so that every (k, epsilon) is known.
        verify: share of the matrices decided again by the full decomposition, at least one, in a run of ten
            or more.
        parts: of the model: `block` (the paper's), `embedding`, `head`, `router`, `other`.
        full_finetune: say that tuned is a full fine-tune: then any intruder is a finding.
        device: where the arithmetic runs.
        dtype: of the products in the certified tiers; small and exact arithmetic is float64.
        seed: of the random starting blocks and of the choice of matrices to verify.
        cache: a directory that keeps what was made of the base for the next model tuned from it; the result
            is the same bit for bit, with or without.
        progress: called with (done, total, name).

    Metrics: `intruders` (count), `intruders_per_matrix` (mean over `matrices`, frozen ones included),
        `intruders_per_changed_matrix`, `rate` (share of the directions examined), `matrices`, `changed`,
        `frozen`, `not_applicable`, `verified`, `disagreements`, `on_threshold`, `descendant` (0: tuned does
        not descend from this base, and no intruders are counted).
    Tables: `matrices`, `vectors`, `layers`, `components`, `sweep`, `spectra`, `cosines`.

    Raises:
        InputError: a parameter out of range, no matrix to examine, NaN or infinite weights.
    """
    _check(k, epsilon, verify, side, method, dtype)
    names = [name for name, matrix in pair.matrices.items() if matrix.part in parts]
    if not names:
        present = sorted({matrix.part for matrix in pair.matrices.values()})
        raise InputError(f"no matrix in parts {', '.join(parts)}; this pair has: {', '.join(present)}")
    sides = [min(pair.matrices[name].rows, pair.matrices[name].columns) for name in names]
    if k > max(sides):
        raise InputError(
            f"k is {k}, but the largest matrix has only {max(sides)} singular vectors; choose a smaller k"
        )
    settings = IntruderSettings(
        k=k,
        depth=max(k, SWEEP_DEPTH) if sweep else k,
        epsilon=epsilon,
        side=side,
        method="exact" if sweep else method,
        device=device,
        dtype=dtype,
        seed=seed,
        cache=FactorCache.at(cache),
    )
    shuffled = np.random.default_rng(seed).permutation(names)
    chosen = set(shuffled[: math.ceil(verify * len(names))])
    if len(names) < VERIFIED_FROM or settings.method == "exact":
        chosen = set()
    results: list[MatrixResult] = []
    with closing(_all(pair, groups_of(pair, names, device), settings, chosen)) as decided:
        for one in decided:
            results.append(one)
            if progress:
                progress(len(results), len(names), one.matrix.name)
    order = {name: i for i, name in enumerate(names)}
    results.sort(key=lambda one: order[one.matrix.name])
    if chosen and not any(each.verified is not None for each in results):
        # Those chosen were frozen or small enough to be decomposed anyway: take one decided in tiers.
        for i, each in enumerate(results):
            if each.decision is not None and not set(each.decision.tier) <= {"exact"}:
                [results[i]] = examine(pair, [each.matrix.name], settings, {each.matrix.name})
                break
    return summarise(results, k=k, epsilon=epsilon, side=side, full_finetune=full_finetune)


def _check(k: int, epsilon: float, verify: float, side: str, method: str, dtype: str) -> None:
    if k < 1:
        raise InputError(f"k is {k}; it counts the leading singular vectors examined and starts at 1")
    if not 0 < epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; it is a cosine and lies in (0, 1]")
    if not 0 <= verify <= 1:
        raise InputError(f"verify is {verify}; it is a share of the matrices and lies in [0, 1]")
    for name, value, known in (
        ("side", side, ("left", "right")),
        ("method", method, ("certified", "exact")),
        ("dtype", dtype, ("float32", "float64")),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; it is one of: {', '.join(known)}")


def summarise(
    results: list[MatrixResult], *, k: int, epsilon: float, side: str, full_finetune: bool
) -> Result:
    """Metrics, tables and notes of the matrices of one pair."""
    import pandas as pd

    matrices = pd.DataFrame([_matrix_row(each, k, epsilon, side) for each in results])
    vectors = pd.DataFrame(
        [row for each in results for row in _vector_rows(each, k, epsilon)], columns=VECTOR_COLUMNS
    )
    tables = {"matrices": matrices, "vectors": vectors}
    counted = matrices[matrices["status"] != "not applicable"]
    measured = matrices[matrices["status"] == "measured"]
    metrics: dict[str, float | int] = {
        "matrices": len(counted),
        "changed": len(measured),
        "frozen": len(counted) - len(measured),
        "not_applicable": len(matrices) - len(counted),
    }
    notes = []
    if metrics["not_applicable"]:
        notes.append(
            f"{metrics['not_applicable']} matrices are too small: they have fewer than k = {k} vectors, or "
            f"chance alone reaches {LARGEST_FLOOR:g} of epsilon = {epsilon:g}. They are not counted; a "
            "larger epsilon admits more."
        )
    checked = [each.verified for each in results if each.verified is not None]
    if checked:
        metrics |= {"verified": len(checked), "disagreements": checked.count(False)}
        notes.append(
            f"{len(checked)} of {len(measured)} changed matrices were decided again by the full "
            f"decomposition in float64; {checked.count(False) or 'none'} differed."
        )
    descends = _descends(measured, vectors, k)
    metrics["descendant"] = int(descends)
    if not descends:
        notes.append(
            "Tuned is not a descendant of this base: its entries do not correlate with the base's, and its "
            "leading directions lie where chance puts them. Intruders are not counted; give the base that it "
            "was tuned from."
        )
        return Result(metrics=metrics, tables=tables, notes=tuple(notes))
    if len(counted):
        found = int(measured["intruders"].sum())
        examined = int(measured["examined"].sum())
        metrics |= {
            "intruders": found,
            "intruders_per_matrix": found / len(counted),
            "intruders_per_changed_matrix": found / len(measured) if len(measured) else 0.0,
            "rate": found / examined if examined else 0.0,
            "on_threshold": int(vectors["on_threshold"].sum()),
        }
        if full_finetune:
            metrics["intruders_in_full_finetune"] = found
    for table, column in (("layers", "layer"), ("components", "component")):
        tables[table] = _grouped(counted, column)
    tables |= _pictures(results, k, epsilon)
    tables["sweep"] = _sweep(results, epsilon)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


VECTOR_COLUMNS = [
    "matrix", "layer", "component", "rank", "singular_value", "cosine_low", "cosine_high", "tier", "intruder",
    "on_threshold",
]  # fmt: skip


def _matrix_row(each: MatrixResult, k: int, epsilon: float, side: str) -> dict[str, Any]:
    matrix, decision, update = each.matrix, each.decision, each.update
    row: dict[str, Any] = {
        "matrix": matrix.name,
        "layer": math.nan if matrix.layer is None else matrix.layer,
        "component": matrix.component,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "status": each.status,
        "intruders": each.below(k, epsilon)[0] if each.status != "not applicable" else math.nan,
        "examined": 0,
        "floor": floor_of(matrix, side),
    }
    if decision is not None and update is not None:
        present = ~np.isnan(decision.low[:k])
        row |= {
            "examined": int(present.sum()) if each.status == "measured" else 0,
            "min_cosine_low": np.nanmin(decision.low[:k], initial=1.0),
            "min_cosine_high": np.nanmin(decision.high[:k], initial=1.0),
            "leading_ratio": decision.singular_values[0] / decision.base_values[0],
            "update_norm": update.norm,
            "relative_update": update.norm / update.base_norm if update.base_norm else math.nan,
            "alignment": update.alignment,
            "update_spectral_norm": update.spectral_norm,
            "effective_rank": update.effective_rank,
            "effective_rank_low": update.effective_rank_low,
            "effective_rank_high": update.effective_rank_high,
            "critical_spike": decision.critical,
            "critical_ratio": update.spectral_norm / decision.critical if decision.critical else math.nan,
        }
    return row


def _vector_rows(each: MatrixResult, k: int, epsilon: float) -> Iterable[dict[str, Any]]:
    if each.decision is None:
        return
    d, matrix = each.decision, each.matrix
    for j in range(len(d.low)):
        yield {
            "matrix": matrix.name,
            "layer": math.nan if matrix.layer is None else matrix.layer,
            "component": matrix.component,
            "rank": j + 1,
            "singular_value": d.singular_values[j],
            "cosine_low": d.low[j],
            "cosine_high": d.high[j],
            "tier": d.tier[j],
            "intruder": bool(d.high[j] < epsilon and j < k and each.status == "measured"),
            "on_threshold": bool(
                d.low[j] == d.high[j] and abs(d.low[j] - epsilon) < ON_THRESHOLD and each.status == "measured"
            ),
        }


def _descends(measured: "pd.DataFrame", vectors: "pd.DataFrame", k: int) -> bool:
    """Whether tuned descends from base.

    The methods' rule, median of cosine over floor below 2, alone would disown a small model whose adapter put
    intruders in most slots: there twice the floor is above epsilon. Unrelated matrices have uncorrelated
    entries as well.
    """
    if not len(measured):
        return True
    seen = vectors[vectors["rank"] <= k].merge(measured[["matrix", "floor"]], on="matrix")
    near = (seen["cosine_low"] / seen["floor"]).median()
    return not (near < 2 and measured["alignment"].median() < UNRELATED)


def _grouped(counted: "pd.DataFrame", column: str) -> "pd.DataFrame":
    groups = counted.groupby(column, sort=column == "layer")
    table = groups.agg(
        intruders=("intruders", "sum"), examined=("examined", "sum"), matrices=("matrix", "size")
    ).reset_index()
    table["intruders_per_matrix"] = table["intruders"] / table["matrices"]
    return table.assign(
        rate=(table["intruders"] / table["examined"].where(table["examined"] > 0)).fillna(0.0)
    )


def _pictures(results: list[MatrixResult], k: int, epsilon: float) -> "dict[str, pd.DataFrame]":
    """Singular values and cosine maps of the flagged matrices."""
    import pandas as pd

    spectra, cosines = [], []
    for each in results:
        if each.decision is None or each.status != "measured" or not each.below(k, epsilon)[0]:
            continue
        d, name = each.decision, each.matrix.name
        length = min(len(d.base_values), len(d.tuned_values))
        spectra.append(
            pd.DataFrame(
                {
                    "matrix": name,
                    "rank": np.arange(1, length + 1),
                    "base": d.base_values[:length],
                    "tuned": d.tuned_values[:length],
                }
            )
        )
        tuned, base = np.indices(d.overlap.shape)
        cosines.append(
            pd.DataFrame(
                {
                    "matrix": name,
                    "tuned_rank": tuned.ravel() + 1,
                    "base_rank": base.ravel() + 1,
                    "cosine": d.overlap.ravel(),
                }
            )
        )
    return {
        name: pd.concat(frames, ignore_index=True)
        for name, frames in (("spectra", spectra), ("cosines", cosines))
        if frames
    }


def _sweep(results: list[MatrixResult], epsilon: float) -> "pd.DataFrame":
    """Counts for other k and epsilon: at least and at most what the intervals allow."""
    import pandas as pd

    measured = [each for each in results if each.status == "measured" and each.decision is not None]
    depth = max((len(each.decision.low) for each in measured if each.decision), default=0)
    rows = []
    for k in range(1, depth + 1):
        for threshold in sorted({*EPSILONS, epsilon}):
            counts = [each.below(k, threshold) for each in measured]
            rows.append((k, threshold, sum(low for low, _ in counts), sum(high for _, high in counts)))
    return pd.DataFrame(rows, columns=["k", "epsilon", "intruders_low", "intruders_high"])
