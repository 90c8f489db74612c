"""Grokking pathways: does routing still reorganise after the training rows are memorised, or only drift?

While a mixture of experts memorises, its samples' pathways part; when it starts to share what it computes,
those of one group draw together again and stay apart from other groups'. That can go on long after the
training loss is flat, and needs no test set to be seen.
Source: "Grokking in LLM Pretraining? Monitor Memorization-to-Generalization without Test",
arXiv:2506.21551v4, which leaves open the router weights and symbols that are used here. The gap between
groups is ours: labels at random move the published numbers too, and not the gap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diagnostics.analyses.pathways.notes import notes
from diagnostics.analyses.pathways.pathway import ALPHABETS, Alphabet
from diagnostics.analyses.pathways.record import Record, RecordingPlan, Samples, comparable, some
from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.snapshot import PathwaySettings
from diagnostics.analyses.pathways.tables import metrics as numbers
from diagnostics.analyses.pathways.tables import tables
from diagnostics.core.analysis import Result, analysis, plain
from diagnostics.core.inputs import tasks
from diagnostics.execution.workers import checkpoint_runner
from probes.checkpoints.series import series_of
from probes.errors import InputError
from probes.experts.routes import RouteWeights

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRICS = {
    "reorganising": "1 if after memorisation the distance within groups surely falls and the gap widens",
    "drift_without_signal": "1 if after memorisation routes move and the gap between groups does not",
    "spearman_distance": "rank correlation of the distance within groups with the held-out metric over the "
    "checkpoints since memorisation, a loss with its sign turned; the paper's are near −0.95",
    "spearman_consistency": "the same of smoothness; the paper's are near 0.95",
    "pearson_distance": "Pearson's of the distance within groups",
    "pearson_consistency": "Pearson's of smoothness",
    "spearman_gap": "rank correlation of the gap between groups",
    "pearson_gap": "Pearson's of it",
    "spearman_loss": "rank correlation of the loss of the followed samples, for comparison",
    "pearson_loss": "Pearson's of it",
    "memorised_step": "median step from which on samples are memorised",
    "memorised_step_low": "lower end of its 95 % interval",
    "memorised_step_high": "upper end",
    "memorised_share": "share of samples memorised before the last checkpoint",
    "turn_step": "step at which the gap has made half of its way, where all says that memorisation gave way",
    "turn_step_low": "lower end of its 95 % interval, checkpoints around it included",
    "turn_step_high": "upper end",
    "held_out_turn_step": "the same of the held-out metric",
    "held_out_turn_step_low": "lower end",
    "held_out_turn_step_high": "upper end",
    "distance_change": "change since memorisation of the mean distance within groups, as a share of the "
    "longer pathway; below 0 they draw together",
    "distance_change_low": "lower end of its paired 95 % interval",
    "distance_change_high": "upper end",
    "distance_first": "distance within groups at the first checkpoint",
    "distance_last": "at the last",
    "gap_change": "change since memorisation of the distance between groups minus that within",
    "gap_change_low": "lower end of its paired 95 % interval",
    "gap_change_high": "upper end",
    "gap_change_p": "how often shuffled group labels give as large a change",
    "gap_first": "the gap at the first checkpoint",
    "gap_last": "at the last",
    "gap_p": "how often shuffled group labels give a gap as large as the last",
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
    "drift": "mean distance between a sample's pathways at the first and the last checkpoint: 0 none moved",
    "drift_low": "lower end of its 95 % interval",
    "drift_high": "upper end",
    "since_step": "step from which changes and correlations are taken: memorisation, else the first",
    "points": "checkpoints since then; below 6 no correlation is given",
    "checkpoints": "checkpoints",
    "samples": "samples followed",
    "groups": "groups of them",
    "layers": "layers with experts",
    "experts": "experts of a layer",
    "top_k": "experts chosen for a token",
    "rows_task": "held-out rows",
    "gp_undefined": "samples and checkpoints for which the paper's consistency is not defined",
    "truncated": "rows cut because they are longer than the model takes",
    "unrouted": "rows without a token whose route counts",
}


def summary(result: Result) -> str:
    """The verdict, with what it rests on."""
    row = result.tables["verdict"].iloc[0]
    text = f"{row['verdict']}: {row['why']}"
    if "spearman_distance" in result.metrics:
        told, points = result.metrics["spearman_distance"], result.metrics["points"]
        text += f"; rank correlation of distance and held-out {row['metric']} {told:+.2f} over {points}"
    return text


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.pathways import figures

    return figures.draw(result)


@analysis(
    "pathways",
    question="Do routes still reorganise after the training rows are memorised, or only drift?",
    reading=(
        "Distances are edits between pathways as a share of the longer one: 0 the same experts, 1 none in "
        "common. After memorisation a distance within groups that falls while the gap to other groups widens "
        "is routing that comes to be shared; a gap that stays flat while the rest moves is drift, which "
        "weight decay alone brings about, labels at random included. Smoothness is higher where consecutive "
        "layers look for the same directions; the paper's own formula, beside it, is higher where routes are "
        "more erratic. Raw edits follow the length of pathways and the balance of experts. All of it is "
        "correlation: no route was changed to see what it does."
    ),
    paper="arXiv:2506.21551",
    cost="a forward pass of each checkpoint over the rows, then edit distances between all pairs of samples",
    draw=draw,
    summary=summary,
    metrics=METRICS,
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
    max_length: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Follow the pathways of samples over the checkpoints of a run of a mixture of experts.

    A checkpoint's routes, losses and routers are recorded one model at a time; with a cache a run that was
    cut off goes on. Verdicts use distances as a share of the longer pathway.

    Args:
        series: the checkpoints of one run, in order: a `CheckpointSeries`, or references.
        task: held-out rows: a task, a file, texts, or several.
        train: rows that the run was trained on, in the same forms: their routes and losses are followed.
            Without them those of the task rows are, and nothing is said of memorisation.
        weights: `full` is all that a router weighs (the literal reading of the paper), `top` the weights of
            the experts that it chose.
        tau: share of a layer's weight that its kept experts hold; the paper's 0.7 (beside 0.5 to 0.8).
        alphabet: what is compared: experts of each layer (`tagged`, ours), ids alone whatever the layer
            (`shared`), or the paper's string character by character (`chars`).
        drop_first: leave out the first token, which takes the same route in every sample.
        fold_gain: compare router rows times the gains of the norms before them (not in the paper).
        samples: most rows of a group, and 3,000 in all (ours).
        metric: of the held-out rows; `auto` is loss for texts and accuracy for all else. Accuracy of
            completions is the share of scored tokens that are the likeliest.
        epsilon: loss in nats at which a sample may count as memorised; None: of each group the one on a
            grid of 0.1, up to 2, with which 20 to 25 % are so before the last checkpoint (the paper's rule).
        delta: how far from its last a memorised sample's loss may be (the paper's 0.05).
        permutations: of group labels and of checkpoints.
        draws: of samples, for the intervals of steps.
        max_length: most tokens of a row; None: what the model takes. Length changes routes: compare alike.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the model runs.
        dtype: of the model; None as stored.
        seed: of the choice of rows, permutations and draws.
        progress: called with (done, total, what).

    Metrics: see `METRICS`. Correlations are left out below 6 checkpoints since memorisation.
    Tables: `verdict` (one row), `steps` (step, distance, consistency, loss, held_out, gap …), `changes`
        (since memorisation, with paired intervals), `correlations` (with the held-out metric, with a lag, the
        paper's beside), `groups`, `layers` (by checkpoint), `samples` (when memorised, how far moved),
        `values` (by sample and checkpoint), `matrix` and `routes` (of some samples at three checkpoints).

    Raises:
        NotApplicableError: a dense model.
        InputError: a series of one, checkpoints with other experts, a parameter out of range, rows or a model
            that cannot be scored.
    """
    check(tau=tau, alphabet=alphabet, samples=samples, metric=metric, epsilon=epsilon, delta=delta,
          permutations=permutations, draws=draws)  # fmt: skip
    series = series_of(series)
    held = tasks(task, "task")
    given = held if train is None else tasks(train, "train")
    followed, groups, rows = some(given, samples, seed)
    plan = RecordingPlan(
        followed=followed, held=held, drop_first=drop_first, fold_gain=fold_gain, max_length=max_length,
        chat_template=chat_template, batch_tokens=batch_tokens, trust_remote_code=trust_remote_code,
        device=device, dtype=dtype,
    )  # fmt: skip
    measured = series.measured(
        "pathways", plan.identity(), plan.measure, progress, least=(2, "a comparison of pathways"),
        run_calls=checkpoint_runner(series, device),
    )  # fmt: skip
    if metric == "auto":
        metric = "loss" if all(each.shape == "text" for each in held.values()) else "accuracy"
    ask = PathwaySettings(
        weights=weights, tau=tau, alphabet=alphabet, metric=metric, epsilon=epsilon, delta=delta,
        permutations=permutations, draws=draws, seed=seed,
    )  # fmt: skip
    names, labels = np.unique(groups, return_inverse=True)
    whole = Samples(
        names=tuple(map(str, names)), groups=labels.astype(np.int64), rows=tuple(rows),
        trained=train is not None,
    )  # fmt: skip
    routed = np.flatnonzero(np.all([np.asarray(each["tokens"]) > 0 for each in measured], axis=0))
    if len(routed) < 2:
        raise InputError(f"{rows[0]}: {len(routed)} rows have a token whose route counts; give at least 2")
    order = routed[np.argsort(whole.groups[routed], kind="stable")]
    records = [Record.of(each).take(order) for each in measured]
    counted = {
        "truncated": int(max(int(each["truncated"]) for each in measured)),
        "unrouted": len(rows) - len(routed),
    }
    return concluded(
        series.steps, series.labels, records, whole.take(order), ask, counted=counted, progress=progress
    )


