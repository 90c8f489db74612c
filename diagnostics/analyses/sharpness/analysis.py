"""Layer-wise barriers and sharpness on the path from base to tuned.

A layer with a barrier of its own that stands out, and where pinning helps, is a straggler. Sharpness, the
worst and the mean rise of the task loss within a radius, is described, never judged: it does not predict
generalisation, and follows the learning rate. Sources: arXiv:2410.16476 (stragglers; only its abstract could
be read, and the rule is ours); arXiv:2302.07011 (the measures); arXiv:2109.01903 (the path).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch

from diagnostics.analyses.sharpness import curvature as curvatures
from diagnostics.analyses.sharpness.ascent import Norm
from diagnostics.analyses.sharpness.figures import draw
from diagnostics.analyses.sharpness.layer_paths import LayerPaths
from diagnostics.analyses.sharpness.layer_sharpness import (
    BatchSharpness,
    RowBatch,
    SharpnessSettings,
    batch_sharpness,
    logits_normalised,
    mean_over_batches,
    row_batches,
)
from diagnostics.analyses.sharpness.remedies import remedies, remedy_rows
from diagnostics.analyses.sharpness.tables import Flags, layer_table, metrics_of, notes_of, with_sharpness
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation import interpolation, loss_curves
from diagnostics.evaluation.interpolation import ALPHAS, PathEvaluator, check_alphas
from diagnostics.evaluation.one_function import refuse_two_functions
from diagnostics.evaluation.pair_notes import HALF_DTYPES, is_half, model_notes, pinned_note
from diagnostics.evaluation.sets import SetKey, encode_sets, load_sets, set_notes
from diagnostics.evaluation.tokenizers import refuse_other_splits
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.interpolated import InterpolatedModel, Layer
from probes.models.perturb import PerturbedWeights
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective

LAYER_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = {
    "stragglers": "layers with a barrier that stands out and that pinning repairs",
    "best_alpha": "α of the lowest OOD loss; without OOD rows, of the lowest task loss",
    "worst_alpha": "interior α furthest above the line between the ends; the middle if none is above",
    "barrier_nats": "height above that line, in nats, on the OOD rows if given, else on the task rows",
    "strong_failures": "OOD sets on which some α is significantly worse than both ends",
    "successes": "OOD sets on which some α is significantly better than both ends",
    "repaired_nats": "largest fall of the loss at the worst α from pinning a single layer",
    "overconfidence_ood": "confidence of tuned over base on OOD sets where tuned is less accurate, else 0",
    "load_bearing": "layers without a barrier that tuned needs and that moved far",
    "sharpness_base": "worst rise of the normalised task loss over all blocks at base, nats; not a fault",
    "sharpness_tuned": "the same at tuned",
    "average_base": "mean rise at base, nats",
    "average_tuned": "the same at tuned",
    "layers": "number of layers, embeddings and head included",
    "batches": "batches of task rows on which sharpness was measured",
    "unsteady": "values whose starts differ by more than 10 %: lower bounds",
    "pinned": "tensors that base lacks; tuned's are used at every α",
    "missing": "points whose loss was not finite",
    **{f"rows_{role}": f"{role} rows measured" for role in ("task", "keep", "ood")},
}


def summary(result: Result) -> str:
    """Whether base and tuned can be blended, and the layers that prevent it."""
    m, layers = result.metrics, result.tables["layers"]
    names = ", ".join(layers.loc[layers["straggler"], "name"])
    flagged = f"stragglers: {names}" if names else "no straggler"
    barrier = f"barrier {m['barrier_nats']:.3g} nats at alpha {m['worst_alpha']:g}"
    return f"best alpha {m['best_alpha']:g} (0 base, 1 tuned); {barrier}; {flagged}"


@analysis(
    "sharpness",
    question="Can base and tuned be blended without a loss barrier, and if not, which layer makes it?",
    reading=(
        "A barrier of 0 means that a layer can be anywhere between base and tuned. From 0.05 nats on, and "
        "far from the other layers, it is a straggler: pin it, realign it, or leave it out of a blend. "
        "Sharpness is the rise of the task loss within a radius; values compare only for equal rows, radius "
        "and batch size. A sharper layer is not a worse one: it follows learning rate and displacement. On "
        "log axes a slope of 2 is curvature; a slope of 1 is a loss that is not at its minimum."
    ),
    paper="arXiv:2410.16476",
    cost=(
        "forward passes over all rows: one for each alpha and about 12 for each layer. Sharpness: about 200 "
        "passes forward and back over a few batches for each layer, and as many again at further alphas for "
        "flagged layers. Best on a GPU"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={
            "alphas": (0.0, 0.5, 1.0), "layer_alphas": (0.5,), "sharpness_alphas": (1.0,), "rhos": (0.5,),
            "steps": 3, "batches": 1, "batch_rows": 8, "rows": 24, "curvature": False,
        },
        absolute={"layers": 0},
        relative={"sharpness_tuned": 0.05, "average_tuned": 0.05},
    ),
)  # fmt: skip
def layer_sharpness(
    pair: CheckpointPair,
    task: Any,
    keep: Any = None,
    ood: Any = None,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    layer_alphas: tuple[float, ...] = LAYER_ALPHAS,
    sharpness_alphas: tuple[float, ...] = (0.0, 0.5, 1.0),
    rhos: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0),
    rho: float = 0.5,
    norm: Norm = "l2",
    adaptive: bool = True,
    normalise: bool = True,
    steps: int = 20,
    starts: int = 1,
    pairs: int = 4,
    batches: int = 4,
    batch_rows: int = 32,
    per_size: bool = False,
    matrices_only: bool = False,
    sharpen: Literal["screened", "all"] = "screened",
    curvature: bool = True,
    rows: int = 256,
    options: RowOptions = RowOptions(dtype="float32"),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Measure barriers, stragglers, remedies and sharpness of every layer on the path.

    Layers are the transformer blocks, the embeddings, and everything after the blocks. Barriers are measured
    on the pooled OOD rows, or on the task rows without any; sharpness on the task rows.

    Args:
        pair: base and tuned; adapters are merged.
        task: held-out rows of the trained task: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        ood: rows that the tuned model was not made for.
        alphas: α of the whole model (WiSE-FT's grid).
        layer_alphas: α of a single layer (ours); 0, 0.5, 1 screens faster.
        sharpness_alphas: where sharpness is measured; 0 and 1 always are. Flagged layers are also measured
            at the best and the worst α.
        rhos: radii, a doubling grid (ours; published ones depend on model and norm).
        rho: the radius shown in `layers`.
        norm: l2; or linf, a harder search with lower bounds as values, which takes at least 5 starts.
        adaptive: perturb in proportion to |w|; a zero weight stays zero.
        normalise: normalise logits, as published: else their scale alone moves the measure.
        steps: of an ascent (as published).
        starts: of an ascent; the first is no perturbation with a little noise.
        pairs: mirrored random perturbations for the mean rise (published: 20 samples, which are 10); 0: none.
        batches, batch_rows: task rows for sharpness (published: 8 of 128). The maximum is taken batch by
            batch: larger batches give smaller values.
        per_size: scale radii by √(weights of a layer / of the median layer).
        matrices_only: leave norm gains and biases unperturbed.
        sharpen: screened: every layer at `rho` at both ends, and the flagged ones with two others at all
            radii and alphas; all: every layer at all of them.
        curvature: cross-check with the Hessian of the first batch, for the flagged layers and two others.
        rows: most rows of a set, drawn at random.
        options: how rows are read and how models run on them.
        dtype: of the model. Half precision is run as float32: in half precision small steps change no weight.
        seed: of rows, starts and random moves.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables:
        `layers`: one row a layer: layer (index; -1 embeddings, the last what follows the blocks), name,
            weights (count), displacement (norm of the delta over that of base), moved (norm of the delta),
            barrier, barrier_error, barrier_tuned, barrier_base (nats; the larger, its standard error, either
            anchor), lag (α at which half of the gain is won), rewind_cost, rewind_half (nats, half of its 95
            % interval), midway_rise, control_rise (nats; halfway to base, random moves of that size),
            repair_base, repair_base_half, repair_tuned, repair_tuned_half (nats; gain from pinning),
            sharpness_<place>, average_<place> (nats; worst and mean rise at base, half, tuned),
            sharpness_ratio (tuned over base), straggler, load_bearing (booleans), action (best remedy),
            action_barrier_nats, action_task_nats.
        `path`: one row a set, alpha and metric: alpha, role, set, metric (loss, accuracy, confidence,
            error_confidence, fft, ttf or ensemble_loss), value (losses in nats per unit, else a share), unit.
        `sets`: one row a set: role, set, rows, units (counts), unit, loss_<side>, barrier, bump, dip (nats),
            best_alpha, worst_alpha, gain, gain_half, fall, fall_half (nats), outcome (success, weak or
            strong), accuracy_<side>, confidence_ratio, error_confidence_<side> (shares).
        `layer_paths`: one row a layer, anchor and alpha: layer, anchor (base or tuned), alpha, loss (nats).
        `sharpness`: one row an alpha, layer and radius: alpha, layer, name, rho, radius (rho, scaled if
            per_size), worst, worst_error, single, average, average_error, loss (nats), spread (share by which
            starts differ), slope (norm of the gradient, nats).
        `remedies`: one row a remedy, alpha and set: remedy, setting (end or share), alpha, role, set, loss
            (nats), accuracy (share).
        `curvature`: one row an alpha and layer: alpha, layer, name, top, bottom (eigenvalues, nats), trace,
            trace_error (nats), predicted, predicted_average (rises at rho from these, nats), rho, worst,
            average, slope (as measured).

    Raises:
        NotApplicableError: base and tuned have configurations that give two functions.
        InputError: a parameter out of range, rows or a model that cannot be scored, ends that are not finite,
            a model without a list of blocks.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "full")
        >>> fast = {"rows": 2, "max_length": 8, "steps": 2, "pairs": 0, "rhos": (0.5,), "curvature": False}
        >>> alphas = dict.fromkeys(("alphas", "layer_alphas", "sharpness_alphas"), (0.0, 0.5, 1.0))
        >>> layer_sharpness(pair, BUNDLED / "task.jsonl", **fast, **alphas).metrics["stragglers"]
        0
    """
    grid, layer_grid = check_alphas(alphas), check_alphas(layer_alphas)
    if sharpen not in ("screened", "all"):
        raise InputError(f"sharpen is {sharpen!r}; it is 'screened' or 'all'")
    radii = _checked(rhos, rho, norm, steps, starts, pairs, batches, batch_rows)
    sharp_alphas = check_alphas(sharpness_alphas, least=2)
    dtype = (options.dtype or "").removeprefix("torch.")
    if dtype in HALF_DTYPES:
        options = replace(options, dtype="float32")
    refuse_two_functions(pair)
    with TwoSidedModel(pair, **options.of_models) as two_sided:
        interpolated, notes = InterpolatedModel(two_sided), model_notes(pair, two_sided.model)
        if dtype in HALF_DTYPES:
            notes.append(f"The model was run in float32: in {dtype} small perturbations change no weight.")
        if is_half(two_sided.model):
            raise InputError(
                "sharpness: in half precision small perturbations change no weight; set sharpness.dtype to "
                "float32"
            )
        sources = {"task": task, "keep": keep, "ood": ood}
        loaded = load_sets(sources, least=2, purpose="sharpness", rows=rows, seed=seed)
        refuse_other_splits(pair, loaded.values(), options)
        sets = encode_sets(two_sided.editable, loaded, **options.of_rows)
        evaluator = PathEvaluator(interpolated, sets, progress)
        evaluator.measure(grid)
        on = evaluator.role("ood") or evaluator.role("task")
        layer_paths = LayerPaths(evaluator, on, layer_grid, seed=seed)
        worst, barrier = layer_paths.worst(grid)
        measured = layer_paths.measure(worst)
        flags = Flags(layer_paths, measured, worst, barrier)
        losses = {which[1]: evaluator.losses(which, grid) for which in on}
        best = loss_curves.best_alpha(np.array(grid), losses)
        settings = SharpnessSettings(
            rhos=radii, norm=norm, adaptive=adaptive, normalise=normalise, steps=steps, starts=starts,
            pairs=pairs, per_size=per_size, matrices_only=matrices_only, cached=layer_paths.cached, seed=seed,
        )  # fmt: skip
        task_batches = _task_batches(evaluator, batches, batch_rows, seed)
        screened = sharpen == "screened"
        sharpness_rows = _sharpness(
            evaluator, flags, task_batches, settings, sharp_alphas, {best, worst}, rho if screened else None
        )
        flagged = [path.layer for path, flag in zip(measured, flags.stragglers, strict=True) if flag]
        candidates = remedies(interpolated, pair, flagged) if flagged else []
        remedied, remedy_notes = remedy_rows(evaluator, candidates, sorted({0.5, worst, 1.0}))
        notes += remedy_notes
        chosen = (flags.chosen() if screened else flags.layers) if curvature else []
        spectra = _curvature(evaluator, chosen, task_batches[0], settings, notes)
    sharpness_table, remedy_table = pd.DataFrame(sharpness_rows), pd.DataFrame(remedied, columns=REMEDIES)
    table = layer_table(flags, sharpness_table, rho, remedy_table, worst, on)
    set_table = interpolation.set_rows(evaluator, grid)
    metrics = metrics_of(flags, table, set_table, sharpness_table, rho)
    metrics |= {
        "best_alpha": best, "batches": len(task_batches), "pinned": len(interpolated.pinned),
        "missing": len(evaluator.missing),
    }  # fmt: skip
    notes = [*evaluator.missing, *notes_of(table, set_table, metrics, on, settings, layer_paths), *notes]
    notes += pinned_note(interpolated.pinned)
    notes += set_notes(sets)
    curves = pd.DataFrame(spectra, columns=CURVATURE)
    tables = {
        "layers": table, "path": pd.DataFrame(interpolation.path_rows(evaluator, grid)),
        "sets": pd.DataFrame(set_table),
        "layer_paths": pd.DataFrame([row for path in measured for row in layer_paths.path_rows(path)]),
        "sharpness": sharpness_table, "remedies": remedy_table,
        "curvature": with_sharpness(curves, sharpness_table, radii[0]),
    }  # fmt: skip
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


