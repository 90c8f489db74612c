"""The straight line from base to tuned: is there a better model in between, or a hole?

θ(α) = (1 − α) base + α tuned is run at every α on every set of rows. A dip is a better model in between, a
bump a hole: averaging, scaling back and reusing the delta are then unsafe. Tuned is dominated where some α is
as good on the task and better on what must be kept.
Sources: Wortsman et al., arXiv:2109.01903 (the path and its grid); Lin et al., arXiv:2309.17230
(FalseFalseTrue, overconfidence); Wortsman et al., arXiv:2203.05482 (averaging). Bump, dip and domination
are ours: on a steep curve the usual barrier, an excess over the chord, is not a hole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.interpolation import (
    ALPHAS,
    PathEvaluator,
    check_alphas,
    model_notes,
    path_rows,
    pattern_rows,
    pinned_note,
    pooled,
    set_rows,
)
from diagnostics.evaluation.sets import sets_of
from probes import CheckpointPair
from probes.models.interpolated import InterpolatedModel
from probes.models.two_sided import TwoSidedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROLES = ("task", "keep", "ood")

METRICS = {
    "dominated": "1 where some α is as good on the task and better on what must be kept, else 0",
    "best_alpha": "the α to take: no worse than tuned on the task, the best on the other rows; 1 is tuned",
    "kept_nats": "loss that this α takes off tuned's on the keep rows",
    "task_cost_nats": "loss that it adds to tuned's on the task",
    "strong_failures": "OOD sets on which some α is surely worse than both ends",
    "successes": "OOD sets on which some α is surely better than both ends",
    **{
        f"{name}_{role}_nats": f"{text} on the {role} rows, the largest of several sets"
        for name, text in (
            ("bump", "most by which the path lies above both ends"),
            ("dip", "most by which it lies below both ends"),
            ("barrier", "most by which it lies above the straight line between the ends"),
        )
        for role in ROLES
    },
    **{
        f"{side}_{role}_nats": f"mean loss of {side} on the {role} rows, per token or row"
        for role in ROLES
        for side in ("base", "tuned")
    },
    "fft_ood": "share of OOD units that both ends get wrong and the best α right",
    "ttf_ood": "share that both get right and the best α wrong",
    "confidence_ratio_ood": "mean probability of the likeliest answer, tuned over base, on the OOD rows",
    "error_confidence_rise_ood": "rise from base to tuned of the probability given to wrong OOD answers",
    "pinned": "tensors that base lacks, and that are tuned's at every α",
    "missing": "places whose loss was not finite",
    **{f"rows_{role}": f"{role} rows scored" for role in ROLES},
}


def summary(result: Result) -> str:
    """Whether a better model lies in between."""
    m = result.metrics
    holes = [role for role in ROLES if m.get(f"bump_{role}_nats", 0) > 0]
    hole = f"; a hole of {max(m[f'bump_{role}_nats'] for role in holes):.3g} nats" if holes else "; no hole"
    if m["dominated"]:
        kept = f"; alpha {m['best_alpha']:g} keeps {m['kept_nats']:.3g} nats more at no cost on the task"
        return f"tuned is dominated{kept}{hole}"
    if "rows_keep" not in m:
        return f"the best alpha for these rows is {m['best_alpha']:g} (0 base, 1 tuned){hole}"
    return f"no alpha is as good on the task and better on the keep rows{hole}"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.path import figures

    return figures.draw(result)


@analysis(
    "path",
    question="Is there a better model on the straight line between base and tuned, or a hole?",
    reading=(
        "Alpha 0 is base and 1 is tuned. A bump of 0 says that weights may be averaged, scaled back and "
        "reused; above 0.1 nats they may not. A dip is a better model in between. Tuned is dominated where "
        "another alpha is no worse on the task and surely better on the keep rows: then it costs nothing to "
        "take that one. Loss and accuracy can disagree, where tuned is overconfident."
    ),
    paper="arXiv:2109.01903",
    cost="a forward pass over all rows for each alpha, 11 by default; one copy of the model in memory",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"alphas": (0.0, 0.5, 1.0)},
        absolute={"barrier_task_nats": 1e-3},
        relative={"base_task_nats": 1e-4, "tuned_keep_nats": 1e-4, "tuned_ood_nats": 1e-4},
    ),
)
def interpolation_path(
    pair: CheckpointPair,
    task: Any,
    keep: Any = None,
    ood: Any = None,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    options: RowOptions = RowOptions(dtype="float32"),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Run every blend of base and tuned on task, keep and OOD rows.

    Adapters are merged first, for their factors are not linear in α. What base lacks stays tuned's.

    Args:
        pair: base and tuned.
        task: rows of what was trained, held out: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        ood: rows that it was not made for.
        alphas: places on the path (WiSE-FT's grid); 0 and 1 are always measured.
        options: how rows are read and how models run on them.
        dtype: of the model. Not half precision: there a small step changes no weight.
        seed: nothing is drawn at random.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `path` (alpha, role, set, metric, value, unit), `sets` (one row a set: bump, dip, barrier, the
        best alpha, outcome: success, weak or strong failure), `patterns` (alpha, role, set, pattern of right
        T and wrong F in base, tuned and blend, share), `choices` (alpha, task_cost_nats, task_cost_half,
        kept_nats, kept_half, dominates).

    Raises:
        InputError: an alpha outside [0, 1], rows or a model that cannot be scored, ends that are not finite.
    """
    import pandas as pd

    grid = check_alphas(alphas)
    with TwoSidedModel(pair, **options.of_models) as host:
        walk = InterpolatedModel(host)
        given = {"task": task, "keep": keep, "ood": ood}
        sets = sets_of(given, host.editable, purpose="a path", **options.of_rows)
        said = model_notes(pair, host.model)
        along = PathEvaluator(walk, sets, progress)
        along.measure(grid)
    rows, choices = set_rows(along, grid), choice_rows(along, grid)
    metrics, best = metrics_of(rows, choices), chosen(along, grid, choices)
    metrics |= told_of(best, along, choices)
    metrics |= {"pinned": len(walk.pinned), "missing": len(along.missing)}
    notes = [*along.missing, *judgement(rows, metrics), *pinned_note(walk.pinned), *said]
    notes += dict.fromkeys(note for each in sets.values() for note in each.notes)
    tables = {
        "path": pd.DataFrame(path_rows(along, grid)),
        "sets": pd.DataFrame(rows),
        "choices": pd.DataFrame(choices),
        "patterns": pd.DataFrame(pattern_rows(along, grid)),
    }
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


