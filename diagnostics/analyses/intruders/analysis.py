"""Intruder dimensions: leading singular vectors of a tuned matrix that the base lacks.

A left singular vector of the tuned matrix is an intruder when its largest absolute cosine with every left
singular vector of the base stays below epsilon.
Source: Shuttleworth et al., arXiv:2410.21228 v3, Algorithm 1; k and epsilon as in its released code.
"""

import logging
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diagnostics.analyses.intruders.decide import SMALL, Decision, decide_all, decide_exactly
from diagnostics.analyses.intruders.figures import draw
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.execution import jobs
from diagnostics.execution.engines import runs_in_this_process
from diagnostics.execution.lockstep import Steps, run_in_lockstep
from diagnostics.execution.prefetch import prefetch, run_halving_on_oom
from diagnostics.numerics import linalg
from diagnostics.numerics.estimates import Z95
from diagnostics.store.factor_cache import NO_RECALL, FactorCache
from probes import CheckpointPair
from probes.adapters.parts import LowRank
from probes.checkpoints.rounding import settled
from probes.errors import InputError
from probes.files.layout import Matrix, Part

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

# Largest share of epsilon that the random floor may reach; above it chance alone counts as near the base.
LARGEST_FLOOR = 0.8
SWEEP_DEPTH = 50
# Columns of the random block from which the spectrum of a large delta is estimated.
PROBES = 16
EPSILONS = tuple(round(0.05 * i, 2) for i in range(2, 19))
# A cosine this near epsilon is undecided by float64 and by the choice of a basis.
ON_THRESHOLD = 1e-6
# Bytes of base matrices that a GPU decides in one batch.
BATCH_BYTES = 2**30
# With this many matrices or more, some are verified.
VERIFIED_FROM = 10
# A cosine between the entries of base and tuned below this means unrelated matrices.
UNRELATED = 0.1
# Frozen: its bytes are the base's. Not applicable: too small for epsilon or k.
Status: TypeAlias = Literal["measured", "frozen", "not applicable"]


@dataclass(frozen=True)
class DeltaShape:
    """Norms and spectrum of the delta of one matrix."""

    norm: float  # Frobenius
    base_norm: float
    alignment: float  # cosine of base and tuned as vectors of entries; near 0 for unrelated matrices
    spectral_norm: float
    effective_rank: float  # exp of the entropy of the singular values, with a 95 % interval where estimated
    effective_rank_low: float
    effective_rank_high: float


def update_of(
    base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"], low: LowRank | None,
    generator: torch.Generator,
) -> Steps[DeltaShape]:  # fmt: skip
    """Measure the delta: exactly from an adapter's factors or a small matrix, else by Lanczos quadrature."""
    delta = tuned - base
    norms = [torch.linalg.vector_norm(W, dtype=torch.float64) for W in (base, tuned, delta)]
    factored, small = low is not None and low.rank < min(base.shape), min(base.shape) < SMALL
    if low is not None and factored:
        spectral = linalg.product_core(low.B.to(base.device), low.A.to(base.device)) * abs(low.scaling)
    elif small:
        spectral = torch.linalg.eigvalsh(linalg.gram(delta))
    else:
        spectral = _krylov(delta, generator).projected()[0]
    del delta
    *norms, on_cpu = yield [*norms, spectral]
    base_norm, tuned_norm, norm = map(float, norms)
    product = base_norm * tuned_norm
    # From the three norms, which saves another pass over both matrices.
    alignment = (base_norm**2 + tuned_norm**2 - norm**2) / (2 * product) if product else math.nan
    spectral = torch.from_numpy(on_cpu)
    if not (factored or small):
        return DeltaShape(norm, base_norm, alignment, *_estimated(spectral, norm, min(base.shape)))
    S = torch.linalg.svdvals(spectral) if factored else spectral.clamp(min=0).sqrt().flip(0)
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
    """Spectral norm, effective rank and its 95 % interval, from a Krylov space of a delta of this norm."""
    values, vectors = linalg.descending(projected)
    weights, S = vectors[:PROBES].square(), values.sqrt()
    if values.sum() >= (1 - 1e-6) * norm**2:  # the space holds the whole delta: nothing to estimate
        rank = linalg.effective_rank(S)
        return float(S[0]), rank, rank, rank
    entropies = torch.special.entr(S)
    size, _ = linalg.spectral_sum(S, weights, side)
    entropy, _ = linalg.spectral_sum(entropies, weights, side)
    # ln Σs − Σ s ln s / Σs, and its error from the same probes by linearising.
    rank = math.exp(math.log(size) + entropy / size)
    _, error = linalg.spectral_sum(S * (1 - entropy / size) / size + entropies / size, weights, side)
    return float(S[0]), rank, rank * math.exp(-Z95 * error), rank * math.exp(Z95 * error)


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


