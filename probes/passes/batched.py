"""Measuring every example in batches, in order, with errors that name the row and the layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from probes.errors import InputError
from probes.models.body import blocks, evaluating, inputs, unwrapped, with_padding_id
from probes.progress import Progress
from probes.text.batches import Batch, Example, halving


class NonFiniteError(InputError):
    """Logits that are NaN or infinite.

    Attributes:
        example: index of the example, as in `Batch.indices`.
        layer: the first block whose output is not finite, from 0; None if all are, or none can be seen.
        name: of the example, for messages.
    """

    def __init__(self, example: int, layer: int | None, name: str):
        super().__init__(example, layer, name)  # as they are, so that it can be pickled
        self.example, self.layer, self.name = example, layer, name

    def __str__(self) -> str:
        first = "the head is to blame" if self.layer is None else f"first at layer {self.layer}"
        return (
            f"{self.name}: its logits are NaN or infinite ({first}); half precision overflows at times: run "
            "it in float32 (--dtype float32)"
        )


def measure_examples(
    examples: Sequence[Example],
    parts: Iterable[Batch],
    measure: Callable[[Batch], dict[str, Any]],
    progress: Progress | None = None,
    where: Callable[[int], str] = "row index {}".format,
    what: str = "scored",
) -> dict[str, Any]:
    """The measurements of each example, in order; NaN or None for examples in no batch.

    Args:
        measure: returns tensors or lists with an entry for each row of a batch.
        progress: called with (examples done, all, `what`).
        where: from the index of a task's row to its name in errors, as `Task.where`.
    """
    results: dict[str, Any] = {}
    done = 0
    try:
        for batch, measured in halving(measure, parts):
            for name, values in measured.items():
                if isinstance(values, list):
                    kept = results.setdefault(name, [None] * len(examples))
                    for index, value in zip(batch.indices.tolist(), values, strict=True):
                        kept[index] = value
                    continue
                if name not in results:
                    empty = torch.nan if values.is_floating_point() else 0
                    results[name] = torch.full((len(examples), *values.shape[1:]), empty, dtype=values.dtype)
                results[name][batch.indices.cpu()] = values
            done += len(batch.indices)
            if progress:
                progress(done, len(examples), what)
    except NonFiniteError as error:
        name = where(examples[error.example].row)
        raise NonFiniteError(error.example, error.layer, name) from error
    return results


def non_finite_error(model: nn.Module, batch: Batch, row: int) -> NonFiniteError:
    """The error for a row of a batch, with the first layer whose output is not finite."""
    example = int(batch.indices[row])
    alone = Batch(**{name: value[row : row + 1] for name, value in vars(batch).items()})
    finite: list[bool] = []
    mask = alone.attention_mask.bool()

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        finite.append(bool(hidden[mask.to(hidden.device)].isfinite().all()))

    try:
        handles = [block.register_forward_hook(look) for block in blocks(model)]
    except ValueError:
        return NonFiniteError(example, None, f"example {example}")
    try:
        inner = unwrapped(model)
        arguments = inputs(inner, alone)
        with evaluating(model), with_padding_id(inner, arguments), torch.no_grad():
            inner(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    layer = None if all(finite) else finite.index(False)
    return NonFiniteError(example, layer, f"example {example}")