def concluded(
    steps: Sequence[float],
    labels: Sequence[str],
    records: Sequence[Record],
    samples: Samples,
    ask: PathwaySettings,
    *,
    counted: Mapping[str, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """What the records of a run say: the end of `grokking_pathways`, for models that it cannot load.

    Such as a module of one's own: `probes.experts.routes.capture_routes` reads its routes from named routers.

    Args:
        steps: rising, one for each record.
        labels: of the steps.
        records: of all samples at each step.
        samples: ordered by group.
        ask: how to read them.
        counted: rows that were cut or left out.

    Raises:
        InputError: as `grokking_pathways`, of the records.
    """
    comparable(labels, records)
    run = RoutingRun(steps, labels, records, samples, ask, progress=progress)
    made = tables(run)
    found = {**numbers(run, made), **{"truncated": 0, "unrouted": 0, **(counted or {})}}
    return Result(
        metrics=found, tables=made, notes=tuple(notes(run, made, found)), analysis="pathways",
        parameters=plain(asdict(ask)),
    )  # fmt: skip


def check(
    *,
    tau: float,
    alphabet: str,
    samples: int,
    metric: str,
    epsilon: float | None,
    delta: float,
    permutations: int,
    draws: int,
) -> None:
    """Refuse parameters out of range before anything is loaded.

    Raises:
        InputError: the message names the parameter.
    """
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
