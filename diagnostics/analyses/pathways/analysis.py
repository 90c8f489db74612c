"""Grokking pathways: reorganisation or drift of expert routing after memorisation.

While a mixture of experts memorises, pathways diverge. When it starts to share computation, those of one
group converge and stay apart from other groups', often long after the training loss is flat.
Source: "Grokking in LLM Pretraining? Monitor Memorization-to-Generalization without Test",
arXiv:2506.21551v4. The gap is ours: random labels move the published numbers too, but not the gap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from diagnostics.analyses.pathways.figures import draw
from diagnostics.analyses.pathways.notes import notes
from diagnostics.analyses.pathways.pathway import ALPHABETS, Alphabet
from diagnostics.analyses.pathways.record import Record, RecordingPlan, Samples, comparable, draw_rows
from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.snapshot import PathwaySettings
from diagnostics.analyses.pathways.tables import metrics, tables
from diagnostics.core.analysis import DeviceTest, Result, analysis, plain
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.execution.workers import checkpoint_runner
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.experts.routes import RouteWeights

METRICS = {
    "reorganising": "1 if after memorisation the distance within groups falls and the gap widens",
    "drift_without_signal": "1 if after memorisation routes move and the gap between groups does not",
    "spearman_distance": "rank correlation of the distance within groups with the held-out metric (a loss "
    "with its sign flipped) over the checkpoints since memorisation; the paper's are near −0.95",
    "spearman_consistency": "the same for smoothness; the paper's are near 0.95",
    "pearson_distance": "Pearson correlation of the distance within groups",
    "pearson_consistency": "Pearson correlation of smoothness",
    "spearman_gap": "rank correlation of the gap between groups",
    "pearson_gap": "Pearson correlation of the gap",
    "spearman_loss": "rank correlation of the loss of the followed samples, for comparison",
    "pearson_loss": "Pearson correlation of that loss",
    "memorised_step": "median step from which on samples are memorised",
    "memorised_step_low": "lower end of its 95 % interval",
    "memorised_step_high": "upper end",
    "memorised_share": "share of samples memorised before the last checkpoint",
    "turn_step": "step of half the change of the gap, if routes reorganise and the held-out metric improves",
    "turn_step_low": "lower end of its 95 % interval, neighbouring checkpoints included",
    "turn_step_high": "upper end",
    "held_out_turn_step": "step of half the change of the held-out metric",
    "held_out_turn_step_low": "lower end",
    "held_out_turn_step_high": "upper end",
    "distance_change": "change since memorisation of the mean distance within groups, as a share of the "
    "longer pathway; below 0 pathways converge",
    "distance_change_low": "lower end of its paired 95 % interval",
    "distance_change_high": "upper end",
    "distance_first": "distance within groups at the first checkpoint",
    "distance_last": "at the last",
    "gap_change": "change since memorisation of the distance between groups minus that within",
    "gap_change_low": "lower end of its paired 95 % interval",
    "gap_change_high": "upper end",
    "gap_change_p": "permutation p-value of that change, by shuffling group labels",
    "gap_first": "the gap at the first checkpoint",
    "gap_last": "at the last",
    "gap_p": "permutation p-value of the last gap, by shuffling group labels",
    "consistency_change": "change since memorisation of smoothness, the mean cosine of consecutive layers' "
    "routing embeddings; higher is smoother",
    "consistency_change_low": "lower end of its paired 95 % interval",
    "consistency_change_high": "upper end",
    "consistency_first": "smoothness at the first checkpoint",
    "consistency_last": "at the last",
    "loss_change_nats": "change since memorisation of the loss of the followed samples, in nats",
    "loss_change_low_nats": "lower end of its paired 95 % interval",
    "loss_change_high_nats": "upper end",
    "loss_first_nats": "loss of the followed samples at the first checkpoint",
    "loss_last_nats": "at the last",
    "held_out_change": "change of the held-out metric since memorisation",
    "held_out_change_low": "lower end of its paired 95 % interval",
    "held_out_change_high": "upper end",
    "held_out_first": "held-out metric at the first checkpoint",
    "held_out_last": "at the last",
    "drift": "mean distance between a sample's first and last pathway; 0: none moved",
    "drift_low": "lower end of its 95 % interval",
    "drift_high": "upper end",
    "since_step": "step from which changes and correlations are taken: memorisation, else the first",
    "points": "checkpoints since then; correlations need 6",
    "checkpoints": "number of checkpoints",
    "samples": "followed samples",
    "groups": "groups of samples",
    "layers": "layers with experts",
    "experts": "experts per layer",
    "top_k": "experts chosen per token",
    "rows_task": "held-out rows",
    "gp_undefined": "samples and checkpoints with an undefined value of the paper's consistency",
    "truncated": "rows truncated to what the model takes",
    "unrouted": "rows left out because no token has a route that counts",
}


def summary(result: Result) -> str:
    """The verdict with its reason."""
    row = result.tables["verdict"].iloc[0]
    text = f"{row['verdict']}: {row['why']}"
    if "spearman_distance" in result.metrics:
        rho, points = result.metrics["spearman_distance"], result.metrics["points"]
        text += f"; rank correlation of distance and held-out {row['metric']} {rho:+.2f} over {points}"
    return text


@analysis(
    "pathways",
    question="Do routes still reorganise after the training rows are memorised, or only drift?",
    reading=(
        "Distances are edits between pathways as a share of the longer one: 0 means the same experts, 1 none "
        "in common. If after memorisation the distance within groups falls and the gap to other groups "
        "widens, routing comes to be shared. If the gap stays flat while the rest moves, routing drifts, as "
        "it does under weight decay even with random labels. Smoothness is higher where consecutive layers "
        "choose similar router directions; the paper's own formula is higher for more erratic routes. Raw "
        "edits depend on the length of pathways and the balance of experts. All of this is correlation: no "
        "route was changed to see its effect."
    ),
    paper="arXiv:2506.21551",
    cost="a forward pass of each checkpoint over the rows, then edit distances between all pairs of samples",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"samples": 24, "permutations": 100, "draws": 100},
        relative={"distance_first": 1e-2},
    ),
)
def grokking_pathways(
    series: Any,
    task: Any,
    train: Any = None,
    *,
    weights: RouteWeights = "full",
    tau: float = 0.7,
    alphabet: Alphabet = "tagged",
    drop_first: bool = False,
    fold_gain: bool = False,
    samples: int = 400,
    metric: Literal["auto", "accuracy", "loss"] = "auto",
    epsilon: float | None = None,
    delta: float = 0.05,
    permutations: int = 1000,
    draws: int = 1000,
    options: RowOptions = RowOptions(),
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow the pathways of samples over the checkpoints of a mixture of experts.

    Routes, losses and routers are recorded one checkpoint at a time; with a cache an interrupted run is
    resumed. Verdicts use distances as a share of the longer pathway.

    Args:
        series: the checkpoints of one run, in order: a `CheckpointSeries`, or references.
        task: held-out rows: a task, a file, texts, or several.
        train: rows of the training data, in the same forms; their routes and losses are followed. Without
            them the task rows are followed, and memorisation is not dated.
        weights: `full`: all router weights (the literal reading of the paper); `top`: those of the chosen
            experts.
        tau: share of a layer's weight held by the kept experts; the paper's is 0.7 (it also tries 0.5 to
            0.8).
        alphabet: symbols to compare: experts of each layer (`tagged`, ours), ids regardless of the layer
            (`shared`), or the paper's string character by character (`chars`).
        drop_first: leave out the first token, which takes the same route in every sample.
        fold_gain: compare router rows times the gains of the norms before them (not in the paper).
        samples: most rows of a group, and 3,000 in all (ours).
        metric: of the held-out rows; `auto` is loss for texts and accuracy otherwise. Accuracy of completions
            is the share of scored tokens that are the most likely ones.
        epsilon: highest loss in nats of a memorised sample; None: for each group the value on a grid of 0.1,
            up to 2, with which 20 to 25 % are memorised before the last checkpoint (the paper's rule).
        delta: largest difference of a memorised sample's loss from its last one (the paper's 0.05).
        permutations: of group labels and of checkpoints.
        draws: bootstrap draws of samples, for the intervals of steps.
        options: how rows are read and how models run on them.
        max_length: most tokens of a row; None: what the model takes. Length changes routes: compare alike.
        seed: of the choice of rows, permutations and draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`. Correlations are left out below 6 checkpoints since memorisation.
    Tables:
        `verdict`: one row: verdict, why, since, until (steps compared), memorised, memorised_low,
            memorised_high (step), memorised_share, turn, turn_low, turn_high, held_out_turn,
            held_out_turn_low, held_out_turn_high (steps), metric (accuracy or loss).
        `steps`: one row a checkpoint, means over samples: step, label, samples (count), distance, gap (share
            of the longer pathway), <quantity>_se, <quantity>_low, <quantity>_high (standard error, 95 %
            interval), consistency (cosine), loss (nats), held_out (share or nats), between, overall
            (distances), gap_p, distance_raw (edits), length (symbols), gp_inconsistency, gp_undefined
            (count), entropy (nats), effective_dimension, memorised (share).
        `changes`: one row a quantity: quantity, since, until (steps), before, after, change, low, high
            (paired 95 % interval), p (of the gap).
        `correlations`: one row a quantity, of (levels or changes) and lag (checkpoints): quantity, of, lag,
            since, points (count), spearman, pearson, p, paper_low, paper_high.
        `groups`: one row a group and checkpoint: group, step, samples, distance, distance_se, distance_low,
            distance_high, between, gap, gap_se, gap_low, gap_high, gap_p, distance_raw, length, consistency,
            gp_inconsistency, entropy, loss, epsilon (nats), memorised (share).
        `layers`: one row a layer and checkpoint: layer, step, distance, distance_se, distance_low,
            distance_high, between, gap, gap_se, gap_low, gap_high, length (experts), entropy (nats),
            effective_dimension, cosine_ahead (with the next layer).
        `samples`: one row a sample: sample, row (file and line), group, tokens (count), memorised_step, drift
            (share), drift_raw (edits).
        `values`: one row a sample and checkpoint: sample, group, step, loss (nats), length (symbols),
            distance (to its group), consistency, gp_inconsistency, entropy (nats).
        `matrix`: one row a pair of samples, for some samples at three checkpoints: step, sample, other,
            distance.
        `routes`: one row a sample and layer, for these: step, sample, layer, expert (the top one), share (of
            the weight), kept (experts on the pathway).

    Raises:
        NotApplicableError: a dense model.
        InputError: a series of one, checkpoints with different experts, a parameter out of range, rows or a
            model that cannot be scored.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> run, rows = BUNDLED / "grokking/parity", BUNDLED / "grokking/held-out.jsonl"
        >>> few = {"samples": 4, "permutations": 100, "draws": 100}
        >>> checkpoints = [run / "checkpoint-0", run / "checkpoint-50"]
        >>> grokking_pathways(checkpoints, rows, **few).metrics["experts"]
        8
    """
    check(tau=tau, alphabet=alphabet, samples=samples, metric=metric, epsilon=epsilon, delta=delta,
          permutations=permutations, draws=draws)  # fmt: skip
    series = series_of(series)
    held = tasks(task, "task")
    followed, groups, rows = draw_rows(held if train is None else tasks(train, "train"), samples, seed)
    plan = RecordingPlan(
        followed=followed, held=held, drop_first=drop_first, fold_gain=fold_gain, options=options,
    )  # fmt: skip
    measured = series.measured(
        "pathways", plan.identity(), plan.measure, progress, least=(2, "a comparison of pathways"),
        run_calls=checkpoint_runner(series, options.device),
    )  # fmt: skip
    if metric == "auto":
        metric = "loss" if all(rows_of.shape == "text" for rows_of in held.values()) else "accuracy"
    settings = PathwaySettings(
        weights=weights, tau=tau, alphabet=alphabet, metric=metric, epsilon=epsilon, delta=delta,
        permutations=permutations, draws=draws, seed=seed,
    )  # fmt: skip
    names, labels = np.unique(groups, return_inverse=True)
    samples_drawn = Samples(
        names=tuple(map(str, names)), groups=labels.astype(np.int64), rows=tuple(rows),
        trained=train is not None,
    )  # fmt: skip
    routed = np.flatnonzero(np.all([np.asarray(arrays["tokens"]) > 0 for arrays in measured], axis=0))
    if len(routed) < 2:
        raise InputError(
            f"{rows[0]}: {len(routed)} rows have a token with a route that counts; give at least 2"
        )
    order = routed[np.argsort(samples_drawn.groups[routed], kind="stable")]
    records = [Record.of(arrays).take(order) for arrays in measured]
    counted = {
        "truncated": max(int(arrays["truncated"]) for arrays in measured),
        "unrouted": len(rows) - len(routed),
    }
    return result_of_records(
        series.steps, series.labels, records, samples_drawn.take(order), settings, counted=counted,
        progress=progress,
    )  # fmt: skip


