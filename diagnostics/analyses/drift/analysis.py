"""Representation drift: how far representations moved between base and tuned, layer by layer.

A row's representation at a layer is the mean of the residual stream over its tokens, without padding and
without the first token, which Telly's script includes.
Sources: RSA as in Telly (arXiv:2304.05216), without the diagonal that its script keeps; debiased CKA
(Kornblith et al., arXiv:1905.00414; Song et al. 2012); Procrustes (Ding et al., arXiv:2108.01661).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.drift import similarity
from diagnostics.analyses.drift.figures import draw
from diagnostics.analyses.drift.similarity import ONSET, Points
from diagnostics.core.analysis import DeviceTest, NotApplicableError, Result, analysis
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.paired_texts import SIDES
from diagnostics.evaluation.sets import draw_items, load_named_sets
from diagnostics.evaluation.tokenizers import same_rules, split_rows, template_of
from diagnostics.execution.workers import RemoteModel, open_side
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.batches import Batch, Example, batches
from probes.text.encode import encode, encoding_notes
from probes.text.rows import Task

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# Debiased CKA divides by n − 3.
LEAST = 4
# With fewer rows than this every similarity is mostly noise (ours).
FEW = 50
METRICS = {
    "onset_keep": "first layer with an RSA of the keep rows below 0.95 (-1: before the first block)",
    "onset_task": "first layer with an RSA of the task rows below 0.95",
    "lowest_rsa_keep": "lowest RSA of the keep rows at any layer; 1 is no change of geometry",
    "lowest_rsa_task": "lowest RSA of the task rows at any layer",
    "lower_half_rsa_keep": "lowest RSA of the keep rows in the lower half of the network",
    "lowest_cka_keep": "lowest debiased CKA of the keep rows",
    "lowest_cka_task": "lowest debiased CKA of the task rows",
    "keep_below_task": "RSA of task rows minus that of keep rows, at the layer where this is largest",
    "layers": "points of the residual stream compared: before the first block and after each block",
    "rows_task": "task rows compared",
    "rows_keep": "keep rows compared",
}


def summary(result: Result) -> str:
    """The lowest RSA of each role and the layer of the onset."""
    m = result.metrics
    clauses = []
    for role in ("keep", "task"):
        if f"lowest_rsa_{role}" in m:
            onset = m.get(f"onset_{role}")
            where = f"nowhere below {ONSET}" if onset is None else f"first below {ONSET} at layer {onset}"
            clauses.append(f"{role} rows: RSA at least {m[f'lowest_rsa_{role}']:.3f}, {where}")
    return "; ".join(clauses) or "no rows have any spread to compare"


@analysis(
    "drift",
    question="At which layer do the representations of base and tuned part, and is it more than a rotation?",
    reading=(
        "RSA and CKA are 1 if the geometry of the rows is that of base, up to rotation and scale. Drift in "
        "the last layers on task rows is usual (an encoder tuned on code search fell to 0.96, 0.80 and 0.37 "
        "at layers 8, 10 and 12 of 12, measured with the diagonal). Drift in the lower half, or more on keep "
        "rows than on task rows, is not. A large displacement with a small Procrustes residual is a "
        "rotation. Drift shows where to look; it fails nothing."
    ),
    paper="arXiv:2304.05216",
    cost="one forward pass of each model; memory for one vector per row and layer, and a rows x rows matrix",
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"rows": 40},
        absolute={"lowest_rsa_keep": 1e-3, "lowest_cka_keep": 1e-3, "lowest_cka_task": 1e-3, "layers": 0},
    ),
)
def representation_drift(
    pair: CheckpointPair, task: Any, keep: Any = None, *, rows: int = 1000, skip: int = 1,
    options: RowOptions = RowOptions(), seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:  # fmt: skip
    """Compare the residual stream of base and tuned on the same tokens.

    Both models read a row, prompt and continuation, as the same tokens.

    Args:
        pair: base and tuned; language models or classifiers.
        task: rows of the tuned model's own distribution: a task, a file, texts, or several by name.
        keep: rows of what must survive.
        rows: most rows of a set, drawn at random (ours; Telly: all).
        skip: tokens at the start of a row to leave out of its mean (ours; Telly: 0). The first token is an
            attention sink: its vector is nearly the same in every row and by far the longest, so with it the
            means would mainly compare the rows' lengths.
        options: how rows are read and how models run on them.
        dtype: of the models; None as stored. Similarities are float64.
        seed: of the row draw.
        progress: called with (done, total, what).

    Metrics: listed with their meanings in the registration's `metrics`; of several sets of a role the lowest.

    Tables:
        `layers`: one row a set and layer: set, role, layer (-1: before the first block), rsa, cka (at most
            1), procrustes (0 to 1), displacement (share of base's norm), class_shift (in standard
            deviations within classes; NaN without labels), rows (count).

    Raises:
        NotApplicableError: the tokenizers of base and tuned split a row differently.
        InputError: models of different depths or widths, fewer than 4 rows in a set, or residuals that are
            not finite.

    Example:
        >>> from diagnostics.audit.demo import BUNDLED
        >>> pair = CheckpointPair(BUNDLED / "base", BUNDLED / "base")
        >>> result = representation_drift(pair, BUNDLED / "task.jsonl", rows=4)
        >>> round(result.metrics["lowest_rsa_task"], 6)
        1.0
    """
    import pandas as pd

    if rows < LEAST or skip < 0:
        raise InputError(f"rows is {rows} and skip {skip}; they are at least {LEAST} and 0")
    roles, sets = load_named_sets({"task": task, "keep": keep}, least=LEAST, purpose="drift")
    with RunnablePair(pair, **options.of_models) as runnable:
        # Before the tokenizers, which would be blamed for a malformed config.json.
        length = min((n for n in (options.max_length, runnable.context) if n is not None), default=None)
        base, tuned = runnable.base_tokenizer, runnable.tokenizer
        encoded = partial(encode, max_length=length, chat_template=options.chat_template)
        chosen: dict[str, list[Example]] = {}
        remarks: list[str] = []
        for name, named_task in sets.items():
            examples = encoded(named_task, tuned)
            if not same_rules(base, tuned):
                of_base = encoded(named_task, base, template=template_of(base, tuned))
                if differing := split_rows([(named_task, of_base, examples)], base, tuned):
                    raise NotApplicableError(f"{differing}, so representations are not of the same tokens")
            chosen[name], set_notes = compared(named_task, examples, rows=rows, skip=skip, seed=seed)
            remarks += set_notes
        flat = [example for examples in chosen.values() for example in examples]
        points = {}
        for turn, side in enumerate(SIDES):

            def tell(done: int, turn: int = turn, side: str = side) -> None:
                if progress:
                    progress(turn * len(flat) + done, 2 * len(flat), f"residuals of {side}")

            with open_side(runnable, side) as model:
                points[side], route = residuals(model, flat, options.batch_tokens, skip, tell)
            check_finite(points[side], chosen, sets, side)
            remarks.append(f"{side}: residuals captured through {route}")
    if list(points["base"]) != list(points["tuned"]):
        raise InputError(
            f"base has {len(points['base']) - 1} blocks and tuned {len(points['tuned']) - 1}; drift compares "
            "models of one depth"
        )
    table, start = [], 0
    for name, examples in chosen.items():
        part = slice(start, start + len(examples))
        start += len(examples)
        labels = [sets[name].rows[example.row].label for example in examples]
        classes = labels if sets[name].shape == "label" and len(set(labels)) > 1 else None
        for layer, X in points["base"].items():
            values = measures(X[part].astype(float), points["tuned"][layer][part].astype(float), classes)
            table.append({"set": name, "role": roles[name], "layer": layer, **values})
        if len(examples) < FEW:
            remarks.append(f"{name}: {len(examples)} rows; with fewer than {FEW} the similarities are noisy")
    layers = pd.DataFrame(table)
    return Result(metrics=metrics_of(layers), tables={"layers": layers}, notes=tuple(remarks))


def compared(
    task: Task, examples: Sequence[Example], *, rows: int, skip: int, seed: int
) -> tuple[list[Example], list[str]]:
    """The examples of a task that are compared, and notes; a row with choices is read with its first."""
    firsts = {example.row: example for example in reversed(examples)}
    long = [row for row in sorted(firsts) if len(firsts[row].ids) > skip]
    if len(long) < LEAST:
        raise InputError(
            f"{task.ref}: {len(long)} rows have a token behind the first {skip}; drift needs at least {LEAST}"
        )
    remarks = list(encoding_notes(task, examples))
    if len(long) < len(firsts):
        remarks.append(f"{task.ref}: {len(firsts) - len(long)} rows have no token behind the first {skip}")
    return [firsts[row] for row in draw_items(long, rows, seed)], remarks


def residuals(
    model: Any, examples: Sequence[Example], tokens: int, skip: int, progress: Callable[[int], None]
) -> tuple[dict[int, Points], str]:
    """The pooled residual stream of every example before block 0 (-1) and after each block, and its route."""
    if not isinstance(model, RemoteModel):
        return _local_residuals(model, examples, tokens=tokens, skip=skip, progress=progress)
    points: dict[int, Any] = {}
    route = ""
    for indices, (batch_points, route) in model.run_batches(  # noqa: B007
        partial(_local_residuals, tokens=tokens, skip=skip), examples, tokens, progress
    ):
        for layer, values in batch_points.items():
            points.setdefault(layer, np.empty((len(examples), values.shape[1]), np.float32))[indices] = values
    return points, route


def _local_residuals(
    model: Any, examples: Sequence[Example], *, tokens: int, skip: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[int, Points], str]:  # fmt: skip
    """`residuals` of a model in this process."""
    from probes.passes.activations import capture, pooled

    def mean_behind_skip(name: str, value: "Tensor", batch: Batch) -> "Tensor":
        mask = batch.attention_mask.clone()
        mask[:, :skip] = 0  # padding is on the right
        return pooled(name, value, replace(batch, attention_mask=mask))

    points: dict[int, Any] = {}
    done = 0
    with capture(model, ["blocks.0.hook_resid_pre", "hook_resid_post"], keep=mean_behind_skip) as caught:
        for batch, activations in caught.stream(batches(examples, tokens=tokens, pad_id=0)):
            for name, value in activations.items():
                layer = -1 if name.endswith("pre") else int(name.split(".")[1])
                if layer not in points:
                    points[layer] = np.empty((len(examples), value.shape[1]), np.float32)
                points[layer][batch.indices.cpu().numpy()] = value.numpy()
            done += len(batch.indices)
            if progress:
                progress(done)
        route = caught.route if caught.reason is None else f"{caught.route} ({caught.reason})"
    return dict(sorted(points.items())), route


def check_finite(
    points: Mapping[int, Points], chosen: Mapping[str, Sequence[Example]], sets: Mapping[str, Task], side: str
) -> None:
    """Refuse residuals that are NaN or infinite."""
    where = [sets[name].where(example.row) for name, examples in chosen.items() for example in examples]
    for layer, X in points.items():
        bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
        if len(bad):
            raise InputError(
                f"{where[bad[0]]} ({side}): the residuals at layer {layer} are NaN or infinite. Half "
                "precision may overflow: try float32 (--dtype float32)"
            )


def measures(X: Points, Y: Points, classes: Sequence[Any] | None) -> dict[str, float | int]:
    """Every measure at one layer."""
    if X.shape[1] != Y.shape[1]:
        raise InputError(f"base is {X.shape[1]} wide and tuned {Y.shape[1]}; are these of one architecture?")
    names = ("rsa", "cka", "procrustes", "displacement")
    values = {name: getattr(similarity, name)(X, Y) for name in names}
    shift = similarity.class_shift(X, Y, classes) if classes else math.nan
    return {**values, "class_shift": shift, "rows": len(X)}


def metrics_of(layers: "pd.DataFrame") -> dict[str, float | int]:
    """The metrics of the layers of all sets."""
    lowest = layers.groupby(["layer", "role"])["rsa"].min().unstack().reindex(columns=["task", "keep"])
    depths = lowest.index
    lower_half = depths + 1 <= (depths.max() + 1) / 2
    metrics: dict[str, Any] = {
        "layers": len(depths),
        "lower_half_rsa_keep": lowest.loc[lower_half, "keep"].min(),
        "keep_below_task": (lowest["task"] - lowest["keep"]).max(),
    }
    for role, rows in layers.groupby("role"):
        metrics[f"rows_{role}"] = rows.loc[rows["layer"] == depths[0], "rows"].sum()
        metrics[f"lowest_cka_{role}"], metrics[f"lowest_rsa_{role}"] = rows["cka"].min(), rows["rsa"].min()
        metrics[f"onset_{role}"] = depths[lowest[role] < ONSET].min()
    return {name: np.asarray(value).item() for name, value in metrics.items() if not math.isnan(value)}
