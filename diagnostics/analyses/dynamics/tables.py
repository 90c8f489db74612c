"""Tables of `dynamics`: by step, by matrix and by layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.evaluation.checkpoint_scores import Curves
from diagnostics.numerics import kernel_alignment
from diagnostics.numerics.weight_distances import SharedWeights, squared
from probes.text.rows import Task

Arrays = Mapping[str, np.ndarray]

# Relative difference of outputs below which it is float32 round-off.
ROUND_OFF = 1e-6
# Statistics of logits, and the columns with them.
LOGITS = {
    "scale": "logit_scale", "margin": "margin", "collapsed": "collapsed",
    "collapsed_right": "collapsed_right",
}  # fmt: skip


def logit_columns(
    measurements: Sequence[Arrays], sets: Sequence[Curves], role: str
) -> list[dict[str, float]]:
    """Loss, metric and logit statistics of a role's sets at each checkpoint, averaged over labels."""
    numbers = [number for number, curves in enumerate(sets) if curves.which[0] == role]
    rows = []
    for at, arrays in enumerate(measurements):
        parts = {
            name: np.array([arrays.get(f"logits.{number}.{name}", np.nan) for number in numbers], float)
            for name in ("labels", *LOGITS)
        }
        row = {
            f"{curve}_{role}": float(np.mean([getattr(sets[number], curve)[at] for number in numbers]))
            for curve in ("loss", "metric")
        }
        for name, column in LOGITS.items():
            row[f"{column}_{role}"] = float((parts[name] * parts["labels"]).sum() / parts["labels"].sum())
        rows.append(row)
    return rows


def alignment_columns(arrays: Arrays) -> dict[str, float]:
    """Cosine of minus the gradient with the weights, of all matrices as one vector and of the unembedding."""
    if "alignment.name" not in arrays:
        return {"nlm_cosine": math.nan, "nlm_unembedding": math.nan}
    product, gradient, weight = (arrays[f"alignment.{name}"] for name in ("product", "gradient", "weight"))
    heads = arrays["alignment.unembedding"].astype(bool)
    return {
        "nlm_cosine": cosine(product.sum(), gradient.sum(), weight.sum()),
        "nlm_unembedding": cosine(product[heads].sum(), gradient[heads].sum(), weight[heads].sum()),
    }


def cosine(product: float, first: float, second: float) -> float:
    """From an inner product and two squared lengths; NaN where one is 0."""
    size = math.sqrt(first) * math.sqrt(second)
    return float(product / size) if size > 0 else math.nan


def kernel_columns(arrays: Arrays, first: Arrays, rows: Task) -> dict[str, float]:
    """Alignment of the tangent kernel with the first checkpoint's, and with the labels."""
    K, M = arrays.get("kernel.values"), first.get("kernel.values")
    if K is None or M is None or "outputs.rows" not in arrays or K.shape != M.shape:
        return dict.fromkeys(("kernel_cka", "kernel_cka_debiased", "kernel_alignment"), math.nan)
    labels = labels_of(rows, arrays["outputs.rows"].tolist())
    return {
        "kernel_cka": kernel_alignment.cka(K, M),
        "kernel_cka_debiased": kernel_alignment.debiased_cka(K, M),
        "kernel_alignment": kernel_alignment.alignment(K, labels) if labels else math.nan,
    }


def labels_of(task: Task, rows: Sequence[int]) -> list[Any]:
    """Labels of rows, or completions shared by several rows; [] where rows have neither."""
    if task.shape == "label":
        labels: list[Any] = [task.rows[row].label for row in rows]
    elif task.shape == "completion":
        labels = [task.rows[row].completion for row in rows]
    elif task.shape == "choices":
        labels = [(task.rows[row].choices or ("",))[task.rows[row].answer or 0] for row in rows]
    else:
        return []
    return labels if 2 <= len(set(labels)) <= len(labels) / 2 else []