def result_of_records(
    steps: Sequence[float], labels: Sequence[str], records: Sequence[Record], samples: Samples,
    settings: PathwaySettings, *, counted: Mapping[str, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:  # fmt: skip
    """The result of a run's records: the last part of `grokking_pathways`, for models that it cannot load.

    For your own modules `probes.experts.routes.capture_routes` records the routes of named routers.

    Args:
        steps: ascending, one for each record.
        labels: of the steps.
        records: of all samples at each step.
        samples: ordered by group.
        settings: parameters of the tables.
        counted: numbers of rows truncated or left out.

    Raises:
        InputError: as `grokking_pathways`, of the records.
    """
    comparable(labels, records)
    run = RoutingRun(steps, labels, records, samples, settings, progress=progress)
    frames = tables(run)
    values = {**metrics(run, frames), "truncated": 0, "unrouted": 0, **(counted or {})}
    return Result(
        metrics=values, tables=frames, notes=tuple(notes(run, frames, values)), analysis="pathways",
        parameters=plain(asdict(settings)),
    )  # fmt: skip


def check(
    *, tau: float, alphabet: str, samples: int, metric: str, epsilon: float | None, delta: float,
    permutations: int, draws: int,
) -> None:  # fmt: skip
    """Refuse parameters out of range before anything is loaded."""
    if not 0 < tau <= 1:
        raise InputError(f"tau is {tau:g}; it is a share of the weight, above 0 and at most 1")
    if alphabet not in ALPHABETS:
        raise InputError(f"alphabet is {alphabet!r}; give {', '.join(ALPHABETS)}")
    if metric not in ("auto", "accuracy", "loss"):
        raise InputError(f"metric is {metric!r}; give auto, accuracy or loss")
    if samples < 2:
        raise InputError(f"samples is {samples}; distances need at least 2 of a group")
    if epsilon is not None and epsilon <= 0:
        raise InputError(f"epsilon is {epsilon:g}; it is a loss in nats, above 0")
    if delta <= 0:
        raise InputError(f"delta is {delta:g}; it is a difference in nats, above 0")
    for name, value in (("permutations", permutations), ("draws", draws)):
        if value < 100:
            raise InputError(f"{name} is {value}; at least 100")
