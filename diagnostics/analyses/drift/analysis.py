"""Drift: how far representations moved between base and tuned, layer by layer.

A row's representation at a layer is the mean of the residual stream over its tokens. RSA and CKA are of how
the rows stand to each other: 1 when tuned is base turned and scaled, however far each row moved. Padding is
left out of the mean, and so is the first token, which Telly's script takes in.
Sources: RSA as in Telly (arXiv:2304.05216), without the diagonal that its script keeps; debiased CKA
(Kornblith et al., arXiv:1905.00414; Song et al. 2012); Procrustes (Ding et al., arXiv:2108.01661).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from diagnostics.analyses.drift.figures import ONSET, draw
from diagnostics.core.analysis import Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.evaluation.paired_texts import SIDES
from diagnostics.evaluation.tokenizers import differing, shared_tokenizer, without_bos
from diagnostics.execution.workers import RemoteModel, open_side
from diagnostics.numerics.kernel_alignment import hsic
from probes import CheckpointPair
from probes.errors import InputError
from probes.models.runnable import RunnablePair
from probes.text.batches import Batch, Example, batches
from probes.text.encode import encode, encoding_notes
from probes.text.rows import Task

if TYPE_CHECKING:
    from torch import Tensor

Points = Float[np.ndarray, "rows width"]

# Debiased CKA divides by n − 3; with fewer rows than this every similarity is mostly noise (ours).
LEAST = 4
FEW = 50
# Rows that differ by less than this share of their size differ by the round-off of float32 (ours).
ROUND_OFF = 1e-6
METRICS = {
    "onset_keep": "first layer at which the keep rows' RSA is below 0.95 (-1: before the first block)",
    "onset_task": "the same of the task rows",
    "lowest_rsa_keep": "lowest RSA of the keep rows at any layer; 1 is no change of geometry",
    "lowest_rsa_task": "the same of the task rows",
    "lower_half_rsa_keep": "lowest RSA of the keep rows in the lower half of the network",
    "lowest_cka_keep": "lowest debiased CKA of the keep rows",
    "lowest_cka_task": "the same of the task rows",
    "keep_below_task": "most by which the RSA of keep rows lies below that of task rows at one layer",
    "layers": "points of the residual stream compared: before the first block and after each",
    "rows_task": "task rows compared",
    "rows_keep": "keep rows compared",
}


def rsa(X: Points, Y: Points) -> float:
    """Correlation of the cosines between rows, over pairs of two rows; NaN where either has no spread.

    1: the rows stand to each other as before. 0: independent; with the diagonal of ones
    2,000 such rows of width 768 are at 0.43.
    """
    upper = np.triu_indices(len(X), k=1)
    cosines = [(unit(each) @ unit(each).T)[upper] for each in (X, Y)]
    a, b = (each - each.mean() for each in cosines)
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 1e-12 * len(a) else math.nan


def cka(X: Points, Y: Points) -> float:
    """Debiased linear CKA; 1 for equal geometry, 0 on average for independent data; NaN without spread."""
    if not (spread(X) and spread(Y)):
        return math.nan
    K, M = (centred(each) @ centred(each).T for each in (X, Y))
    norm = hsic(K, K) * hsic(M, M)
    return hsic(K, M) / math.sqrt(norm) if norm > 0 else math.nan


def procrustes(X: Points, Y: Points) -> float:
    """What a rotation, a scale and a shift cannot undo: 0 nothing, 1 everything; NaN without spread."""
    if not (spread(X) and spread(Y)):
        return math.nan
    X, Y = centred(X), centred(Y)
    # The singular values of XᵀY, from a product of the smaller of rows and width.
    R, S = (np.linalg.qr(each.T).R for each in (X, Y))
    common = float(np.linalg.svd(R @ S.T, compute_uv=False).sum())
    return max(0.0, 1 - common / float(np.linalg.norm(X) * np.linalg.norm(Y)))


def displacement(X: Points, Y: Points) -> float:
    """How far rows moved, as a share of base's norm: high with little for Procrustes, they were re-based."""
    size = float(np.linalg.norm(X))
    return float(np.linalg.norm(Y - X)) / size if size else math.nan


def unit(X: Points) -> Points:
    """Rows at length 1; a row of zeros stays."""
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    return X / np.where(lengths > 0, lengths, 1)


