"""What `dynamics` measures on one checkpoint, as flat arrays that outlive it.

Each measure is taken by itself: where one is not defined for a model, `{measure}.missing` says why, and the
others stand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from diagnostics.analyses.dynamics.softmax_collapse import summed
from diagnostics.evaluation.checkpoint_scores import ScoringOptions, Which, identity, scores
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
    """What is measured, and on which rows.

    Attributes:
        sets: rows that are scored, and whose logits are looked at.
        batch: the training batch of the gradient; None without rows of the training.
        rows: rows of the kernel and of local complexity.
        loss_dtype: of the softmax in the training's loss.
        outputs: random projections of the logits, by which whole functions are compared.
        kernel: whether the tangent kernel is computed.
        radius, vertices: of local complexity.
    """

    sets: Mapping[Which, Task]
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
        """What a measurement depends on beside the checkpoint, as JSON keeps it."""
        return self.reading.key(self.sets) | {
            "batch": None if self.batch is None else identity(self.batch),
            "probes": identity(self.rows),
            "loss_dtype": self.loss_dtype,
            "outputs": self.outputs,
            "kernel": self.kernel,
            "radius": self.radius,
            "vertices": self.vertices,
            "seed": self.seed,
        }

    def measure(self, checkpoint: Checkpoint) -> Arrays:
        """All that is measured on one checkpoint, which is left as it is."""
        editable = self.reading.open(checkpoint)
        found = scores(editable, self.sets, self.reading)
        for place, task in enumerate(self.sets.values()):
            found |= _tried(f"logits.{place}", partial(self._logits, editable, task))
        if self.batch is not None:
            found |= _tried("alignment", partial(self._alignment, editable))
        found |= _tried("outputs", partial(self._outputs, editable))
        if self.kernel:
            found |= _tried("kernel", partial(self._kernel, editable))
        return found | _tried("complexity", partial(self._complexity, editable))

    def gap(self, base: Editable, checkpoint: Checkpoint) -> Arrays:
        """J Δθ of the first checkpoint towards another, at the rows and outputs of `outputs`."""
        return _tried("expansion", partial(self._expansion, base, checkpoint))

    def _logits(self, editable: Editable, task: Task) -> Arrays:
        encoded = self.reading.encode(editable, task)
        parts = label_logits(editable.model, encoded, tokens=self.reading.batch_tokens)
        made = summed(((part.logits, part.targets) for part in parts), getattr(torch, self.loss_dtype))
        return {name: np.array(value) for name, value in vars(made).items()}

    def _alignment(self, editable: Editable) -> Arrays:
        assert self.batch is not None
        model = editable.model
        objective = Objective(self.reading.encode(editable, self.batch), tokens=self.reading.batch_tokens)
        with trainable(model):
            objective.backward(model)
            return alignment(model)

    def _probed(self, editable: Editable) -> tuple[Any, list[int], torch.Tensor]:
        """The probe rows encoded, those with a label, and the random projections."""
        encoded = self.reading.encode(editable, self.rows)
        head = unwrapped(editable.model).get_output_embeddings()
        classes = len(editable.labels) if editable.kind == "classifier" else head.weight.shape[0]
        rows = list(dict.fromkeys(whole.row for whole in label_units(encoded)))
        if not rows:
            raise InputError(f"{self.rows.ref}: none of the probe rows has a label")
        return encoded, rows, projection(self.outputs, classes, self.seed)

    def _outputs(self, editable: Editable) -> Arrays:
        encoded, rows, directions = self._probed(editable)
        with torch.no_grad():
            made = [row_outputs(editable.model, encoded, row, directions).cpu().numpy() for row in rows]
        return {"values": np.stack(made), "rows": np.array(rows)}

    def _kernel(self, editable: Editable) -> Arrays:
        encoded, rows, directions = self._probed(editable)
        return {"values": tangent_kernel(editable.model, encoded, rows, directions[0]).numpy()}

    def _expansion(self, base: Editable, checkpoint: Checkpoint) -> Arrays:
        other = self.reading.open(checkpoint)
        own, theirs = (dict(each.model.named_parameters()) for each in (base, other))
        if {name: each.shape for name, each in own.items()} != {
            name: each.shape for name, each in theirs.items()
        }:
            raise InputError(f"{checkpoint.ref}: its weights are not those of {base.checkpoint.ref} in shape")
        # In place of the other's weights, so that no third copy is held.
        delta = {
            name: each.detach().sub_(own[name].detach())
            for name, each in theirs.items()
            if each.is_floating_point()
        }
        encoded, rows, directions = self._probed(base)
        return {"values": first_order(base.model, encoded, rows, directions, delta).numpy()}

    def _complexity(self, editable: Editable) -> Arrays:
        encoded = self.reading.encode(editable, self.rows)
        shown = {index for whole in label_units(encoded) for index, _ in whole.sequences}
        made = local_complexity(
            editable.model,
            [encoded.examples[index] for index in sorted(shown)],
            radius=self.radius,
            vertices=self.vertices,
            seed=self.seed,
            tokens=self.reading.batch_tokens,
        )
        return {
            "layer": np.array(list(made.share)),
            "share": np.array(list(made.share.values())),
            "units": np.array(list(made.units.values())),
            "radius": np.array(made.radius),
            "vertices": np.array(made.vertices),
            "routed": np.array(switches(editable.model)[1], dtype=int),
        }


def alignment(model: nn.Module) -> Arrays:
    """Of each matrix: −∇L · W, ‖∇L‖² and ‖W‖², from the gradients that the model holds.

    A matrix that body and head share is there once, its gradient is that of both uses.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    named = dict(inner.named_parameters())
    places = located(named, inner.config.to_dict())
    rows = []
    for name, weight in named.items():
        if name not in places or weight.grad is None:
            continue
        layer, component, is_head = places[name]
        W, G = weight.detach().double().flatten(), weight.grad.detach().double().flatten()
        unembedding = weight is head.weight if head is not None else is_head
        rows.append((name, layer, component, unembedding, float(-(G @ W)), float(G @ G), float(W @ W)))
    if not rows:
        raise InputError(f"{type(inner).__name__}: none of its matrices has a gradient")
    names, layers, components, heads, *sums = zip(*rows, strict=True)
    return {
        "name": np.array(names),
        "layer": np.array([np.nan if layer is None else layer for layer in layers], float),
        "component": np.array(components),
        "unembedding": np.array(heads, bool),
        **{key: np.array(each) for key, each in zip(("product", "gradient", "weight"), sums, strict=True)},
    }


def located(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[int | None, str, bool]]:
    """Layer and component of each matrix by its tensor, and whether it is a head; fused ones as one."""
    headers = {name: Header(name, tuple(each.shape), each.dtype) for name, each in tensors.items()}
    found: dict[str, tuple[int | None, list[str], bool]] = {}
    weights = {name: header for name, header in headers.items() if is_weight(header)}
    for matrix in matrices(weights, config, untied=list(weights)).values():
        _, components, _ = found.setdefault(matrix.tensor, (matrix.layer, [], matrix.part == "head"))
        if matrix.component not in components:
            components.append(matrix.component)
    return {name: (layer, "+".join(several), head) for name, (layer, several, head) in found.items()}


def _tried(name: str, measure: Callable[[], Arrays]) -> Arrays:
    """A measure under its name; where it is not defined, why."""
    try:
        found = measure()
    except InputError as error:
        return {f"{name}.missing": np.array(str(error))}
    return {f"{name}.{key}": value for key, value in found.items()}