REMEDIES = ["remedy", "setting", "alpha", "role", "set", "loss", "accuracy"]
CURVATURE = ["alpha", "layer", "name", "top", "bottom", "trace", "trace_error"]


def _checked(
    rhos: Sequence[float], rho: float, norm: Norm, steps: int, starts: int, pairs: int, batches: int,
    batch_rows: int,
) -> tuple[float, ...]:  # fmt: skip
    for radius in (*rhos, rho):
        if not 0 < radius < math.inf:
            raise InputError(f"rhos holds {radius}; a radius is above 0")
    if rho not in rhos:
        raise InputError(f"rho is {rho}, which is not in rhos {tuple(rhos)}; add it, or choose one of them")
    if norm == "linf" and starts < 5:
        raise InputError(
            f"starts is {starts}; with norm linf a single start may find less than half of the worst rise. "
            "Set starts to 5 or more"
        )
    least = {"steps": (steps, 2), "starts": (starts, 1), "pairs": (pairs, 0), "batches": (batches, 1)}
    for name, (value, low) in {**least, "batch_rows": (batch_rows, 1)}.items():
        if value < low:
            raise InputError(f"{name} is {value}; at least {low}")
    return tuple(sorted({float(radius) for radius in rhos}))


# A batch of rows, in a form that workers take: its set and the indices of its rows.
BatchKey: TypeAlias = tuple[SetKey, tuple[int, ...]]


