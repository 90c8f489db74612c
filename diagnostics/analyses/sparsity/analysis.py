"""Essential sparsity: how many of the smallest weights can be zeroed before the metric falls.

One-shot magnitude pruning: the k = round(s N) smallest weights of the blocks' matrices are zeroed and rows
are scored again. The dropping point is the sparsity beyond which the metric falls by more than a tolerance.
Source: Jaiswal, Liu, Chen and Wang 2023, arXiv:2306.03805. The paper masks pre-trained weights and tunes what
is left for nearly every figure that it gives; what is measured here without any training is called zero-shot.
"""

from typing import TYPE_CHECKING, Any, Literal

from diagnostics.analyses.sparsity.evaluator import (
    RANDOM,
    SIDES,
    MaskEvaluator,
    Masks,
    Progress,
    Regime,
    parsed,
    sparsity_of,
)
from diagnostics.analyses.sparsity.grid import COMPARED, FINER, SparsitySettings
from diagnostics.analyses.sparsity.masked_finetuning import Training, check, split
from diagnostics.analyses.sparsity.notes import layer_note, notes
from diagnostics.analyses.sparsity.tables import SparsityMeasurements
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import encoded
from probes import CheckpointPair
from probes.checkpoints.pair import Side
from probes.checkpoints.prune import Scope
from probes.files.layout import Part
from probes.models.two_sided import TwoSidedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

# The grid of the paper's code.
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

METRICS = {
    "dropping_point_tuned": "tuned, zero-shot: last measured sparsity before its task metric first falls by "
    "more than the tolerance",
    "dropping_point_base": "the same of base",
    "shift": "robust point of tuned minus that of base; below 0 tuned tolerates less",
    "shift_low": "lower end of its paired 95 % interval",
    "shift_high": "upper end",
    "robust_point_tuned": "where a fit that never rises leaves the tolerance, linear between points; tuned",
    "robust_point_tuned_low": "lower end of its 95 % interval",
    "robust_point_tuned_high": "upper end",
    "robust_point_base": "the same of base",
    "robust_point_base_low": "lower end",
    "robust_point_base_high": "upper end",
    "reached_tuned": "1 if tuned falls within the grid; 0: its points are lower bounds",
    "reached_base": "the same of base",
    "hinge_tuned": "sparsity at which two slopes fitted to tuned's curve meet",
    "hinge_base": "the same of base",
    "dbic_tuned": "how far that fit beats a straight line; above 10 the bend is beyond doubt",
    "dbic_base": "the same of base",
    "dropping_point_keep_tuned": "dropping point of tuned on the keep rows",
    "dropping_point_keep_base": "the same of base",
    "finetuned_point": "dropping point of base when what is left is tuned behind the mask",
    "finetuned_robust_point": "the same by the robust fit",
    "finetuned_robust_point_low": "lower end of its 95 % interval",
    "finetuned_robust_point_high": "upper end",
    "finetuned_reached": "1 if it falls within the grid",
    "whole_model_share_tuned": "share of all of tuned's parameters that is zero at its dropping point",
    "whole_model_share_base": "the same of base",
    "value_tuned": "tuned's task metric without a mask",
    "value_base": "the same of base",
    "value_2_4_tuned": "tuned's task metric at 2:4",
    "value_2_4_base": "the same of base",
    "drop_2_4_tuned": "what 2:4 costs tuned in the task metric; above 0 is worse",
    "drop_2_4_base": "the same of base",
    "perplexity_ratio_2_4_tuned": "perplexity of tuned at 2:4 over that without a mask",
    "perplexity_ratio_2_4_base": "the same of base",
    "kappa_at_0_3": "likeness of base's and tuned's masks at 0.3 beyond chance: 1 the same, 0 chance",
    "revived_at_0_3": "share of what base's mask prunes at 0.3 that tuned's keeps; chance 0.7",
    "delta_low_at_0_3": "share of the squared change that lies in base's lowest 30 %; chance 0.3",
    "fullest_tuned": "highest sparsity of one matrix of tuned at its dropping point",
    "fullest_base": "the same of base",
    "zeros_tuned": "share of the scope that is zero in tuned before anything is pruned",
    "zeros_base": "the same of base",
    "scope_share": "share of tuned's parameters that is in the scope",
    "evaluations": "passes over the rows",
    "rows_task": "task rows scored",
    "rows_keep": "keep rows scored",
    "rows_needed": "task rows with which the tolerance could be told from noise",
    "unscored": "rows with nothing to score",
    "truncated": "rows cut because they are longer than the model takes",
}


def summary(result: Result) -> str:
    """How much each side tolerates, and how alike their masks are."""
    points = result.tables["points"]
    own = points[(points["role"] == "task") & (points["regime"] == "zero_shot")].to_dict("records")
    said = [f"{row['model']} {layer_note(row)}" for row in reversed(own)]
    text = f"zero-shot, {own[0]['metric']} within {own[0]['rule']}: {'; '.join(said)}"
    if "kappa_at_0_3" in result.metrics:
        text += f"; masks alike beyond chance: kappa {result.metrics['kappa_at_0_3']:.2f} at {COMPARED:g}"
    return text


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.sparsity import figures

    return figures.draw(result)


