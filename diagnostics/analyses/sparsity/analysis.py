"""Essential sparsity: how many of the smallest weights can be zeroed before the metric falls.

One-shot magnitude pruning: the k = round(s N) smallest weights of the blocks' matrices are zeroed and the
rows are scored again. The dropping point is the sparsity beyond which the metric falls by more than a
tolerance.
Source: Jaiswal, Liu, Chen and Wang 2023, arXiv:2306.03805. For nearly every figure, the paper masks
pre-trained weights and tunes the rest; measurements without tuning are called zero-shot here.
"""

from typing import Any, Literal

from diagnostics.analyses.sparsity.evaluator import (
    MAGNITUDE,
    RANDOM,
    SIDES,
    MaskEvaluator,
    Masks,
    Regime,
    parse_pattern,
    pattern_sparsity,
)
from diagnostics.analyses.sparsity.figures import draw
from diagnostics.analyses.sparsity.grid import COMPARED_SPARSITY, MAX_REFINEMENTS, SparsitySettings
from diagnostics.analyses.sparsity.masked_finetuning import MaskedFinetuning, check_training, split_training
from diagnostics.analyses.sparsity.notes import curve_verdict, notes
from diagnostics.analyses.sparsity.tables import SparsityMeasurements
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import encoded
from diagnostics.evaluation.tokenizers import refuse_other_splits
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.checkpoints.pair import Side
from probes.checkpoints.prune import Scope
from probes.files.layout import Part
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective
from probes.progress import Progress

# The grid of the paper's code, and its tolerance.
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOLERANCE = 0.01

# One text for both sides, which take the place of `{side}`.
METRIC_TEXTS = {
    "dropping_point_{side}": "{side}, zero-shot: last sparsity before its task metric leaves the tolerance",
    "shift": "robust point of tuned minus that of base; below 0 tuned tolerates less",
    "shift_low": "lower end of its paired 95 % interval",
    "shift_high": "upper end",
    "robust_point_{side}": "{side}: sparsity at which an isotonic fit leaves the tolerance",
    "robust_point_{side}_low": "{side}: lower end of its 95 % interval",
    "robust_point_{side}_high": "{side}: upper end",
    "reached_{side}": "1 if {side} falls within the grid; 0: its points are lower bounds",
    "hinge_{side}": "sparsity at which two slopes fitted to {side}'s curve meet",
    "dbic_{side}": "{side}: evidence for two slopes over one (difference in BIC); above 10 very strong",
    "dropping_point_keep_{side}": "dropping point of {side} on the keep rows",
    "finetuned_point": "dropping point of base with masked fine-tuning",
    "finetuned_robust_point": "the same by the robust fit",
    "finetuned_robust_point_low": "lower end of its 95 % interval",
    "finetuned_robust_point_high": "upper end",
    "finetuned_reached": "1 if it falls within the grid",
    "whole_model_share_{side}": "share of {side}'s parameters pruned at its dropping point",
    "value_{side}": "{side}'s task metric without a mask",
    "value_2_4_{side}": "{side}'s task metric at 2:4",
    "drop_2_4_{side}": "drop of {side}'s task metric at 2:4; above 0 is worse",
    "perplexity_ratio_2_4_{side}": "perplexity of {side} at 2:4 over that without a mask",
    "kappa_at_0_3": "overlap of base's and tuned's masks at 0.3 beyond chance: 1 equal, 0 chance",
    "revived_at_0_3": "share of the weights pruned by base's mask at 0.3 that tuned's keeps; chance 0.7",
    "delta_low_at_0_3": "share of the squared change in base's lowest 30 % of weights; chance 0.3",
    "fullest_{side}": "highest sparsity of one matrix of {side} at its dropping point",
    "zeros_{side}": "share of the scope that is zero in {side} before pruning",
    "scope_share": "share of tuned's parameters in the scope",
    "evaluations": "passes over the rows",
    "rows_task": "task rows scored",
    "rows_keep": "keep rows scored",
    "rows_needed": "task rows that would tell the tolerance from noise",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the model takes",
}
METRICS = {
    name.format(side=side): text.format(side=side)
    for name, text in METRIC_TEXTS.items()
    for side in (("tuned", "base") if "{side}" in name else ("",))
}


def summary(result: Result) -> str:
    """How much each side tolerates, and the overlap of their masks."""
    points = result.tables["points"].query("role == 'task' and regime == 'zero_shot'")
    rows = points.to_dict("records")
    sides = "; ".join(f"{row['model']} {curve_verdict(row)}" for row in reversed(rows))
    text = f"zero-shot, {rows[0]['metric']} within {rows[0]['rule']}: {sides}"
    if "kappa_at_0_3" in result.metrics:
        text += f"; mask overlap beyond chance: kappa {result.metrics['kappa_at_0_3']:.2f}"
        text += f" at {COMPARED_SPARSITY:g}"
    return text