def linearity_gap(arrays: Arrays, first: Arrays, expansion: Arrays) -> float:
    """ρ = ‖f − f₀ − J₀ Δθ‖ / ‖f − f₀‖; 0 where the change is linear in Δθ, NaN where nothing changed."""
    f, f0 = arrays.get("outputs.values"), first.get("outputs.values")
    linear = expansion.get("expansion.values")
    if f is None or f0 is None or linear is None or f.shape != f0.shape:
        return math.nan
    change = float(np.linalg.norm(f - f0))
    if change <= ROUND_OFF * float(np.linalg.norm(f0)):
        return math.nan
    return float(np.linalg.norm(f - f0 - linear)) / change


def complexity_columns(arrays: Arrays) -> dict[str, float]:
    """Local complexity: switched units per token, summed over the layers."""
    if "complexity.share" not in arrays:
        return {"local_complexity": math.nan, "radius": math.nan}
    switched = float(arrays["complexity.share"] @ arrays["complexity.units"])
    return {"local_complexity": switched, "radius": float(arrays["complexity.radius"])}


def movement(common: SharedWeights, index: int) -> dict[str, np.ndarray]:
    """Squared distance of each tensor from the first checkpoint's, and the squared length of that."""
    moved, sizes = [], []
    for name in common.names:
        start = common.read(0, name)
        moved.append(common.squared(0, index, name, start))
        sizes.append(squared(start, start.new_zeros(()).expand(start.shape)))
    return {"name": np.array(common.names), "moved": np.array(moved), "size": np.array(sizes)}


def relative(moved: float, size: float) -> float:
    """‖θ − θ₀‖ / ‖θ₀‖ from squares; NaN where θ₀ is 0."""
    return math.sqrt(moved / size) if size > 0 else math.nan


def tensor_rows(
    labels: Sequence[tuple[float, str]], measurements: Sequence[Arrays], moves: Sequence[Arrays],
    positions: Mapping[str, tuple[int | None, str, bool]],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a matrix and checkpoint: cosine of its gradient, and its movement; `positions` as `locate`."""
    rows = []
    for at, (step, label) in enumerate(labels):
        by_tensor: dict[str, dict[str, Any]] = {}
        arrays = measurements[at]
        for index, name in enumerate(arrays.get("alignment.name", ())):
            sums = (float(arrays[f"alignment.{key}"][index]) for key in ("product", "gradient", "weight"))
            by_tensor[str(name)] = {
                "layer": float(arrays["alignment.layer"][index]),
                "component": str(arrays["alignment.component"][index]),
                "unembedding": bool(arrays["alignment.unembedding"][index]), "nlm_cosine": cosine(*sums),
            }  # fmt: skip
        moved = moves[at] if moves else {}
        for index, name in enumerate(moved.get("name", ())):
            if str(name) not in positions:
                continue
            layer, component, head = positions[str(name)]
            without_gradient = {
                "layer": math.nan if layer is None else float(layer), "component": component,
                "unembedding": head, "nlm_cosine": math.nan,
            }  # fmt: skip
            row = by_tensor.setdefault(str(name), without_gradient)
            row["movement"] = relative(moved["moved"][index], moved["size"][index])
        rows += [
            {"step": step, "label": label, "tensor": name, "movement": math.nan, **row}
            for name, row in by_tensor.items()
        ]
    return rows


def layer_rows(labels: Sequence[tuple[float, str]], measurements: Sequence[Arrays]) -> list[dict[str, Any]]:
    """One row a layer and checkpoint: switched units per token, and their share."""
    columns = [f"complexity.{name}" for name in ("layer", "share", "units")]
    return [
        {
            "step": step, "label": label, "layer": int(layer), "local_complexity": float(share * units),
            "share": float(share), "units": int(units),
        }
        for (step, label), arrays in zip(labels, measurements, strict=True)
        for layer, share, units in zip(*(arrays.get(name, ()) for name in columns), strict=True)
    ]  # fmt: skip
