"""Measuring every example in batches, in order, with errors that name the row and the layer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from probes.errors import InputError
from probes.models.body import blocks, evaluating, full_pass
from probes.progress import Progress
from probes.text.batches import Batch, Example, PaddingSide, batches, halving


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
    measure: Callable[[Batch], dict[str, Any]],
    *,
    pad_id: int = 0,
    tokens: int = 16384,
    side: PaddingSide = "right",
    progress: Progress | None = None,
    where: Callable[[int], str] = "row index {}".format,
    what: str = "scored",
) -> dict[str, Any]:
    """The measurements of each example, in order; NaN or None for examples without tokens.

    Batches hold examples of similar length and are halved when memory runs out.

    Args:
        measure: returns tensors or lists with an entry for each row of a batch.
        pad_id, tokens, side: of the batches.
        progress: called with (examples done, all, `what`).
        where: from the index of a task's row to its name in errors, as `Task.where`.
    """
    parts = batches(examples, tokens=tokens, pad_id=pad_id, side=side)
    results: dict[str, Any] = {}
    done = 0
    try:
        for batch, measured in halving(measure, parts):
            for name, values in measured.items():
                if isinstance(values, list):
                    by_example = results.setdefault(name, [None] * len(examples))
                    for index, value in zip(batch.indices.tolist(), values, strict=True):
                        by_example[index] = value
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


def require_finite(model: nn.Module, batch: Batch, finite: Tensor, rows: Tensor | None = None) -> None:
    """Raise NonFiniteError for the first row that is not finite; `finite` is of all, or of `rows`."""
    if not finite.all():
        first = int((~finite).nonzero()[0, 0])
        raise non_finite_error(model, batch, first if rows is None else int(rows[first]))


def non_finite_error(model: nn.Module, batch: Batch, row: int) -> NonFiniteError:
    """The error for a row of a batch, with the first layer whose output is not finite."""
    example = int(batch.indices[row])
    alone = Batch(**{name: value[row : row + 1] for name, value in vars(batch).items()})
    finite: list[bool] = []
    mask = alone.attention_mask.bool()

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        finite.append(bool(hidden[mask.to(hidden.device)].isfinite().all()))

    with ExitStack() as stack:
        try:
            for block in blocks(model):
                stack.callback(block.register_forward_hook(look).remove)
        except ValueError:
            return NonFiniteError(example, None, f"example {example}")
        with evaluating(model), torch.no_grad():
            full_pass(model, alone)
    layer = None if all(finite) else finite.index(False)
    return NonFiniteError(example, layer, f"example {example}")