def _task_batches(evaluator: PathEvaluator, batches: int, size: int, seed: int) -> list[BatchKey]:
    objectives = {which: _objective(evaluator, which) for which in evaluator.role("task")}
    set_of = {id(objective): which for which, objective in objectives.items()}
    drawn = row_batches(list(objectives.values()), batches, size, seed)
    return [(set_of[id(batch.objective)], batch.rows) for batch in drawn]


def _objective(evaluator: PathEvaluator, which: SetKey) -> Objective:
    return Objective(evaluator.sets[which], tokens=evaluator.sets[which].batch_tokens)


def _sharpness(
    evaluator: PathEvaluator, flags: Flags, batches: Sequence[BatchKey], settings: SharpnessSettings,
    alphas: Sequence[float], flagged_alphas: set[float], rho: float | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Sharpness of layers at some α, and of flagged layers at some more.

    Layers that do not stand out are measured at `rho` and at both ends only, unless it is None.
    """
    chosen = flags.layers if rho is None else flags.chosen()
    others = {layer.name: (rho,) for layer in flags.layers if layer not in chosen and rho is not None}
    parts = {
        alpha: flags.layers if alpha in (0.0, 1.0) else chosen if alpha in alphas else flags.flagged()
        for alpha in sorted({*alphas, *flagged_alphas})
    }
    plan = [
        (alpha, partial(_batch_sharpness, number=number, batch=batch, joint=alpha in alphas))
        for alpha, layers in parts.items()
        for number, batch in enumerate(batches)
        if layers
    ]
    steps = [len(parts[alpha]) + (alpha in alphas) for alpha, _ in plan]
    calls = (
        partial(
            call, alpha=alpha, layers=tuple(layer.index for layer in parts[alpha]), settings=settings,
            radii=others, done=sum(steps[:index]), total=sum(steps),
        )
        for index, (alpha, call) in enumerate(plan)
    )  # fmt: skip
    by_alpha: dict[float, list[BatchSharpness]] = {}
    for index, ((alpha, _), values) in enumerate(zip(plan, evaluator.run(calls), strict=True)):
        by_alpha.setdefault(alpha, []).append(values)
        evaluator.tell(sum(steps[: index + 1]), sum(steps), f"sharpness at alpha {alpha:g}")
    return [
        {"alpha": alpha, **row}
        for alpha, values in by_alpha.items()
        for row in mean_over_batches(parts[alpha], values)
    ]


def _batch_sharpness(
    evaluator: PathEvaluator, *, alpha: float, number: int, batch: BatchKey, layers: Sequence[int],
    settings: SharpnessSettings, radii: Mapping[str, Sequence[float]], joint: bool, done: int, total: int,
) -> BatchSharpness:  # fmt: skip
    """Sharpness at one α on one batch, in this process or on a worker."""
    evaluator.clear_prefix()
    evaluator.interpolated.set_alpha(alpha)
    which, rows = batch
    perturbed = [layer for layer in evaluator.interpolated.layers if layer.index in layers]
    return batch_sharpness(
        evaluator.interpolated.model, perturbed,
        RowBatch(_objective(evaluator, which), rows), number, settings, joint=joint, radii=radii,
        report=lambda count, name: evaluator.tell(done + count, total, f"sharpness of {name}"),
    )  # fmt: skip


def _curvature(
    evaluator: PathEvaluator, layers: Sequence[Layer], batch: BatchKey, settings: SharpnessSettings,
    notes: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Both ends of the spectrum and the trace of each layer at base and tuned, on one batch."""
    plan = [(alpha, layer) for alpha in (0.0, 1.0) for layer in layers]
    measure = partial(_spectrum, batch=batch, settings=settings)
    calls = (partial(measure, alpha=alpha, index=layer.index) for alpha, layer in plan)
    rows: list[dict[str, Any]] = []
    for done, ((alpha, layer), result) in enumerate(zip(plan, evaluator.run(calls), strict=True)):
        if isinstance(result, str):
            notes.append(f"Curvature was not measured: the model cannot be differentiated twice ({result}).")
            return rows
        rows.append({"alpha": alpha, "layer": layer.index, "name": layer.name, **result._asdict()})
        evaluator.tell(done + 1, len(plan), f"curvature of {layer.name}")
    return rows


def _spectrum(
    evaluator: PathEvaluator, *, alpha: float, index: int, batch: BatchKey, settings: SharpnessSettings
) -> curvatures.Spectrum | str:
    """The spectrum of one layer at one α, in this process or on a worker; or why torch refuses it."""
    evaluator.interpolated.set_alpha(alpha)
    which, rows = batch
    (layer,) = (candidate for candidate in evaluator.interpolated.layers if candidate.index == index)
    with (
        logits_normalised(evaluator.interpolated.model, settings.normalise),
        PerturbedWeights(settings.parameters(layer), adaptive=settings.adaptive) as weights,
    ):
        model, generator = evaluator.interpolated.model, torch.Generator().manual_seed(settings.seed)
        hessian = curvatures.HessianProduct(model, evaluator.sets[which], rows, weights)
        try:
            return curvatures.spectrum(hessian.product, weights.zero, generator=generator)
        except RuntimeError as error:
            if not curvatures.refuses_second_derivative(error):
                raise
            return str(error).partition("\n")[0]
