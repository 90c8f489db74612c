"""Layer-wise sharpness on the path from base to tuned: which block makes a hole, and how fragile it is there.

Every layer is led alone from base to tuned, from either anchor, and held against random moves of the same
size and against its equal share of the whole path's barrier; one that stands out, and that it helps to pin,
is a straggler. Sharpness, the worst and the mean rise of the task loss within a radius, is measured for each
layer and for all blocks at places on the path. It is described, never judged: whole-model sharpness does not
tell how a model generalises, and follows the learning rate.
Sources: arXiv:2410.16476 (the question, and the notion of stragglers; no code, and only its abstract could be
read: the rule is ours); arXiv:2302.07011 (the measures); arXiv:2109.01903 (the path).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from diagnostics.analyses.sharpness.ascent import Norm
from diagnostics.analyses.sharpness.curvature import HessianProduct, Spectrum, spectrum
from diagnostics.analyses.sharpness.layer_paths import LayerPaths
from diagnostics.analyses.sharpness.layer_sharpness import (
    Rises,
    RowBatch,
    SharpnessSettings,
    averaged,
    logits_normalised,
    lots,
    rises_of,
)
from diagnostics.analyses.sharpness.remedies import remedies, remedy_rows
from diagnostics.analyses.sharpness.tables import Flags, judgement, layer_table, metrics_of, with_sharpness
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation import loss_curves
from diagnostics.evaluation.interpolation import (
    ALPHAS,
    HALF,
    PathEvaluator,
    Which,
    check_alphas,
    is_half,
    model_notes,
    path_rows,
    pinned_note,
    set_rows,
)
from diagnostics.evaluation.sets import sets_of
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.interpolated import InterpolatedModel, Layer
from probes.models.perturb import PerturbedWeights
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective

if TYPE_CHECKING:
    import plotly.graph_objects as go

LAYER_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = {
    "stragglers": "layers that make a hole in the path, and that it helps to pin",
    "best_alpha": "the α of the lowest OOD loss; without OOD rows, of the lowest task loss",
    "worst_alpha": "the interior α furthest above the line between the ends; the middle if none is above",
    "barrier_nats": "by how much, on the OOD rows if there are any, else on the task rows",
    "strong_failures": "OOD sets on which some α is surely worse than both ends",
    "successes": "OOD sets on which some α is surely better than both ends",
    "repaired_nats": "loss that pinning the best single layer takes off at the worst α",
    "overconfidence_ood": "confidence of tuned over base on OOD sets where tuned is less accurate, else 0",
    "load_bearing": "layers without a barrier that tuned needs and that moved far",
    "sharpness_base": "worst rise of the normalised task loss over all blocks at base, nats; not a fault",
    "sharpness_tuned": "the same at tuned",
    "average_base": "mean rise at base",
    "average_tuned": "the same at tuned",
    "layers": "layers, embeddings and head among them",
    "batches": "batches of task rows that sharpness was measured on",
    "unsteady": "values whose starts disagree by more than a tenth: lower bounds",
    "pinned": "tensors that base lacks, and that are tuned's at every α",
    "missing": "places whose loss was not finite",
    **{f"rows_{role}": f"{role} rows measured" for role in ("task", "keep", "ood")},
}


def summary(result: Result) -> str:
    """Whether base and tuned can be blended, and which layers stand in the way."""
    m, layers = result.metrics, result.tables["layers"]
    names = ", ".join(layers.loc[layers["straggler"], "name"])
    who = f"stragglers: {names}" if names else "no straggler"
    hole = f"barrier {m['barrier_nats']:.3g} nats at alpha {m['worst_alpha']:g}"
    return f"best alpha {m['best_alpha']:g} (0 base, 1 tuned); {hole}; {who}"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.sharpness import figures

    return figures.draw(result)


@analysis(
    "sharpness",
    question="Can base and tuned be blended without a hole in between, and if not, which layer makes it?",
    reading=(
        "A barrier of 0 says that a layer may stand anywhere between base and tuned; from 0.05 nats, and far "
        "from the other layers, it is a straggler: pin it, realign it, or leave it out of a blend. Sharpness "
        "is the rise of the task loss within a radius; it compares only at equal rows, radius and batch. A "
        "sharper layer is not a worse one: it follows learning rate and displacement. On log axes a slope of "
        "2 is curvature, and of 1 a loss that is not at its minimum."
    ),
    paper="arXiv:2410.16476",
    cost=(
        "forward passes over all rows for each alpha and about 12 for each layer; for sharpness about 200 "
        "passes forward and back over a few batches for each layer, and as many more at further places for "
        "those that stand out: best on a GPU"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={
            "alphas": (0.0, 0.5, 1.0),
            "layer_alphas": (0.5,),
            "sharpness_alphas": (1.0,),
            "rhos": (0.5,),
            "steps": 3,
            "batches": 1,
            "batch_rows": 8,
            "rows": 24,
            "curvature": False,
        },
        absolute={"layers": 0},
        relative={"sharpness_tuned": 0.05, "average_tuned": 0.05},
    ),
)
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
    """Measure barriers, stragglers, remedies and sharpness, layer by layer, along the path.

    A layer is a transformer block; embeddings, and what is behind the blocks, are two more. Barriers are of
    the OOD rows, pooled, or of the task rows where there are none; sharpness is of the task rows.

    Args:
        pair: base and tuned; adapters are merged.
        task: rows of what was trained: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        ood: rows that it was not made for.
        alphas: places of the whole model (WiSE-FT's grid).
        layer_alphas: places of a single layer (ours); 0, 0.5, 1 screens faster.
        sharpness_alphas: where sharpness is measured; 0 and 1 always are. Flagged layers are also measured
            at the best and the worst α.
        rhos: radii, a doubling grid (ours; published ones go by model and norm).
        rho: the one that `layers` shows.
        norm: l2; or linf, a hard search whose values are lower bounds, with at least 5 starts.
        adaptive: perturb in proportion to |w|; a weight that is zero stays zero.
        normalise: normalise logits, as published: else any rise in their scale moves the measure.
        steps: of an ascent (as published).
        starts: of an ascent; the first is no perturbation with a kick.
        pairs: of random perturbations for the mean rise (published: 20 samples, which are 10); 0: none.
        batches, batch_rows: task rows that sharpness is measured on (published: 8 of 128); the maximum is
            taken batch by batch, so that larger ones give smaller values.
        per_size: scale radii by √(weights of a layer / of the median layer).
        matrices_only: leave norm gains and biases as they are.
        sharpen: screened: every layer at `rho` at both ends, and the flagged ones with two others at all
            radii and places; all: every layer there.
        curvature: cross-check by the Hessian of the first batch, of the flagged layers and two others.
        rows: most rows of a set, drawn at random.
        options: how rows are read and how models run on them.
        dtype: of the model. Half precision counts as float32, for there a small step changes no weight.
        seed: of rows, kicks and random moves.
        progress: called with (done, total, what).

    Metrics: see `METRICS`.
    Tables: `layers` (layer: -1 is the embeddings, the last what is behind the blocks; name, displacement,
        barrier …, sharpness_base, sharpness_tuned, straggler, load_bearing, action), `path` (alpha, role,
        set, metric, value), `sets`, `layer_paths` (layer, anchor, alpha, loss), `sharpness` (alpha, layer,
        name, rho, worst, average …), `remedies` (remedy, setting, alpha, role, set, loss, accuracy),
        `curvature` (alpha, layer, top, bottom, trace, predicted, worst).

    Raises:
        InputError: a parameter out of range, rows or a model that cannot be scored, ends that are not finite,
            a model without a list of blocks.
    """
    import pandas as pd

    grid, layer_grid = check_alphas(alphas), check_alphas(layer_alphas)
    if sharpen not in ("screened", "all"):
        raise InputError(f"sharpen is {sharpen!r}; it is 'screened' or 'all'")
    radii = _checked(rhos, rho, norm, steps, starts, pairs, batches, batch_rows)
    places = check_alphas(sharpness_alphas, least=2)
    asked = (options.dtype or "").removeprefix("torch.")
    if asked in HALF:
        options = replace(options, dtype="float32")
    with TwoSidedModel(pair, **options.of_models) as host:
        walk, notes = InterpolatedModel(host), model_notes(pair, host.model)
        if asked in HALF:
            notes.append(f"The model was run in float32: in {asked} small perturbations change no weight.")
        if is_half(host.model):
            raise InputError(
                "sharpness: the model runs in half precision, in which small perturbations change no weight; "
                "set sharpness.dtype to float32"
            )
        given = {"task": task, "keep": keep, "ood": ood}
        sets = sets_of(
            given, host.editable, purpose="sharpness", rows=rows, seed=seed, **options.of_rows
        )  # fmt: skip
        along = PathEvaluator(walk, sets, progress)
        along.measure(grid)
        on = along.role("ood") or along.role("task")
        layer_paths = LayerPaths(along, on, layer_grid, seed=seed)
        worst = layer_paths.worst(grid)
        measured = layer_paths.measure(worst)
        flags = Flags(layer_paths, measured, worst, layer_paths.barrier(grid))
        best = loss_curves.best_alpha(np.array(grid), {which[1]: along.losses(which, grid) for which in on})
        settings = SharpnessSettings(
            rhos=radii, norm=norm, adaptive=adaptive, normalise=normalise, steps=steps, starts=starts,
            pairs=pairs, per_size=per_size, matrices_only=matrices_only, cached=layer_paths.cached, seed=seed,
        )  # fmt: skip
        drawn = _drawn(along, batches, batch_rows, seed)
        alone = rho if sharpen == "screened" else None
        sharp = _sharpness(along, flags, drawn, settings, places, {best, worst}, alone)
        flagged = [path.layer for path, flag in zip(measured, flags.stragglers, strict=True) if flag]
        remedied: list[dict[str, Any]] = []
        if flagged:
            remedied, said = remedy_rows(along, remedies(walk, pair, flagged), sorted({0.5, worst, 1.0}))
            notes += said
        curved = []
        if curvature:
            chosen = flags.chosen() if sharpen == "screened" else flags.layers
            curved = _curvature(along, chosen, drawn[0], settings, notes)
    sharp_table, remedy_table = pd.DataFrame(sharp), pd.DataFrame(remedied, columns=REMEDIES)
    table = layer_table(flags, sharp_table, rho, remedy_table, worst, on)
    set_table = set_rows(along, grid)
    metrics = metrics_of(flags, table, set_table, sharp_table, rho)
    metrics |= {
        "best_alpha": best,
        "batches": len(drawn),
        "pinned": len(walk.pinned),
        "missing": len(along.missing),
    }
    notes = [*along.missing, *judgement(table, set_table, metrics, on, settings, layer_paths), *notes]
    notes += pinned_note(walk.pinned)
    notes += dict.fromkeys(note for each in sets.values() for note in each.notes)
    curves = pd.DataFrame(curved, columns=CURVATURE)
    tables = {
        "layers": table,
        "path": pd.DataFrame(path_rows(along, grid)),
        "sets": pd.DataFrame(set_table),
        "layer_paths": pd.DataFrame([row for path in measured for row in layer_paths.path_rows(path)]),
        "sharpness": sharp_table,
        "remedies": remedy_table,
        "curvature": with_sharpness(curves, sharp_table, radii[0]),
    }
    return Result(metrics=metrics, tables=tables, notes=tuple(notes))


REMEDIES = ["remedy", "setting", "alpha", "role", "set", "loss", "accuracy"]
CURVATURE = ["alpha", "layer", "name", "top", "bottom", "trace", "trace_error"]


def _checked(
    rhos: Sequence[float],
    rho: float,
    norm: Norm,
    steps: int,
    starts: int,
    pairs: int,
    batches: int,
    batch_rows: int,
) -> tuple[float, ...]:
    for each in (*rhos, rho):
        if not 0 < each < math.inf:
            raise InputError(f"rhos holds {each}; a radius is above 0")
    if rho not in rhos:
        raise InputError(f"rho is {rho}, which is not among rhos {tuple(rhos)}; add it, or name one of them")
    if norm == "linf" and starts < 5:
        raise InputError(
            f"starts is {starts}, and one search of kind linf may find less than half of the worst rise; set "
            "starts to 5 or more"
        )
    least = {"steps": (steps, 2), "starts": (starts, 1), "pairs": (pairs, 0), "batches": (batches, 1)}
    for name, (value, low) in {**least, "batch_rows": (batch_rows, 1)}.items():
        if value < low:
            raise InputError(f"{name} is {value}; at least {low}")
    return tuple(sorted({float(each) for each in rhos}))


# A batch of rows: of which set, and which of them.
Drawn: TypeAlias = tuple[Which, tuple[int, ...]]


def _drawn(along: PathEvaluator, batches: int, size: int, seed: int) -> list[Drawn]:
    """Batches of task rows."""
    objectives = {which: _objective(along, which) for which in along.role("task")}
    names = {id(objective): which for which, objective in objectives.items()}
    found = lots(list(objectives.values()), batches, size, seed)
    return [(names[id(lot.objective)], lot.rows) for lot in found]


def _objective(along: PathEvaluator, which: Which) -> Objective:
    return Objective(along.sets[which], tokens=along.sets[which].batch_tokens)


def _sharpness(
    along: PathEvaluator,
    flags: Flags,
    batches: Sequence[Drawn],
    settings: SharpnessSettings,
    places: Sequence[float],
    more: set[float],
    rho: float | None,
) -> list[dict[str, Any]]:
    """Sharpness of layers at places on the path, and of flagged ones at some more.

    Args:
        rho: of layers that do not stand out, the one radius, at both ends alone; None: all are measured.
    """
    chosen = flags.layers if rho is None else flags.chosen()
    others = {layer.name: (rho,) for layer in flags.layers if layer not in chosen and rho is not None}
    parts = {
        alpha: flags.layers if alpha in (0.0, 1.0) else chosen if alpha in places else flags.flagged()
        for alpha in sorted({*places, *more})
    }
    plan = [
        (alpha, partial(_rises, number=number, drawn=drawn, whole=alpha in places))
        for alpha, layers in parts.items()
        for number, drawn in enumerate(batches)
        if layers
    ]
    steps = [len(parts[alpha]) + (alpha in places) for alpha, _ in plan]
    calls = (
        partial(
            call, alpha=alpha, layers=tuple(layer.index for layer in parts[alpha]), settings=settings,
            radii=others, done=sum(steps[:place]), total=sum(steps),
        )
        for place, (alpha, call) in enumerate(plan)
    )  # fmt: skip
    found: dict[float, list[Rises]] = {}
    for place, ((alpha, _), made) in enumerate(zip(plan, along.each(calls), strict=True)):
        found.setdefault(alpha, []).append(made)
        along.tell(sum(steps[: place + 1]), sum(steps), f"sharpness at alpha {alpha:g}")
    return [{"alpha": alpha, **row} for alpha, made in found.items() for row in averaged(parts[alpha], made)]


def _rises(
    along: PathEvaluator,
    *,
    alpha: float,
    number: int,
    drawn: Drawn,
    layers: Sequence[int],
    settings: SharpnessSettings,
    radii: Mapping[str, Sequence[float]],
    whole: bool,
    done: int,
    total: int,
) -> Rises:
    """Sharpness at one place on one batch, here or on a worker."""
    along.forget()
    along.walk.place(alpha)
    which, rows = drawn
    return rises_of(
        along.walk.model, [layer for layer in along.walk.layers if layer.index in layers],
        RowBatch(_objective(along, which), rows), number, settings, whole=whole, radii=radii,
        tell=lambda count, name: along.tell(done + count, total, f"sharpness of {name}"),
    )  # fmt: skip


def _curvature(
    along: PathEvaluator, layers: Sequence[Layer], drawn: Drawn, settings: SharpnessSettings, notes: list[str]
) -> list[dict[str, Any]]:
    """Both ends of the spectrum and the trace of each layer at base and tuned, on one batch."""
    plan = [(alpha, layer) for alpha in (0.0, 1.0) for layer in layers]
    calls = (
        partial(_spectrum, alpha=alpha, index=layer.index, drawn=drawn, settings=settings)
        for alpha, layer in plan
    )
    found: list[dict[str, Any]] = []
    for done, ((alpha, layer), made) in enumerate(zip(plan, along.each(calls), strict=True)):
        if isinstance(made, str):
            notes.append(f"Curvature was not measured: the model cannot be differentiated twice ({made}).")
            return found
        found.append({"alpha": alpha, "layer": layer.index, "name": layer.name, **made._asdict()})
        along.tell(done + 1, len(plan), f"curvature of {layer.name}")
    return found


def _spectrum(
    along: PathEvaluator, *, alpha: float, index: int, drawn: Drawn, settings: SharpnessSettings
) -> Spectrum | str:
    """The spectrum of one layer at one place, here or on a worker; or why it has none."""
    import torch

    along.walk.place(alpha)
    which, rows = drawn
    (layer,) = (each for each in along.walk.layers if each.index == index)
    with (
        logits_normalised(along.walk.model, settings.normalise),
        PerturbedWeights(settings.parameters(layer), adaptive=settings.adaptive) as moved,
    ):
        try:
            return spectrum(
                HessianProduct(along.walk.model, along.sets[which], rows, moved).product,
                moved.zero,
                generator=torch.Generator().manual_seed(settings.seed),
            )
        except (RuntimeError, NotImplementedError) as error:
            return str(error).partition("\n")[0]