def _examine_groups(
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


METRICS = {
    "intruders": "leading singular vectors of tuned that no base vector comes near, summed over matrices",
    "intruders_per_matrix": "mean number of intruders per counted matrix, frozen ones included",
    "intruders_per_changed_matrix": "mean number of intruders per matrix that tuning changed",
    "rate": "intruders as a share of the vectors examined",
    "matrices": "matrices counted, changed or frozen",
    "changed": "matrices that tuning changed",
    "frozen": "matrices with the base's bytes",
    "not_applicable": "matrices too small to tell a new direction from chance; not counted",
    "on_threshold": "vectors so near epsilon that rounding decides",
    "verified": "matrices decided again by the full decomposition",
    "disagreements": "verified matrices with another outcome; not 0 is a fault of this program",
    "descendant": "0 if tuned does not descend from this base; then no intruders are counted",
    "intruders_in_full_finetune": "intruders of a pair declared a full fine-tune",
}


def summary(result: Result) -> str:
    """How many of the examined directions are new, and in which matrices."""
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


@analysis(
    "intruders",
    question="Did tuning add dominant directions that the base does not have?",
    reading=(
        "The k leading singular vectors of every changed matrix are examined. One whose |cosine| with every "
        "base vector is below epsilon is an intruder. Full fine-tuning had 0 in the paper. There, more "
        "intruders went with more forgetting, but they are one cause among several, and full fine-tuning "
        "forgets without any: measure forgetting on keep rows before you decide. A cosine near the random "
        "floor is chance."
    ),
    paper="arXiv:2410.21228",
    cost="two passes over the weights and seconds for a matrix of 4096 rows; no data, no model run",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    unshared=("dtype",),
    device_test=DeviceTest(absolute={"intruders": 0, "matrices": 0, "changed": 0, "frozen": 0}),
)
def intruder_dimensions(
    pair: CheckpointPair, *, k: int = 10, epsilon: float = 0.5, side: Literal["left", "right"] = "left",
    method: Literal["certified", "exact"] = "certified", sweep: bool = False, verify: float = 0.01,
    parts: tuple[Part, ...] = ("block",), full_finetune: bool = False, device: str = "cpu",
    dtype: Literal["float32", "float64"] = "float32", seed: int = 0,
    cache: FactorCache | str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:  # fmt: skip
    """Count the intruder dimensions of every matrix of a pair.

    The default method has the counts of the full decomposition: a vector is decided by a bound that holds, or
    by the decomposition itself.

    Args:
        pair: base and tuned.
        k: leading singular vectors examined per matrix (paper: 10).
        epsilon: cosine in (0, 1] under which a vector counts as new (paper: 0.5).
        side: singular vectors of the output (`left`, the paper's) or of the input (`right`).
        method: `certified` decides in tiers; `exact` decomposes every matrix in float64.
        sweep: compute exact cosines of up to 50 vectors per matrix, for every (k, epsilon).
        verify: share of the matrices decided again by the full decomposition, at least one; only with ten
            matrices or more.
        parts: of the model: `block` (the paper's), `embedding`, `head`, `router`, `other`.
        full_finetune: declare tuned a full fine-tune: then any intruder is a finding.
        device: where the arithmetic runs.
        dtype: of the products in the certified tiers; small and exact arithmetic is float64.
        seed: of the random starting blocks and of the choice of matrices to verify.
        cache: a directory for intermediate results of the base, reused for the next model tuned from it; the
            result is bit for bit the same without.
        progress: called with (done, total, name).

    Metrics: listed with their meanings in the registration's `metrics`.

    Tables:
        `matrices`: one row a matrix: matrix, layer, component, rows, columns (counts), status (measured,
            frozen or not applicable), intruders, examined (counts), floor (largest random cosine),
            min_cosine_low, min_cosine_high (bounds), leading_ratio (of the largest singular values, tuned to
            base), update_norm (Frobenius), relative_update (to base), alignment (cosine of the entries of
            base and tuned), update_spectral_norm, effective_rank, effective_rank_low, effective_rank_high
            (95 % interval where estimated), critical_spike (size that a random rank-one spike needs to become
            a leading vector; good to a factor of 2), critical_ratio (update_spectral_norm to it).
        `vectors`: one row a vector: matrix, layer, component, rank (from 1), singular_value, cosine_low,
            cosine_high (bounds on the largest |cosine| with a base vector), tier (subspace, direct, factor or
            exact), intruder, on_threshold (booleans).
        `layers`: one row a layer: layer, intruders, examined, matrices (counts), intruders_per_matrix, rate.
        `components`: one row a component: component, intruders, examined, matrices (counts),
            intruders_per_matrix, rate (share of the vectors examined).
        `sweep`: one row a k and epsilon: k, epsilon, intruders_low, intruders_high (bounds on the count).
        `spectra`: one row a rank of a matrix with intruders: matrix, rank, base, tuned (singular values).
        `cosines`: one row a pair of its vectors: matrix, tuned_rank, base_rank, cosine (absolute).

    Raises:
        InputError: a parameter out of range, no matrix to examine, NaN or infinite weights.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r1")
        >>> intruder_dimensions(pair, parts=("embedding",)).metrics["changed"]
        0
    """
    _check(k, epsilon, verify, side, method, dtype)
    names = [name for name, matrix in pair.matrices.items() if matrix.part in parts]
    if not names:
        present = sorted({matrix.part for matrix in pair.matrices.values()})
        raise InputError(f"no matrix in parts {', '.join(parts)}; this pair has: {', '.join(present)}")
    most = max(min(pair.matrices[name].rows, pair.matrices[name].columns) for name in names)
    if k > most:
        raise InputError(
            f"k is {k}, but the largest matrix has only {most} singular vectors; choose a smaller k"
        )
    settings = IntruderSettings(
        k=k, depth=max(k, SWEEP_DEPTH) if sweep else k, epsilon=epsilon, side=side, device=device, seed=seed,
        dtype=dtype, method="exact" if sweep else method, cache=FactorCache.at(cache),
    )  # fmt: skip
    chosen: set[str] = set()
    if len(names) >= VERIFIED_FROM and settings.method != "exact":
        chosen = set(np.random.default_rng(seed).permutation(names)[: math.ceil(verify * len(names))])
    results: list[MatrixResult] = []
    with closing(_examine_groups(pair, groups_of(pair, names, device), settings, chosen)) as decided:
        for result in decided:
            results.append(result)
            if progress:
                progress(len(results), len(names), result.matrix.name)
    order = {name: i for i, name in enumerate(names)}
    results.sort(key=lambda result: order[result.matrix.name])
    if chosen and not any(result.verified is not None for result in results):
        # The chosen ones were frozen or decomposed anyway: verify the first that was decided in tiers.
        for i, result in enumerate(results):
            if result.decision is not None and not set(result.decision.tier) <= {"exact"}:
                [results[i]] = examine(pair, [result.matrix.name], settings, {result.matrix.name})
                break
    return summarise(results, k=k, epsilon=epsilon, side=side, full_finetune=full_finetune)


def _check(k: int, epsilon: float, verify: float, side: str, method: str, dtype: str) -> None:
    if k < 1:
        raise InputError(f"k is {k}; it counts the leading singular vectors examined and starts at 1")
    if not 0 < epsilon <= 1:
        raise InputError(f"epsilon is {epsilon}; it is a cosine and lies in (0, 1]")
    if not 0 <= verify <= 1:
        raise InputError(f"verify is {verify}; it is a share of the matrices and lies in [0, 1]")
    choices = {"side": ("left", "right"), "method": ("certified", "exact"), "dtype": ("float32", "float64")}
    for value, (name, allowed) in zip((side, method, dtype), choices.items(), strict=True):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; it is one of: {', '.join(allowed)}")


def summarise(
    results: list[MatrixResult], *, k: int, epsilon: float, side: str, full_finetune: bool
) -> Result:
    """Metrics, tables and notes of the matrices of one pair."""
    import pandas as pd

    matrices = pd.DataFrame([_matrix_row(result, k, epsilon, side) for result in results])
    vector_rows = [row for result in results for row in _vector_rows(result, k, epsilon)]
    vectors = pd.DataFrame(vector_rows, columns=VECTOR_COLUMNS)
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
            f"{metrics['not_applicable']} matrices are too small and not counted: they have fewer than "
            f"k = {k} vectors, or the random floor exceeds {LARGEST_FLOOR:g} of epsilon = {epsilon:g}. A "
            "larger epsilon admits more."
        )
    checked = [result.verified for result in results if result.verified is not None]
    if checked:
        metrics |= {"verified": len(checked), "disagreements": checked.count(False)}
        notes.append(
            f"{len(checked)} of {len(measured)} changed matrices were decided again by the full "
            f"decomposition in float64; {checked.count(False) or 'none'} differed."
        )
    metrics["descendant"] = int(_descends(measured, vectors, k))
    if not metrics["descendant"]:
        notes.append(
            "Tuned is not a descendant of this base: its entries do not correlate with the base's, and the "
            "cosines of its leading directions are at the random floor. Intruders are not counted; give the "
            "base that it was tuned from."
        )
        return Result(metrics=metrics, tables=tables, notes=tuple(notes))
    if len(counted):
        intruders, examined = int(measured["intruders"].sum()), int(measured["examined"].sum())
        metrics |= {
            "intruders": intruders,
            "intruders_per_matrix": intruders / len(counted),
            "intruders_per_changed_matrix": intruders / len(measured) if len(measured) else 0.0,
            "rate": intruders / examined if examined else 0.0,
            "on_threshold": int(vectors["on_threshold"].sum()),
        }
        if full_finetune:
            metrics["intruders_in_full_finetune"] = intruders
    tables |= {f"{column}s": _grouped(counted, column) for column in ("layer", "component")}
    tables |= _flagged_tables(results, k, epsilon) | {"sweep": _sweep(results, epsilon)}
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


VECTOR_COLUMNS = [
    "matrix", "layer", "component", "rank", "singular_value", "cosine_low", "cosine_high", "tier", "intruder",
    "on_threshold",
]  # fmt: skip


def _matrix_row(result: MatrixResult, k: int, epsilon: float, side: str) -> dict[str, Any]:
    matrix, decision, update = result.matrix, result.decision, result.update
    intruders = result.below(k, epsilon)[0] if result.status != "not applicable" else math.nan
    row = _location(matrix) | {
        "rows": matrix.rows, "columns": matrix.columns, "status": result.status, "intruders": intruders,
        "examined": 0, "floor": floor_of(matrix, side),
    }  # fmt: skip
    if decision is not None and update is not None:
        row |= {
            "examined": int((~np.isnan(decision.low[:k])).sum()) if result.status == "measured" else 0,
            "min_cosine_low": np.nanmin(decision.low[:k], initial=1.0),
            "min_cosine_high": np.nanmin(decision.high[:k], initial=1.0),
            "leading_ratio": decision.singular_values[0] / decision.base_values[0],
            "update_norm": update.norm,
            "relative_update": update.norm / update.base_norm if update.base_norm else math.nan,
            "alignment": update.alignment, "update_spectral_norm": update.spectral_norm,
            "effective_rank": update.effective_rank, "effective_rank_low": update.effective_rank_low,
            "effective_rank_high": update.effective_rank_high, "critical_spike": decision.critical,
            "critical_ratio": update.spectral_norm / decision.critical if decision.critical else math.nan,
        }  # fmt: skip
    return row


def _location(matrix: Matrix) -> dict[str, Any]:
    layer = math.nan if matrix.layer is None else matrix.layer
    return {"matrix": matrix.name, "layer": layer, "component": matrix.component}


def _vector_rows(result: MatrixResult, k: int, epsilon: float) -> Iterable[dict[str, Any]]:
    if result.decision is None:
        return
    d, measured = result.decision, result.status == "measured"
    for j, (low, high) in enumerate(zip(d.low, d.high, strict=True)):
        yield _location(result.matrix) | {
            "rank": j + 1, "singular_value": d.singular_values[j], "cosine_low": low, "cosine_high": high,
            "tier": d.tier[j], "intruder": bool(high < epsilon and j < k and measured),
            "on_threshold": bool(low == high and abs(low - epsilon) < ON_THRESHOLD and measured),
        }  # fmt: skip


def _descends(measured: "pd.DataFrame", vectors: "pd.DataFrame", k: int) -> bool:
    """Whether tuned descends from base."""
    if not len(measured):
        return True
    # A ratio below 2 alone would reject a small model whose adapter put intruders in most slots: there twice
    # the floor is above epsilon. Unrelated matrices also have uncorrelated entries.
    leading = vectors[vectors["rank"] <= k].merge(measured[["matrix", "floor"]], on="matrix")
    ratio = (leading["cosine_low"] / leading["floor"]).median()
    return not (ratio < 2 and measured["alignment"].median() < UNRELATED)


def _grouped(counted: "pd.DataFrame", column: str) -> "pd.DataFrame":
    groups = counted.groupby(column, sort=column == "layer")
    table = groups.agg(
        intruders=("intruders", "sum"), examined=("examined", "sum"), matrices=("matrix", "size")
    ).reset_index()
    rate = (table["intruders"] / table["examined"].where(table["examined"] > 0)).fillna(0.0)
    return table.assign(intruders_per_matrix=table["intruders"] / table["matrices"], rate=rate)


def _flagged_tables(results: list[MatrixResult], k: int, epsilon: float) -> "dict[str, pd.DataFrame]":
    """Singular values and cosines of the matrices with intruders."""
    import pandas as pd

    spectra, cosines = [], []
    for result in results:
        if result.decision is None or result.status != "measured" or not result.below(k, epsilon)[0]:
            continue
        d, name = result.decision, result.matrix.name
        size = min(len(d.base_values), len(d.tuned_values))
        values = {"rank": np.arange(size) + 1, "base": d.base_values[:size], "tuned": d.tuned_values[:size]}
        spectra.append(pd.DataFrame({"matrix": name, **values}))
        rows, columns = np.indices(d.overlap.shape).reshape(2, -1) + 1
        cells = {"matrix": name, "tuned_rank": rows, "base_rank": columns, "cosine": d.overlap.ravel()}
        cosines.append(pd.DataFrame(cells))
    if not spectra:
        return {}
    return {
        "spectra": pd.concat(spectra, ignore_index=True),
        "cosines": pd.concat(cosines, ignore_index=True),
    }


def _sweep(results: list[MatrixResult], epsilon: float) -> "pd.DataFrame":
    """Bounds on the number of intruders for other k and epsilon."""
    import pandas as pd

    measured = [result for result in results if result.status == "measured"]
    depth = max((len(result.decision.low) for result in measured if result.decision), default=0)
    rows = [
        (k, threshold, *np.sum([result.below(k, threshold) for result in measured], axis=0))
        for k, threshold in product(range(1, depth + 1), sorted({*EPSILONS, epsilon}))
    ]
    return pd.DataFrame(rows, columns=["k", "epsilon", "intruders_low", "intruders_high"])