@analysis(
    "sparsity",
    question="How many of the smallest weights can go before the task suffers, and did tuning change that?",
    reading=(
        "Sparsities are shares of the blocks' matrices. The dropping point is the last one measured before "
        "the metric falls by more than the tolerance. A point of tuned well below base's means that tuning "
        "moved what it needs into small weights; it does not say how good either model is. Random pruning at "
        "the same sparsity is the control: where it costs as little, these rows do not need the weights. "
        "With a kappa near 1 one mask serves base and tuned; raw cosines are high by chance. Scaling a "
        "weight up and the next one down changes the masks and not the model: the numbers are of the weights "
        "as stored."
    ),
    paper="arXiv:2306.03805",
    cost=(
        "a forward pass over task and keep rows for every sparsity, pattern and control of both sides, about "
        "50 by default; one copy of the model in memory"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={
            "grid": (0.0, 0.3, 0.5, 0.8),
            "refine": 0.0,
            "patterns": ("2:4",),
            "random": False,
            "draws": 100,
        },
        absolute={"value_base": 1 / 60, "value_tuned": 1 / 60, "kappa_at_0_3": 0, "delta_low_at_0_3": 1e-6},
    ),
)
def essential_sparsity(
    pair: CheckpointPair,
    task: Any,
    keep: Any = None,
    *,
    scope: Scope = "global",
    parts: tuple[Part, ...] = ("block",),
    metric: Literal["auto", "accuracy", "loss"] = "auto",
    tolerance: float | None = None,
    grid: tuple[float, ...] = GRID,
    refine: float = 0.02,
    patterns: tuple[str, ...] | None = None,
    random: bool = True,
    masks: bool = False,
    deploy_2_4: bool = False,
    finetune_steps: int = 0,
    finetune_lr: float = 2e-5,
    finetune_batch: int = 32,
    finetune_share: float = 0.5,
    draws: int = 1000,
    options: RowOptions = RowOptions(),
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Measure base and tuned at every sparsity, zero-shot, and on request after masked fine-tuning.

    Masks are found once, from each side's own magnitudes. Both sides read the tuned side's tokens; base is
    measured with tuned's tensors, such as the head of a classifier, where it lacks them. An adapter is its
    merged weights. The files of a role have equal weight.

    Args:
        pair: base and tuned.
        task: rows of what was trained, best unseen in tuning: a task, a file, texts, or several.
        keep: rows of what must survive, in the same forms.
        scope: what one threshold serves: all matrices (the paper's), those of a layer, or each by itself.
        parts: where matrices are pruned. Blocks, as in the paper's code: no biases, norms, embeddings, heads.
        metric: `auto` is accuracy for choices and labels and loss for texts and completions. The accuracy of
            texts is the share of scored tokens that are the likeliest.
        tolerance: tolerated drop; None is 0.01 (the paper's 1 %): absolute for accuracy, and of the loss
            without a mask for loss (ours; the paper does not say which).
        grid: sparsities in [0, 1); 0 is always measured. The paper's code: 0 to 0.9 by 0.1.
        refine: width of the bracket that up to 4 further points of each side aim at; 0: none (ours).
        patterns: N:M patterns to measure too: of M consecutive inputs at most N are kept. None: those of 1:2,
            2:4 and 4:8 (the paper's) with an M that divides every width.
        random: also prune at random (the control).
        masks: also give the masks of both sides at their dropping points, for `tunescope graft`. Each entry
            kept takes up to 8 bytes and its value, about two to three times the memory of the weights.
        deploy_2_4: tuned is to be shipped at 2:4; the policy then judges the cost.
        finetune_steps: steps of tuning behind each mask of base; 0: zero-shot alone.
        finetune_lr, finetune_batch: AdamW's rate, falling to 0, and rows a step (the paper's, for text).
        finetune_share: share of the task rows to tune on; all is measured on the rest.
        draws: bootstrap draws of the rows, for the intervals (ours).
        options: how rows are read and how models run on them.
        seed: of random masks, tuning and draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`. Those that these rows cannot tell from noise are left out; a note says how many
        rows could.

    Tables:
        `points`: one row a curve: role, model, regime, metric, rule (the tolerance in words), value
            (unpruned; accuracy, or nats per token), dropping_point, until, rho (fraction of the remaining
            weights), crossings (count), robust_at, robust_until, robust_point, low, high, reached, decided,
            verdict, hinge, slope_before, slope_after (metric per unit of sparsity), dbic, fitted_to,
            whole_model_share (fraction), value_2_4, allowed (drop), half_width (of the drop), rows,
            rows_needed. Points are sparsities (fractions of the scope).
        `curve`: one row a point and role: model, pattern, sparsity (fraction), role, metric, value (accuracy,
            or nats per token), low, high, regime, realised (sparsity), drop (above 0 is worse), drop_low,
            drop_high.
        `patterns`: one row a pattern, side and role: model, pattern, sparsity (fraction), role, metric,
            value, drop, drop_low, drop_high, perplexity_ratio (to no mask), kept_l1, kept_l2 (fractions),
            regime.
        `layers`: one row a matrix and side: model, matrix, layer, component, at (sparsity of the side),
            entries (count), sparsity, density (fractions), gaussian (sparsity predicted from the scale),
            excess (sparsity beyond it), rms (of weights), zero (fraction before pruning).
        `overlap`: one row a sparsity: sparsity, cosine, cosine_chance, kappa (1 equal, 0 chance), iou,
            iou_chance, revived, revived_chance, delta_low, delta_low_chance (fractions).

    Masks: with `masks`, `base` and `tuned`: the entries that the mask of that side keeps at its dropping
        point. A graft has tuned's values there and base's elsewhere.

    Raises:
        InputError: a parameter out of range, M that does not divide a width, fewer than 2 rows, weights that
            are no finite floats, rows or a model that cannot be scored.

    Example:
        >>> from diagnostics import essential_sparsity
        >>> from diagnostics.audit.demo import BUNDLED
        >>> from probes import CheckpointPair
        >>> pair, texts = CheckpointPair(BUNDLED / "base", BUNDLED / "full"), ["a cat sat", "the dog ran"]
        >>> result = essential_sparsity(pair, texts, grid=(0.0, 0.2, 0.4, 0.6), patterns=(), draws=100)
        >>> float(result.tables["curve"]["sparsity"].max())
        0.6
    """
    settings = SparsitySettings(
        metric=metric, tolerance=TOLERANCE if tolerance is None else tolerance, refine=refine,
        grid=tuple(sorted({0.0, *map(float, grid)})), draws=draws, seed=seed,
    )  # fmt: skip
    check_training(finetune_steps, finetune_share, finetune_lr, finetune_batch)
    for pattern in patterns or ():
        parse_pattern(pattern)
    sets = {
        (role, name): rows.at_least(2, "essential sparsity")
        for role, source in (("task", task), ("keep", keep))
        if source is not None
        for name, rows in tasks(source, role).items()
    }
    roles = {role: settings.metric_of(role, sets) for role in dict.fromkeys(role for role, _ in sets)}
    training, sets = split_training(sets, finetune_share, seed) if finetune_steps else (None, sets)
    rows_read = sets.values() if training is None else (*sets.values(), training)
    refuse_other_splits(pair, rows_read, options)
    with TwoSidedModel(pair, **options.of_models, apart=True) as two_sided:
        encoded_sets = {
            key: encoded(two_sided.editable, rows, **options.of_rows) for key, rows in sets.items()
        }
        train = None
        curves: list[tuple[Side, Regime]] = [(side, "zero_shot") for side in SIDES]
        if training is not None:
            curves.append(("base", "masked_finetune"))
            encoded_training = encoded(two_sided.editable, training, **options.of_rows)
            objective = Objective(encoded_training, tokens=options.batch_tokens)
            train = MaskedFinetuning(
                two_sided=two_sided, objective=objective, rows=len(training.rows), steps=finetune_steps,
                lr=finetune_lr, batch_rows=finetune_batch, seed=seed,
            )  # fmt: skip
        cuts = Masks(two_sided, settings.grid, scope=scope, parts=parts, random=random, seed=seed)
        fitting, misfit_notes = cuts.fitting(patterns)
        points = len(settings.grid) + MAX_REFINEMENTS * (refine > 0) + (len(settings.grid) - 1) * random
        total = len(curves) * points + len(SIDES) * len(fitting)
        evaluator = MaskEvaluator(cuts, encoded_sets, total=total, progress=progress)
        always = [(MAGNITUDE, sparsity) for sparsity in settings.grid]
        always += [(pattern, pattern_sparsity(pattern)) for pattern in fitting]
        always += [(RANDOM, sparsity) for sparsity in settings.grid if random]
        evaluator.measure_on_workers([(side, *point) for side in SIDES for point in always])
        for side, regime in curves:
            tune = train if regime == "masked_finetune" else None
            settings.sweep(evaluator, side, regime, roles["task"], tune)
            for pattern in fitting if tune is None else ():
                evaluator.measure(side, pattern, pattern_sparsity(pattern))
            for sparsity in settings.grid if random else ():
                evaluator.measure(side, RANDOM, sparsity, regime=regime, train=tune)
        measurements = SparsityMeasurements.of(evaluator, settings, roles, fitting)
        tables = measurements.tables()
        metrics = measurements.metrics(tables)
        patches, mask_notes = dropping_masks(measurements) if masks else ({}, [])
        lines = [*notes(measurements, tables, metrics, train), *misfit_notes, *mask_notes]
    return Result(metrics=metrics, tables=tables, notes=tuple(lines), masks=patches)


def dropping_masks(measurements: SparsityMeasurements) -> tuple[dict[str, Patch], list[str]]:
    """The mask of each side at its dropping point, and a note for each side without one."""
    patches: dict[str, Patch] = {}
    if measurements.evaluator.two_sided.changes:
        return patches, ["No masks are given: a graft of two functions would be neither."]
    lines = []
    for side in SIDES:
        sparsity, at_dropping_point = measurements.layer_sparsity(side)
        if not at_dropping_point:
            lines.append(f"No mask of {side} is given: it has no dropping point above 0.")
            continue
        kept = measurements.evaluator.masks.kept_entries(side, sparsity)
        about = {"kept by": side, "pattern": MAGNITUDE, "sparsity": sparsity}
        patches[side] = Patch.of(measurements.evaluator.two_sided.pair, kept, about)
    return patches, lines
