"""What was measured over a run's checkpoints as tables: a row a step, a row a matrix, a row a layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.evaluation.checkpoint_scores import Curves
from diagnostics.numerics import kernel_alignment
from diagnostics.numerics.weight_distances import squared
from probes.checkpoints.checkpoint import Checkpoint
from probes.text.rows import Task

Arrays = Mapping[str, np.ndarray]

# Outputs that differ by less than this share of their size differ by the round-off of float32.
ROUND_OFF = 1e-6
LOGITS = ("logit_scale", "margin", "collapsed", "collapsed_right")


def of_logits(measurements: Sequence[Arrays], found: Sequence[Curves], role: str) -> list[dict[str, float]]:
    """Of each checkpoint what the logits of a role's sets say together, a label counting as one."""
    places = [place for place, one in enumerate(found) if one.which[0] == role]
    rows = []
    for at, one in enumerate(measurements):
        parts = [{n: one.get(f"logits.{place}.{n}", np.nan) for n in ("labels", *_NAMES)} for place in places]
        labels = np.array([part["labels"] for part in parts], float)
        row = {
            f"loss_{role}": _mean(found, places, "loss", at),
            f"metric_{role}": _mean(found, places, "metric", at),
        }
        for name, column in _NAMES.items():
            values = np.array([part[name] for part in parts], float)
            row[f"{column}_{role}"] = float((values * labels).sum() / labels.sum()) if places else math.nan
        rows.append(row)
    return rows


_NAMES = dict(zip(("scale", "margin", "collapsed", "collapsed_right"), LOGITS, strict=True))


def _mean(found: Sequence[Curves], places: Sequence[int], curve: str, at: int) -> float:
    """Mean of a curve over sets, at one checkpoint."""
    return float(np.mean([getattr(found[place], curve)[at] for place in places]))


def of_alignment(one: Arrays) -> dict[str, float]:
    """The cosine of minus the gradient with the weights: of all matrices as one, and of the unembedding."""
    if "alignment.name" not in one:
        return {"nlm_cosine": math.nan, "nlm_unembedding": math.nan}
    product, gradient, weight = (one[f"alignment.{name}"] for name in ("product", "gradient", "weight"))
    heads = one["alignment.unembedding"].astype(bool)
    return {
        "nlm_cosine": cosine(product.sum(), gradient.sum(), weight.sum()),
        "nlm_unembedding": cosine(product[heads].sum(), gradient[heads].sum(), weight[heads].sum()),
    }


def cosine(product: float, first: float, second: float) -> float:
    """From a product and two squared lengths; NaN where one is 0."""
    size = math.sqrt(first) * math.sqrt(second)
    return float(product / size) if size > 0 else math.nan


def of_kernel(one: Arrays, first: Arrays, rows: Task) -> dict[str, float]:
    """The tangent kernel against the first checkpoint's and against the labels."""
    names = ("kernel_cka", "kernel_cka_debiased", "kernel_alignment")
    if "kernel.values" not in one or "kernel.values" not in first or "outputs.rows" not in one:
        return dict.fromkeys(names, math.nan)
    K, M = one["kernel.values"], first["kernel.values"]
    if K.shape != M.shape:
        return dict.fromkeys(names, math.nan)
    labels = labels_of(rows, one["outputs.rows"].tolist())
    aligned = kernel_alignment.alignment(K, labels) if labels else math.nan
    return dict(
        zip(names, (kernel_alignment.cka(K, M), kernel_alignment.debiased_cka(K, M), aligned), strict=True)
    )


def labels_of(task: Task, rows: Sequence[int]) -> list[Any]:
    """What rows are to be told apart by: labels, or completions that several rows share; [] where nothing."""
    if task.shape == "label":
        found: list[Any] = [task.rows[row].label for row in rows]
    elif task.shape == "completion":
        found = [task.rows[row].completion for row in rows]
    elif task.shape == "choices":
        found = [(task.rows[row].choices or ("",))[task.rows[row].answer or 0] for row in rows]
    else:
        return []
    return found if 2 <= len(set(found)) <= len(found) / 2 else []


