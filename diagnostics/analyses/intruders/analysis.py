"""Intruder dimensions: leading singular vectors of a tuned matrix that the base lacks.

A left singular vector of the tuned matrix is an intruder when its largest absolute cosine with every left
singular vector of the base stays below epsilon.
Source: Shuttleworth et al., arXiv:2410.21228 v3, Algorithm 1; k and epsilon as in its released code.
"""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np

from diagnostics.analyses.intruders.examine import (
    IntruderSettings,
    MatrixResult,
    examine,
    examine_groups,
    groups_of,
)
from diagnostics.analyses.intruders.figures import draw
from diagnostics.analyses.intruders.tables import summarise
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.store.factor_cache import FactorCache
from probes import CheckpointPair
from probes.errors import InputError
from probes.files.layout import Part

SWEEP_DEPTH = 50
# With this many matrices or more, some are verified.
VERIFIED_FROM = 10

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
    with closing(examine_groups(pair, groups_of(pair, names, device), settings, chosen)) as decided:
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
