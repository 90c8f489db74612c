"""Linear interpolation from base to tuned: is there a better model in between, or a hole?

θ(α) = (1 − α) base + α tuned is run at every α on every set of rows. Sources: Wortsman et al.,
arXiv:2109.01903 (the path and its grid) and arXiv:2203.05482 (averaging); Lin et al., arXiv:2309.17230
(FalseFalseTrue, overconfidence). Bump, dip and domination are ours: on a steep curve the usual barrier, an
excess over the chord, is not a hole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.analyses.path.figures import draw
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation import interpolation
from diagnostics.evaluation.interpolation import PathEvaluator, path_rows, pooled
from diagnostics.evaluation.one_function import refuse_two_functions
from diagnostics.evaluation.pair_notes import model_notes, pinned_note
from diagnostics.evaluation.sets import SetKey, encode_sets, load_sets, set_notes
from diagnostics.evaluation.tokenizers import refuse_other_splits
from probes import CheckpointPair
from probes.models.interpolated import InterpolatedModel
from probes.models.two_sided import TwoSidedModel

ROLES = ("task", "keep", "ood")

METRICS = {
    "dominated": "1 if some α is as good on the task and better on the keep rows, else 0",
    "best_alpha": "the α to take: no worse than tuned on the task, best on the other rows; 1 is tuned",
    "kept_nats": "loss of tuned minus that of best_alpha on the keep rows",
    "task_cost_nats": "loss of best_alpha minus that of tuned on the task rows",
    "task_lost_nats": "by how much tuned is worse than base on the task rows, less two standard errors",
    "strong_failures": "OOD sets with an α that is significantly worse than both ends",
    "successes": "OOD sets with an α that is significantly better than both ends",
    **{
        f"{name}_{role}_nats": f"{text} on the {role} rows; largest of several sets"
        for name, text in (
            ("bump", "largest rise of the loss above both ends"),
            ("dip", "largest drop of the loss below both ends"),
            ("barrier", "largest excess of the loss over the straight line between the ends"),
        )
        for role in ROLES
    },
    **{
        f"{side}_{role}_nats": f"mean loss of {side} on the {role} rows, per token or row"
        for role in ROLES
        for side in ("base", "tuned")
    },
    "fft_ood": "share of OOD units that both ends get wrong and best_alpha gets right",
    "ttf_ood": "share of OOD units that both ends get right and best_alpha gets wrong",
    "confidence_ratio_ood": "mean confidence of tuned over that of base on the OOD rows",
    "error_confidence_rise_ood": "rise from base to tuned of the confidence in wrong OOD answers",
    "pinned": "tensors that base lacks: tuned's at every α",
    "missing": "points with a loss that is not finite",
    **{f"rows_{role}": f"{role} rows scored" for role in ROLES},
}


def summary(result: Result) -> str:
    """Whether there is a better model in between."""
    m = result.metrics
    bump = max(m.get(f"bump_{role}_nats", 0) for role in ROLES)
    hole = f"; a hole of {bump:.3g} nats" if bump > 0 else "; no hole"
    if m["dominated"]:
        better = f"alpha {m['best_alpha']:g} keeps {m['kept_nats']:.3g} nats more at no cost on the task"
        return f"tuned is dominated: {better}{hole}"
    if "rows_keep" not in m:
        return f"the best alpha for these rows is {m['best_alpha']:g} (0 is base, 1 tuned){hole}"
    return f"no alpha is as good on the task and better on the keep rows{hole}"


@analysis(
    "path",
    question="Is there a better model on the straight line between base and tuned, or a hole?",
    reading=(
        "Alpha 0 is base and 1 is tuned. With a bump of 0, weights can be averaged, scaled back and reused; "
        "above 0.1 nats they cannot. A dip is a better model in between. Tuned is dominated if another alpha "
        "is no worse on the task and significantly better on the keep rows: taking that alpha costs nothing. "
        "Loss and accuracy can disagree if tuned is overconfident."
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
    pair: CheckpointPair, task: Any, keep: Any = None, ood: Any = None, *,
    alphas: tuple[float, ...] = interpolation.ALPHAS, options: RowOptions = RowOptions(dtype="float32"),
    seed: int = 0, progress: Callable[[int, int, str], None] | None = None,
) -> Result:  # fmt: skip
    """Score interpolated models between base and tuned on task, keep and OOD rows.

    Adapters are merged first: their factors are not linear in α. Tensors that base lacks stay tuned's.

    Args:
        pair: base and tuned.
        task: held-out rows of the tuned model's own distribution: a task, a file, texts, or several by name.
        keep: rows of what must survive.
        ood: rows of other distributions.
        alphas: points on the path (WiSE-FT's grid); 0 and 1 are always measured.
        options: how rows are read and how models run on them.
        dtype: of the model. In half precision a small step changes no weight.
        seed: unused; nothing is random.
        progress: called with (done, total, what).

    Metrics: listed with their meanings in the registration's `metrics`.

    Tables:
        `path`: one row a set, alpha and metric: alpha, role, set, metric (loss, accuracy, confidence,
            error_confidence, fft, ttf or ensemble_loss), value (losses in nats per unit, else a share),
            unit (of the loss: token or row).
        `sets`: one row a set: role, set, rows (count), units (count), unit, loss_base, loss_tuned, barrier,
            bump, dip (nats), best_alpha, worst_alpha, gain (nats, best interior point below the better
            end), gain_half (half of its 95 % interval), fall (nats, worst interior point above the worse
            end), fall_half, outcome (success, weak or strong), accuracy_base, accuracy_tuned,
            confidence_ratio, error_confidence_base, error_confidence_tuned.
        `choices`: one row an alpha, compared with tuned: alpha, task_cost_nats, task_cost_error (standard
            error, nats), kept_nats, kept_error, as_good (on the task), dominates (booleans).
        `patterns`: one row a set, alpha and pattern: alpha, role, set, pattern (right T or wrong F under
            base, tuned, interpolated), share (of units).

    Raises:
        NotApplicableError: base and tuned have configurations that give two functions.
        InputError: an alpha outside [0, 1], rows or a model that cannot be scored, ends that are not finite.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r1")
        >>> result = interpolation_path(pair, ["a line of text", "another one"], alphas=(0.5,))
        >>> sorted(result.tables["choices"]["alpha"])
        [0.0, 0.5, 1.0]
    """
    import pandas as pd

    grid = interpolation.check_alphas(alphas)
    refuse_two_functions(pair)
    with TwoSidedModel(pair, **options.of_models) as two_sided:
        interpolated = InterpolatedModel(two_sided)
        loaded = load_sets({"task": task, "keep": keep, "ood": ood}, least=2, purpose="a path")
        refuse_other_splits(pair, loaded.values(), options)
        sets = encode_sets(two_sided.editable, loaded, **options.of_rows)
        notes = model_notes(pair, two_sided.model)
        evaluator = PathEvaluator(interpolated, sets, progress)
        evaluator.measure(grid)
    rows, choices = interpolation.set_rows(evaluator, grid), choice_rows(evaluator, grid)
    metrics = metrics_of(rows, choices)
    metrics |= metrics_at(best_of(evaluator, choices), evaluator, choices)
    metrics |= {"pinned": len(interpolated.pinned), "missing": len(evaluator.missing)}
    pinned = pinned_note(interpolated.pinned)
    notes = [*evaluator.missing, *conclusions(rows, metrics), *pinned, *notes]
    path, patterns = path_rows(evaluator, grid), interpolation.pattern_rows(evaluator, grid)
    records = {"path": path, "sets": rows, "choices": choices, "patterns": patterns}
    tables = {name: pd.DataFrame(table) for name, table in records.items()}
    return Result(metrics=metrics, tables=tables, notes=(*notes, *set_notes(sets)))


def choice_rows(evaluator: PathEvaluator, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Each α against tuned, with ε one standard error over rows.

    An α dominates if its task loss is at most tuned's + ε, no set's
    accuracy is more than its own ε below tuned's, and its keep loss is below tuned's − ε.
    """
    rows = []
    for alpha in alphas:
        cost, cost_error = _minus_tuned(evaluator, "task", alpha)
        lost, lost_error = _minus_tuned(evaluator, "keep", alpha)
        as_accurate = all(_as_accurate(evaluator, key, alpha) for key in evaluator.role("task"))
        as_good = cost <= cost_error and as_accurate
        rows.append({
            "alpha": alpha, "task_cost_nats": cost, "task_cost_error": cost_error, "kept_nats": 0.0 - lost,
            "kept_error": lost_error, "as_good": as_good,
            "dominates": bool(alpha < 1 and as_good and -lost > lost_error),
        })  # fmt: skip
    return rows


def _minus_tuned(evaluator: PathEvaluator, role: str, alpha: float) -> tuple[float, float]:
    """Loss at α minus that of tuned, mean over the sets of a role, with standard error; NaN without sets."""
    sets = evaluator.role(role)
    if not sets:
        return math.nan, math.nan
    if alpha == 1:
        return 0.0, 0.0
    differences = [evaluator.combined(key, {alpha: 1.0, 1.0: -1.0}) for key in sets]
    error = math.sqrt(sum(difference.error**2 for difference in differences)) / len(sets)
    return float(np.mean([difference.value for difference in differences])), error


def _as_accurate(evaluator: PathEvaluator, key: SetKey, alpha: float) -> bool:
    """Whether accuracy is at most a standard error below tuned's."""
    units = evaluator.at(alpha)[key]
    if units is None:
        return False
    lost = evaluator.ends(key)[1].right.astype(float) - units.right
    return bool(lost.mean() <= lost.std(ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else lost.mean() <= 0)


def best_of(evaluator: PathEvaluator, choices: Sequence[Mapping[str, Any]]) -> float:
    """The α of the lowest keep (else OOD, else task) loss among those as good as tuned on the task."""
    allowed = [row["alpha"] for row in choices if row["as_good"]]
    sets = evaluator.role("keep") or evaluator.role("ood") or evaluator.role("task")
    means = [np.mean([evaluator.losses(key, [alpha])[0] for key in sets]) for alpha in allowed]
    low = np.nanmin(means)
    return float(max(alpha for alpha, mean in zip(allowed, means, strict=True) if mean == low))


def metrics_at(
    alpha: float, evaluator: PathEvaluator, choices: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """The metrics of the best alpha."""
    choice = next(row for row in choices if row["alpha"] == alpha)
    metrics: dict[str, float | int] = {"best_alpha": alpha, "task_cost_nats": choice["task_cost_nats"]}
    if evaluator.role("keep"):
        metrics["kept_nats"] = choice["kept_nats"]
    rows = path_rows(evaluator, [alpha])
    for name in ("fft", "ttf"):
        share = pooled([row for row in rows if row["metric"] == name], "ood", "value")
        metrics |= {} if share is None else {f"{name}_ood": share}
    return metrics


def metrics_of(
    rows: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
    """The metrics of all curves together."""
    metrics: dict[str, float | int | None] = {"dominated": int(any(row["dominates"] for row in choices))}
    base = next(row for row in choices if row["alpha"] == 0)
    metrics["task_lost_nats"] = max(0.0, -base["task_cost_nats"] - 2 * base["task_cost_error"])
    for role in ROLES:
        metrics |= {
            f"{name}_{role}_nats": pooled(rows, role, name, "max") for name in ("bump", "dip", "barrier")
        }
        metrics |= {f"{side}_{role}_nats": pooled(rows, role, f"loss_{side}") for side in ("base", "tuned")}
        metrics[f"rows_{role}"] = sum(row["rows"] for row in rows if row["role"] == role) or None
    ood = [row for row in rows if row["role"] == "ood"]
    if ood:
        metrics["strong_failures"] = sum(row["outcome"] == "strong" for row in ood)
        metrics["successes"] = sum(row["outcome"] == "success" for row in ood)
        metrics["confidence_ratio_ood"] = pooled(rows, "ood", "confidence_ratio")
        confidence_rises = [row["error_confidence_tuned"] - row["error_confidence_base"] for row in ood]
        metrics["error_confidence_rise_ood"] = (
            None if any(map(math.isnan, confidence_rises)) else float(np.mean(confidence_rises))
        )
    return {name: value for name, value in metrics.items() if value is not None}


def conclusions(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float | int]) -> list[str]:
    """Notes on what to do."""
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
                f"The path has a hole on the {name}: at alpha {row['worst_alpha']:g} the loss is "
                f"{row['fall']:.3g} ± {row['fall_half']:.2g} nats above the worse end."
            )
        if row["bump"] == 0 and row["barrier"] > 0.1:
            notes.append(
                f"The curve of the {name} lies {row['barrier']:.3g} nats above its chord, but never above "
                "both ends: that is a bend, not a hole."
            )
    return notes