def linearity_gap(one: Arrays, first: Arrays, expansion: Arrays) -> float:
    """ρ = ‖f − f₀ − J₀ Δθ‖ / ‖f − f₀‖; 0 where the change is the linear one, NaN where nothing changed."""
    if "expansion.values" not in expansion or "outputs.values" not in one or "outputs.values" not in first:
        return math.nan
    f, f0, moved = one["outputs.values"], first["outputs.values"], expansion["expansion.values"]
    if f.shape != f0.shape:
        return math.nan
    change = float(np.linalg.norm(f - f0))
    if change <= ROUND_OFF * float(np.linalg.norm(f0)):
        return math.nan
    return float(np.linalg.norm(f - f0 - moved)) / change


def of_complexity(one: Arrays) -> dict[str, float]:
    """Units crossed at a token, summed over the layers."""
    if "complexity.share" not in one:
        return {"local_complexity": math.nan, "radius": math.nan}
    crossed = float(one["complexity.share"] @ one["complexity.units"])
    return {"local_complexity": crossed, "radius": float(one["complexity.radius"])}


def movement(first: Checkpoint, other: Checkpoint, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Squared distance of each tensor from the first checkpoint's, and its squared length there."""
    moved, sizes = [], []
    for name in names:
        start = first.tensor(name)
        same = first.source.location(name) == other.source.location(name)
        moved.append(0.0 if same else squared(start, other.tensor(name)))
        sizes.append(squared(start, start.new_zeros(()).expand(start.shape)))
    return {"name": np.array(names), "moved": np.array(moved), "size": np.array(sizes)}


def tensor_rows(
    labels: Sequence[tuple[float, str]],
    measurements: Sequence[Arrays],
    moves: Sequence[Arrays],
    places: Mapping[str, tuple[int | None, str, bool]],
) -> list[dict[str, Any]]:
    """Every matrix at every checkpoint: the cosine of its gradient, and how far it moved.

    Args:
        places: layer and component of the tensors of the files.
    """
    rows = []
    for at, (step, label) in enumerate(labels):
        found: dict[str, dict[str, Any]] = {}
        one = measurements[at]
        for index, name in enumerate(one.get("alignment.name", ())):
            product, gradient, weight = (
                float(one[f"alignment.{key}"][index]) for key in ("product", "gradient", "weight")
            )
            found[str(name)] = {
                "layer": float(one["alignment.layer"][index]),
                "component": str(one["alignment.component"][index]),
                "unembedding": bool(one["alignment.unembedding"][index]),
                "nlm_cosine": cosine(product, gradient, weight),
            }
        moved = moves[at] if moves else {}
        for index, name in enumerate(moved.get("name", ())):
            if str(name) not in places:
                continue
            layer, component, head = places[str(name)]
            start = {
                "layer": math.nan if layer is None else float(layer),
                "component": component,
                "unembedding": head,
                "nlm_cosine": math.nan,
            }
            row = found.setdefault(str(name), start)
            size = float(moved["size"][index])
            row["movement"] = math.sqrt(float(moved["moved"][index]) / size) if size > 0 else math.nan
        rows += [
            {"step": step, "label": label, "tensor": name, "movement": math.nan, **row}
            for name, row in found.items()
        ]
    return rows


def layer_rows(labels: Sequence[tuple[float, str]], measurements: Sequence[Arrays]) -> list[dict[str, Any]]:
    """Local complexity of every layer at every checkpoint: units crossed at a token, and their share."""
    return [
        {
            "step": step,
            "label": label,
            "layer": int(layer),
            "local_complexity": float(share * units),
            "share": float(share),
            "units": int(units),
        }
        for (step, label), one in zip(labels, measurements, strict=True)
        for layer, share, units in zip(
            one.get("complexity.layer", ()),
            one.get("complexity.share", ()),
            one.get("complexity.units", ()),
            strict=True,
        )
    ]
