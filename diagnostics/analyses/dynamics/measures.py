"""Measurements of `dynamics` on one checkpoint, as flat arrays to be stored.

Each measure is independent. Where one is not defined for a model, `{measure}.missing` holds the reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from diagnostics.analyses.dynamics.softmax_collapse import summarise
from diagnostics.evaluation.checkpoint_scores import ScoringOptions, identity, scores
from diagnostics.evaluation.sets import SetKey
from probes.checkpoints.checkpoint import Checkpoint
from probes.errors import InputError
from probes.files.layout import Header
from probes.models.body import unwrapped
from probes.models.editable import Editable
from probes.naming.matrices import is_weight, matrices
from probes.passes.label_logits import label_logits, label_units, row_outputs
from probes.passes.local_complexity import local_complexity, switches
from probes.passes.objective import Objective
from probes.passes.tangent_kernel import first_order, projection, tangent_kernel, trainable
from probes.text.rows import Task

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DynamicsProbes:
    """The measures of `training_dynamics`, with its parameters and their rows.

    Attributes:
        sets: rows to be scored, with statistics of their logits.
        batch: the training batch of the gradient; None without train rows.
        rows: probe rows of outputs, kernel and local complexity.
    """

    sets: Mapping[SetKey, Task]
    batch: Task | None
    rows: Task
    reading: ScoringOptions
    loss_dtype: str
    outputs: int
    kernel: bool
    radius: float
    vertices: int
    seed: int

    def key(self) -> dict[str, Any]:
        """All that a measurement depends on besides the checkpoint, as JSON."""
        return self.reading.key(self.sets) | {
            "batch": None if self.batch is None else identity(self.batch), "probes": identity(self.rows),
            "loss_dtype": self.loss_dtype, "outputs": self.outputs, "kernel": self.kernel,
            "radius": self.radius, "vertices": self.vertices, "seed": self.seed,
        }  # fmt: skip

    def measure(self, checkpoint: Checkpoint) -> Arrays:
        """All measures on one checkpoint, which is left unchanged."""
        editable = self.reading.open(checkpoint)
        arrays = scores(editable, self.sets, self.reading)
        for number, task in enumerate(self.sets.values()):
            arrays |= _or_missing(f"logits.{number}", partial(self._logits, editable, task))
        if self.batch is not None:
            arrays |= _or_missing("alignment", partial(self._alignment, editable))
        arrays |= _or_missing("outputs", partial(self._outputs, editable))
        if self.kernel:
            arrays |= _or_missing("kernel", partial(self._kernel, editable))
        return arrays | _or_missing("complexity", partial(self._complexity, editable))

    def gap(self, base: Editable, checkpoint: Checkpoint) -> Arrays:
        """J Δθ from the first checkpoint towards another, at the rows and projections of `outputs`."""
        return _or_missing("expansion", partial(self._expansion, base, checkpoint))

    def _logits(self, editable: Editable, task: Task) -> Arrays:
        encoded = self.reading.encode(editable, task)
        parts = label_logits(editable.model, encoded, tokens=self.reading.batch_tokens)
        pairs = ((part.logits, part.targets) for part in parts)
        summary = summarise(pairs, getattr(torch, self.loss_dtype))
        return {name: np.array(value) for name, value in vars(summary).items()}

    def _alignment(self, editable: Editable) -> Arrays:
        assert self.batch is not None
        model = editable.model
        objective = Objective(self.reading.encode(editable, self.batch), tokens=self.reading.batch_tokens)
        with trainable(model):
            objective.backward(model)
            return alignment(model)

    def _probed(self, editable: Editable) -> tuple[Any, list[int], torch.Tensor]:
        """The encoded probe rows, the indices of those with a label, and the random projections."""
        encoded = self.reading.encode(editable, self.rows)
        head = unwrapped(editable.model).get_output_embeddings()
        classes = len(editable.labels) if editable.kind == "classifier" else head.weight.shape[0]
        rows = list(dict.fromkeys(unit.row for unit in label_units(encoded)))
        if not rows:
            raise InputError(f"{self.rows.ref}: no probe row has a label")
        return encoded, rows, projection(self.outputs, classes, self.seed)

    def _outputs(self, editable: Editable) -> Arrays:
        encoded, rows, directions = self._probed(editable)
        with torch.no_grad():
            outputs = [row_outputs(editable.model, encoded, row, directions).cpu().numpy() for row in rows]
        return {"values": np.stack(outputs), "rows": np.array(rows)}

    def _kernel(self, editable: Editable) -> Arrays:
        encoded, rows, directions = self._probed(editable)
        return {"values": tangent_kernel(editable.model, encoded, rows, directions[0]).numpy()}

    def _expansion(self, base: Editable, checkpoint: Checkpoint) -> Arrays:
        other = self.reading.open(checkpoint)
        first, later = (dict(editable.model.named_parameters()) for editable in (base, other))
        if {name: p.shape for name, p in first.items()} != {name: p.shape for name, p in later.items()}:
            raise InputError(
                f"{checkpoint.ref}: its weights differ in shape from those of {base.checkpoint.ref}"
            )
        # In place, so that no third copy is held.
        delta = {
            name: p.detach().sub_(first[name].detach()) for name, p in later.items() if p.is_floating_point()
        }
        encoded, rows, directions = self._probed(base)
        return {"values": first_order(base.model, encoded, rows, directions, delta).numpy()}

    def _complexity(self, editable: Editable) -> Arrays:
        encoded = self.reading.encode(editable, self.rows)
        scored = {index for unit in label_units(encoded) for index, _ in unit.sequences}
        complexity = local_complexity(
            editable.model, [encoded.examples[index] for index in sorted(scored)], radius=self.radius,
            vertices=self.vertices, seed=self.seed, tokens=self.reading.batch_tokens,
        )  # fmt: skip
        return {
            "layer": np.array(list(complexity.share)), "share": np.array(list(complexity.share.values())),
            "units": np.array(list(complexity.units.values())), "radius": np.array(complexity.radius),
            "vertices": np.array(complexity.vertices),
            "routed": np.array(switches(editable.model)[1], dtype=int),
        }  # fmt: skip


def alignment(model: nn.Module) -> Arrays:
    """For each matrix −∇L · W, ‖∇L‖² and ‖W‖², from the gradients in the model.

    A tied matrix counts once, with the gradient of both uses.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    named = dict(inner.named_parameters())
    positions = locate(named, inner.config.to_dict())
    rows = []
    for name, weight in named.items():
        if name not in positions or weight.grad is None:
            continue
        layer, component, is_head = positions[name]
        W, G = weight.detach().double().flatten(), weight.grad.detach().double().flatten()
        unembedding = weight is head.weight if head is not None else is_head
        rows.append((name, layer, component, unembedding, float(-(G @ W)), float(G @ G), float(W @ W)))
    if not rows:
        raise InputError(f"{type(inner).__name__}: none of its matrices has a gradient")
    columns = ("name", "layer", "component", "unembedding", "product", "gradient", "weight")
    arrays = {name: np.array(values) for name, values in zip(columns, zip(*rows, strict=True), strict=True)}
    return arrays | {"layer": arrays["layer"].astype(float)}  # NaN outside the blocks


def locate(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[int | None, str, bool]]:
    """Layer, component and whether it is a head, for each matrix by tensor; a fused tensor counts as one."""
    headers = {name: Header(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    positions: dict[str, tuple[int | None, list[str], bool]] = {}
    weights = {name: header for name, header in headers.items() if is_weight(header)}
    for matrix in matrices(weights, config, untied=list(weights)).values():
        _, components, _ = positions.setdefault(matrix.tensor, (matrix.layer, [], matrix.part == "head"))
        if matrix.component not in components:
            components.append(matrix.component)
    return {name: (layer, "+".join(parts), head) for name, (layer, parts, head) in positions.items()}


def _or_missing(name: str, measure: Callable[[], Arrays]) -> Arrays:
    """The arrays of a measure under its name, or why it is not defined."""
    try:
        arrays = measure()
    except InputError as error:
        return {f"{name}.missing": np.array(str(error))}
    return {f"{name}.{key}": value for key, value in arrays.items()}