@analysis(
    "sparsity",
    question="How many of the smallest weights can go before the task suffers, and did tuning change that?",
    reading=(
        "Sparsities are shares of the blocks' matrices. The dropping point is the last one measured before "
        "the metric falls by more than the tolerance; one of tuned well below base's means that tuning moved "
        "what it needs into small weights, and it says nothing of how good either is. Random pruning at the "
        "same sparsity is the control: where it costs as little, these rows do not need the weights at all. "
        "A kappa near 1 lets one mask serve base and tuned; raw cosines are high by chance alone. Scaling a "
        "weight up and the next one down changes the masks and not the model: all of it holds for the "
        "weights as they are stored."
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
    """Measure base and tuned at every sparsity, zero-shot, and on request after tuning what is left.

    Masks are found once, from each side's own magnitudes. Both read what the tuned side's tokenizer makes of
    a row; what base lacks, such as the head of a classifier, is tuned's. An adapter is its merged weights.
    Several files of a role count alike.

    Args:
        pair: base and tuned.
        task: rows of what was trained, best such as tuning never saw: a task, a file, texts, or several.
        keep: rows of what must survive, in the same forms.
        scope: what one threshold serves: all matrices (the paper's), those of a layer, or each by itself.
        parts: where matrices are pruned. Blocks, as in the paper's code: no biases, norms, embeddings, heads.
        metric: `auto` is accuracy for choices and labels and loss for texts and completions. Accuracy of the
            latter is the share of scored tokens that are the likeliest.
        tolerance: what may be lost; None is 0.01 (the paper's 1 %): absolute for accuracy, and of the loss
            without a mask for loss (ours; the paper does not say which).
        grid: sparsities in [0, 1); 0 is always measured. The paper's code: 0 to 0.9 by 0.1.
        refine: width of the bracket that up to 4 further evaluations of each side aim at; 0: none (ours).
        patterns: N:M patterns measured beside: of M consecutive inputs at most N are kept. By default 1:2,
            2:4 and 4:8 (the paper's), without those whose M does not divide every width.
        random: also prune at random (the control).
        deploy_2_4: tuned is to be shipped at 2:4: the policy then judges what that costs.
        finetune_steps: steps of tuning behind every mask of base; 0: zero-shot alone.
        finetune_lr, finetune_batch: AdamW's rate, falling to 0, and rows a step (the paper's, for text).
        finetune_share: of the task rows, what is split off to be tuned on; all is measured on the rest.
        draws: of the rows, for the intervals (ours).
        options: how rows are read and how models run on them.
        seed: of random masks, tuning and draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`. What these rows cannot tell from noise is left out; the notes say how many could.
    Tables: `points` (a row a curve: the dropping point by the paper's definition and by the robust fit with
        its interval, the hinge, the verdict), `curve` (model, regime, pattern, sparsity, role, metric, value,
        low, high, drop …), `patterns` (N:M beside unstructured and random at the same sparsity), `layers`
        (each matrix at the dropping point: sparsity, gaussian, excess …), `overlap` (the masks of base and
        tuned at each sparsity: cosine, kappa, iou … with chance).

    Raises:
        InputError: a parameter out of range, M that does not divide a width, fewer than 2 rows, weights that
            are no finite floats, rows or a model that cannot be scored.
    """
    ask = SparsitySettings(
        metric=metric, tolerance=tolerance, grid=tuple(sorted({0.0, *map(float, grid)})), refine=refine,
        draws=draws, seed=seed,
    )  # fmt: skip
    check(finetune_steps, finetune_share, finetune_lr, finetune_batch)
    for pattern in patterns or ():
        parsed(pattern)
    given = {
        (role, name): one.at_least(2, "essential sparsity")
        for role, source in (("task", task), ("keep", keep))
        if source is not None
        for name, one in tasks(source, role).items()
    }
    roles = {role: ask.metric_of(role, given) for role in dict.fromkeys(role for role, _ in given)}
    lesson, given = split(given, finetune_share, seed) if finetune_steps else (None, given)
    reading = options.of_rows
    with TwoSidedModel(pair, **options.of_models) as host:
        sets = {which: encoded(host.editable, one, **reading) for which, one in given.items()}
        train = None
        if lesson is not None:
            train = Training(
                host, encoded(host.editable, lesson, **reading), steps=finetune_steps, lr=finetune_lr,
                batch_rows=finetune_batch, seed=seed, batch_tokens=options.batch_tokens,
            )  # fmt: skip
        masks = Masks(host, ask.grid, scope=scope, parts=parts, random=random, seed=seed)
        fitting, misfits = masks.fitting(patterns)
        curves: list[tuple[Side, Regime]] = [(side, "zero_shot") for side in SIDES]
        if train is not None:
            curves.append(("base", "masked_finetune"))
        one_curve = len(ask.grid) + FINER * (refine > 0) + (len(ask.grid) - 1) * random
        bench = MaskEvaluator(
            masks, sets, total=len(curves) * one_curve + len(SIDES) * len(fitting), progress=progress
        )
        bench.ahead([(side, *each) for side in SIDES for each in ask.zero_shot(fitting, random)])
        for side, regime in curves:
            taught = train if regime == "masked_finetune" else None
            ask.sweep(bench, side, regime, roles["task"], taught)
            for pattern in fitting if taught is None else ():
                bench.measure(side, pattern, sparsity_of(pattern))
            for sparsity in ask.grid if random else ():
                bench.measure(side, RANDOM, sparsity, regime=regime, train=taught)
        found = SparsityMeasurements.of(bench, ask, roles, fitting)
        tables = found.tables()
        metrics = found.metrics(tables)
        said = [*notes(found, tables, metrics, train), *misfits]
    return Result(metrics=metrics, tables=tables, notes=tuple(said))