def centred(X: Points) -> Points:
    """Columns of mean 0."""
    return X - X.mean(axis=0)


def spread(X: Points) -> bool:
    """Whether rows differ by more than round-off."""
    return bool(np.linalg.norm(centred(X)) > ROUND_OFF * np.linalg.norm(X))


def class_shift(X: Points, Y: Points, classes: Sequence[Any]) -> float:
    """Mean distance that the centre of a class moved, over the spread within classes in base; NaN without."""
    kinds = sorted(set(classes), key=str)
    chosen = [np.array([each == kind for each in classes]) for kind in kinds]
    within = math.sqrt(sum(float((centred(X[rows]) ** 2).sum()) for rows in chosen) / len(X))
    moved = [float(np.linalg.norm(Y[rows].mean(axis=0) - X[rows].mean(axis=0))) for rows in chosen]
    return float(np.mean(moved)) / within if within else math.nan


def summary(result: Result) -> str:
    """The lowest similarity of each kind of rows and where their representations part."""
    m = result.metrics
    said = []
    for role in ("keep", "task"):
        if f"lowest_rsa_{role}" in m:
            onset = m.get(f"onset_{role}")
            where = f"nowhere below {ONSET}" if onset is None else f"first below {ONSET} at layer {onset}"
            said.append(f"{role} rows: RSA at least {m[f'lowest_rsa_{role}']:.3f}, {where}")
    return "; ".join(said) or "no rows have any spread to compare"