def choice_rows(along: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Each α against tuned: what it costs on the task, what it keeps, and whether it dominates tuned.

    ε is one standard error over rows, as the page has it. An α dominates if its task loss is at most tuned's
    + ε, no set's accuracy is more than its own ε below tuned's, and its keep loss is below tuned's − ε.
    """
    found = []
    for alpha in alphas:
        cost, cost_error = _against_tuned(along, "task", alpha)
        lost, lost_error = _against_tuned(along, "keep", alpha)
        right = all(_as_right(along, which, alpha) for which in along.role("task"))
        as_good = cost <= cost_error and right
        found.append(
            {
                "alpha": alpha,
                "task_cost_nats": cost,
                "task_cost_error": cost_error,
                "kept_nats": 0.0 - lost,
                "kept_error": lost_error,
                "as_good": as_good,
                "dominates": bool(alpha < 1 and as_good and -lost > lost_error),
            }
        )
    return found


def _against_tuned(along: PathEvaluator, role: str, alpha: float) -> tuple[float, float]:
    """Mean over the sets of a role of what α loses against tuned, with its standard error; NaN without."""
    if not along.role(role):
        return math.nan, math.nan
    if alpha == 1:
        return 0.0, 0.0
    each = [along.combined(which, {alpha: 1.0, 1.0: -1.0}) for which in along.role(role)]
    error = math.sqrt(sum(one.error**2 for one in each)) / len(each)
    return float(np.mean([one.value for one in each])), error


def _as_right(along: PathEvaluator, which: tuple[str, str], alpha: float) -> bool:
    """Whether accuracy is at most a standard error below tuned's."""
    units, tuned = along.at(alpha)[which], along.at(1.0)[which]
    if units is None or tuned is None:
        return False
    lost = tuned.right.astype(float) - units.right
    return bool(lost.mean() <= lost.std(ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else lost.mean() <= 0)


def chosen(along: PathEvaluator, alphas: Sequence[float], choices: Sequence[Mapping[str, Any]]) -> float:
    """Of what is as good as tuned on the task, the α of the lowest loss on the other rows, else on these."""
    allowed = [row["alpha"] for row in choices if row["as_good"]]
    sets = along.role("keep") or along.role("ood") or along.role("task")
    means = [np.mean([along.losses(which, [alpha])[0] for which in sets]) for alpha in allowed]
    low = np.nanmin(means)
    return float(max(alpha for alpha, mean in zip(allowed, means, strict=True) if mean == low))


def told_of(
    alpha: float, along: PathEvaluator, choices: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """What is known of the α that is chosen."""
    row = next(row for row in choices if row["alpha"] == alpha)
    found: dict[str, float | int] = {"best_alpha": alpha, "task_cost_nats": row["task_cost_nats"]}
    if along.role("keep"):
        found["kept_nats"] = row["kept_nats"]
    ood = [which for which in along.role("ood") if along.at(alpha)[which] is not None]
    if ood:
        values = [
            {each["metric"]: each["value"] for each in path_rows(along, [alpha]) if each["set"] == which[1]}
            for which in ood
        ]
        found |= {f"{name}_ood": float(np.mean([each[name] for each in values])) for name in ("fft", "ttf")}
    return found


def metrics_of(
    rows: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """What the curves of all sets say together."""
    found: dict[str, float | int | None] = {"dominated": int(any(row["dominates"] for row in choices))}
    for role in ROLES:
        for name in ("bump", "dip", "barrier"):
            found[f"{name}_{role}_nats"] = pooled(rows, role, name, "max")
        for side in ("base", "tuned"):
            found[f"{side}_{role}_nats"] = pooled(rows, role, f"loss_{side}")
        found[f"rows_{role}"] = sum(row["rows"] for row in rows if row["role"] == role) or None
    ood = [row for row in rows if row["role"] == "ood"]
    if ood:
        found["strong_failures"] = sum(row["outcome"] == "strong" for row in ood)
        found["successes"] = sum(row["outcome"] == "success" for row in ood)
        found["confidence_ratio_ood"] = pooled(rows, "ood", "confidence_ratio")
        rises = [row["error_confidence_tuned"] - row["error_confidence_base"] for row in ood]
        found["error_confidence_rise_ood"] = None if any(map(math.isnan, rises)) else float(np.mean(rises))
    return {name: value for name, value in found.items() if value is not None}


def judgement(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float | int]) -> list[str]:
    """What follows, in plain words."""
    notes = []
    if metrics["dominated"]:
        notes.append(
            f"Alpha {metrics['best_alpha']:g} is as good as tuned on the task and better on the keep rows: "
            f"`tunescope interpolate BASE TUNED --alpha {metrics['best_alpha']:g} --out DIR` writes it."
        )
    for row in rows:
        name = f"{row['role']} rows" if row["set"] == row["role"] else f"{row['role']} rows {row['set']}"
        if row["outcome"] == "strong":
            notes.append(
                f"On the {name} the path has a hole: at alpha {row['worst_alpha']:g} the loss is "
                f"{row['fall']:.3g} ± {row['fall_half']:.2g} nats above the worse end."
            )
        if row["bump"] == 0 and row["barrier"] > 0.1:
            notes.append(
                f"On the {name} the curve lies {row['barrier']:.3g} nats above its chord, but never above "
                "both ends: that is a bend, no hole."
            )
    return notes
