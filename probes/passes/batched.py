"""Measuring every example in batches, in order, with errors that name the row and the layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from probes.errors import InputError
from probes.models.body import blocks, evaluating, inputs, padding_known, unwrapped
from probes.text.batches import Batch, Example, halving


class NonFiniteError(InputError):
    """Logits that are NaN or infinite.

    Attributes:
        example: index of the example, as in `Batch.indices`.
        layer: the first block whose output is not finite, from 0; None if all are, or none can be seen.
        name: what the example is called.
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


def gathered(
    examples: Sequence[Example],
    parts: Iterable[Batch],
    measure: Callable[[Batch], dict[str, Any]],
    progress: Callable[[int, int, str], None] | None = None,
    where: Callable[[int], str] = "row index {}".format,
    what: str = "scored",
) -> dict[str, Any]:
    """What is measured of each example, in the order of the examples; NaN or None for those in no batch.

    Args:
        measure: gives tensors or lists with an entry for each row of a batch.
        progress: called with examples done, of how many, and `what`.
        where: from the index of a task's row to what an error calls it: `Task.where`.
    """
    found: dict[str, Any] = {}
    done = 0
    try:
        for batch, measured in halving(measure, parts):
            for name, values in measured.items():
                if isinstance(values, list):
                    kept = found.setdefault(name, [None] * len(examples))
                    for index, value in zip(batch.indices.tolist(), values, strict=True):
                        kept[index] = value
                    continue
                if name not in found:
                    empty = torch.nan if values.is_floating_point() else 0
                    found[name] = torch.full((len(examples), *values.shape[1:]), empty, dtype=values.dtype)
                found[name][batch.indices.cpu()] = values
            done += len(batch.indices)
            if progress:
                progress(done, len(examples), what)
    except NonFiniteError as error:
        name = where(examples[error.example].row)
        raise NonFiniteError(error.example, error.layer, name) from error
    return found


def not_finite(model: nn.Module, batch: Batch, row: int) -> NonFiniteError:
    """The error for a row of a batch, with the first layer that is to blame."""
    example = int(batch.indices[row])
    alone = Batch(**{name: value[row : row + 1] for name, value in vars(batch).items()})
    finite: list[bool] = []
    mask = alone.attention_mask.bool()

    def look(module: nn.Module, given: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        finite.append(bool(hidden[mask.to(hidden.device)].isfinite().all()))

    try:
        handles = [block.register_forward_hook(look) for block in blocks(model)]
    except ValueError:
        return NonFiniteError(example, None, f"example {example}")
    try:
        inner = unwrapped(model)
        given = inputs(inner, alone)
        with evaluating(model), padding_known(inner, given), torch.no_grad():
            inner(**given)
    finally:
        for handle in handles:
            handle.remove()
    layer = None if all(finite) else finite.index(False)
    return NonFiniteError(example, layer, f"example {example}")