@analysis(
    "drift",
    question="At which layer do the representations of base and tuned part, and is it more than a rotation?",
    reading=(
        "RSA and CKA are 1 where rows stand to each other as in base, whatever was rotated or scaled. Last "
        "layers that drift on the task are usual (an encoder tuned on code search fell to 0.96, 0.80 and "
        "0.37 at layers 8, 10 and 12 of 12, by a script that keeps the diagonal); drift in the lower half, "
        "or more on keep rows than on task rows, is not. A large displacement with a small Procrustes "
        "residual is a rotation. It tells where to look, and fails nothing."
    ),
    paper="arXiv:2304.05216",
    cost="one forward pass of each model; memory for a vector a row and layer, and a matrix of rows by rows",
    draw=draw,
    summary=summary,
    metrics=METRICS,
)
def representation_drift(
    pair: CheckpointPair,
    task: Any,
    keep: Any = None,
    *,
    rows: int = 1000,
    skip: int = 1,
    max_length: int | None = None,
    chat_template: bool = False,
    batch_tokens: int = 16384,
    trust_remote_code: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Compare the residual stream of base and tuned on the same tokens.

    Both read what the tuned side's tokenizer makes of a row, its prompt and what follows it.

    Args:
        pair: base and tuned; language models or classifiers.
        task: rows of what was trained: a task, a file, texts, or several of these by name.
        keep: rows of what must survive.
        rows: most rows of a set that are compared, drawn at random (ours; Telly: all of its data).
        skip: tokens at the start of a row that are left out of its mean (ours; Telly: 0). Attention rests on
            the first; its vector is the same in every row and by far the longest, so that similarities of
            means that hold it are those of the rows' lengths.
        max_length: most tokens of a row; None: what both models take.
        chat_template: texts and prompts are a user's messages.
        batch_tokens: most tokens in a batch; changes no result.
        trust_remote_code: run code that a repository brings.
        device: where the models run.
        dtype: of the models; None as stored. Similarities are float64.
        seed: of the choice of rows.
        progress: called with (done, total, what).

    Metrics: see `METRICS`; of several sets of one role the lowest.
    Table `layers`: set, role, layer (-1: before the first block), rsa, cka, procrustes, displacement,
        class_shift (rows with labels), rows.

    Raises:
        InputError: tokenizers that differ, models of other depths or widths, fewer than 4 rows in a set, or
            residuals that are not finite.
    """
    import pandas as pd

    if rows < LEAST or skip < 0:
        raise InputError(f"rows is {rows} and skip {skip}; they are at least {LEAST} and 0")
    roles: dict[str, str] = {}
    sets: dict[str, Task] = {}
    for role, source in (("task", task), ("keep", keep)):
        for name, each in tasks(source, role).items() if source is not None else ():
            name = name if name not in sets else f"{role}:{name}"
            roles[name], sets[name] = role, each.at_least(LEAST, "drift")
    said: list[str] = []
    with RunnablePair(pair, device=device, dtype=dtype, trust_remote_code=trust_remote_code) as runnable:
        shared = shared_tokenizer(runnable.base_tokenizer, runnable.tokenizer)
        if shared is None:
            why = differing(runnable.base_tokenizer, runnable.tokenizer)
            raise InputError(f"{why}, so that representations are not of the same tokens")
        tokenizer, _, notice = shared
        said += [*notice, *([] if chat_template else without_bos(runnable.base_tokenizer, tokenizer))]
        length = min((n for n in (max_length, runnable.context) if n is not None), default=None)
        chosen = {}
        for name, each in sets.items():
            examples = encode(each, tokenizer, max_length=length, chat_template=chat_template)
            chosen[name], more = compared(each, examples, rows=rows, skip=skip, seed=seed)
            said += more
        flat = [one for examples in chosen.values() for one in examples]
        points = {}
        for turn, side in enumerate(SIDES):

            def tell(done: int, turn: int = turn, side: str = side) -> None:
                if progress:
                    progress(turn * len(flat) + done, 2 * len(flat), f"residuals of {side}")

            with open_side(runnable, side) as model:
                points[side], route = residuals(model, flat, batch_tokens, skip, tell)
            check_finite(points[side], chosen, sets, side)
            said.append(f"{side}: residuals captured through {route}")
    if list(points["base"]) != list(points["tuned"]):
        raise InputError(
            f"base has {len(points['base']) - 1} blocks and tuned {len(points['tuned']) - 1}: not in pairs"
        )
    table, start = [], 0
    for name, examples in chosen.items():
        part = slice(start, start + len(examples))
        start += len(examples)
        labels = [sets[name].rows[one.row].label for one in examples]
        classes = labels if sets[name].shape == "label" and len(set(labels)) > 1 else None
        table += [
            {
                "set": name,
                "role": roles[name],
                "layer": layer,
                **moved(X[part].astype(float), points["tuned"][layer][part].astype(float), classes),
            }
            for layer, X in points["base"].items()
        ]
        if len(examples) < FEW:
            said.append(f"{name}: {len(examples)} rows; with fewer than {FEW} the similarities are noisy")
    layers = pd.DataFrame(table)
    return Result(metrics=metrics_of(layers.to_dict("records")), tables={"layers": layers}, notes=tuple(said))


def compared(
    task: Task, examples: Sequence[Example], *, rows: int, skip: int, seed: int
) -> tuple[list[Example], list[str]]:
    """The rows of a task that are compared, of several choices with the first, and what to say of them.

    Raises:
        InputError: fewer than 4 are left.
    """
    firsts = {one.row: one for one in reversed(examples)}
    long = [row for row in sorted(firsts) if len(firsts[row].ids) > skip]
    if len(long) < LEAST:
        raise InputError(
            f"{task.ref}: {len(long)} rows have a token behind the first {skip}; drift needs at least {LEAST}"
        )
    said = list(encoding_notes(task, examples))
    if len(long) < len(firsts):
        said.append(f"{task.ref}: {len(firsts) - len(long)} rows have no token behind the first {skip}")
    return [firsts[row] for row in drawn(long, rows, seed)], said


def drawn(places: Sequence[int], count: int, seed: int) -> list[int]:
    """At most so many of the places, at random, in their order."""
    if len(places) <= count:
        return list(places)
    return sorted(np.random.default_rng(seed).choice(places, size=count, replace=False).tolist())


def residuals(
    model: Any, examples: Sequence[Example], tokens: int, skip: int, progress: Callable[[int], None]
) -> tuple[dict[int, Points], str]:
    """The pooled residual stream of every example before block 0 (-1) and after each block, and its route."""
    if not isinstance(model, RemoteModel):
        return captured(model, examples, tokens=tokens, skip=skip, progress=progress)
    found: dict[int, Any] = {}
    route = ""
    for own, (points, route) in model.run_batches(  # noqa: B007
        partial(captured, tokens=tokens, skip=skip), examples, tokens, progress
    ):
        for layer, values in points.items():
            found.setdefault(layer, np.empty((len(examples), values.shape[1]), np.float32))[own] = values
    return found, route


def captured(
    model: Any,
    examples: Sequence[Example],
    *,
    tokens: int,
    skip: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[int, Points], str]:
    """The same, of a model that is here."""
    from probes.passes.activations import capture, pooled

    def behind(name: str, value: "Tensor", batch: Batch) -> "Tensor":
        mask = batch.attention_mask.clone()
        mask[:, :skip] = 0  # padding is on the right
        return pooled(name, value, replace(batch, attention_mask=mask))

    found: dict[int, Any] = {}
    done = 0

    with capture(model, ["blocks.0.hook_resid_pre", "hook_resid_post"], keep=behind) as caught:
        for batch, made in caught.stream(batches(examples, tokens=tokens, pad_id=0)):
            for name, value in made.items():
                layer = -1 if name.endswith("pre") else int(name.split(".")[1])
                if layer not in found:
                    found[layer] = np.empty((len(examples), value.shape[1]), np.float32)
                found[layer][batch.indices.cpu().numpy()] = value.numpy()
            done += len(batch.indices)
            if progress:
                progress(done)
        route = caught.route if caught.reason is None else f"{caught.route} ({caught.reason})"
    return dict(sorted(found.items())), route


def check_finite(
    points: Mapping[int, Points],
    chosen: Mapping[str, Sequence[Example]],
    sets: Mapping[str, Task],
    side: str,
) -> None:
    """Refuse residuals that are NaN or infinite.

    Raises:
        InputError: some are; the message names the first such layer and its first row.
    """
    where = [sets[name].where(one.row) for name, examples in chosen.items() for one in examples]
    for layer, X in points.items():
        bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
        if len(bad):
            raise InputError(
                f"{where[bad[0]]} ({side}): the residuals at layer {layer} are NaN or infinite; half "
                "precision overflows at times: run it in float32 (--dtype float32)"
            )


def moved(X: Points, Y: Points, classes: Sequence[Any] | None) -> dict[str, float | int]:
    """Every measure at one layer."""
    if X.shape[1] != Y.shape[1]:
        raise InputError(f"base is {X.shape[1]} wide and tuned {Y.shape[1]}; are these of one architecture?")
    return {
        "rsa": rsa(X, Y),
        "cka": cka(X, Y),
        "procrustes": procrustes(X, Y),
        "displacement": displacement(X, Y),
        "class_shift": class_shift(X, Y, classes) if classes else math.nan,
        "rows": len(X),
    }


def metrics_of(layers: Sequence[Mapping[Any, Any]]) -> dict[str, float | int]:
    """The numbers that a policy may judge."""
    depths = sorted({row["layer"] for row in layers})
    metrics: dict[str, float | int] = {"layers": len(depths)}
    lowest: dict[str, dict[int, float]] = {}
    for role in ("task", "keep"):
        own = [row for row in layers if row["role"] == role]
        if not own:
            continue
        metrics[f"rows_{role}"] = sum(row["rows"] for row in own if row["layer"] == depths[0])
        by_layer = {
            layer: min(
                (row["rsa"] for row in own if row["layer"] == layer and not math.isnan(row["rsa"])),
                default=math.nan,
            )
            for layer in depths
        }
        lowest[role] = {layer: value for layer, value in by_layer.items() if not math.isnan(value)}
        similar = [row["cka"] for row in own if not math.isnan(row["cka"])]
        if similar:
            metrics[f"lowest_cka_{role}"] = min(similar)
        if lowest[role]:
            metrics[f"lowest_rsa_{role}"] = min(lowest[role].values())
            first = next((layer for layer, value in lowest[role].items() if value < ONSET), None)
            if first is not None:
                metrics[f"onset_{role}"] = first
    lower = [v for layer, v in lowest.get("keep", {}).items() if layer + 1 <= (depths[-1] + 1) / 2]
    if lower:
        metrics["lower_half_rsa_keep"] = min(lower)
    both = [lowest["task"][layer] - lowest["keep"][layer] for layer in depths
            if all(layer in lowest.get(role, {}) for role in ("task", "keep"))]  # fmt: skip
    if both:
        metrics["keep_below_task"] = max(both)
    return metrics
