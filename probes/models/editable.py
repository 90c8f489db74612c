"""A checkpoint as a running model with replaceable weights, under the names of its file.

New weights are rounded once, to the file's dtype, so that the model computes what the file would if they were
written to it. An adapter is merged first.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from probes.checkpoints.alignment import align_checkpoints, shared_tensors, used_tensors
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.in_memory import Reverted
from probes.checkpoints.opening import open_checkpoint
from probes.errors import InputError
from probes.files.reparametrised import REMEDY, Resolved
from probes.models.loading import Loading, device_of, dtype_of, kind_of, memory_of, tokenizer_of


class Slot(NamedTuple):
    """Entries of one stored tensor inside one tensor of a running model.

    Attributes:
        indices: flat, into the model's tensor; unused where `which` is all.
        which: which of the requested entries these are; `slice(None)` for all, in order.
    """

    tensor: Tensor
    indices: Int[Tensor, " entries"]
    which: Int[Tensor, " entries"] | slice


class Editable:
    """A running model of its own: a model in memory is copied, never written to.

    Attributes:
        checkpoint: the weights of the model outside of `holding`.
        kind, context, labels: as of `Runnable`.
        model: in evaluation mode; an adapter is merged into it.

    Raises:
        InputError: it does not run, or its adapter cannot be merged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
    ):
        self.checkpoint = checkpoint
        self.loading = Loading(device_of(device), dtype_of(dtype), None, trust_remote_code)
        runnable = self.loading.model(checkpoint, kind_of(checkpoint), merged=True)
        self.kind, self.context, self.labels = runnable.kind, runnable.context, runnable.labels
        in_memory = checkpoint.base is None and memory_of(checkpoint) is not None
        model = copy.deepcopy(runnable.model) if in_memory else runnable.model
        self.model: Any = model.eval().requires_grad_(False)
        self._state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        self._view = open_checkpoint(self.model)
        if isinstance(getattr(self._view.source, "state", self._view.source), Resolved):
            raise InputError(
                f"{checkpoint.ref}: has reparametrised weights, which cannot be edited; {REMEDY}"
            )
        self._headers = checkpoint.headers
        self._names = shared_tensors(self._view, checkpoint, align_checkpoints(self._view, checkpoint))
        self._refuse_unreached()
        # PEFT would round at every step: as its file would be, an adapter is rounded once.
        if checkpoint.base is not None:
            for name in checkpoint.headers:
                self._put(name, checkpoint.tensor(name))

    def _refuse_unreached(self) -> None:
        """Raise if the model holds weights of the file in a form that edits would miss."""
        used = set(self._names.values())
        parameters = {id(parameter) for parameter in self.model.parameters()}
        unused = [name for name in self._view.headers if name not in used]
        unreached = [name for name in unused if id(self._tensors.get(name)) in parameters]
        spare = [name for name in used_tensors(self.checkpoint) if name not in self._names]
        if unreached and spare:
            raise InputError(
                f"{self.checkpoint.ref}: {unreached[0]} of the running model is not found in the file, which "
                f"has {spare[0]}; load it with transformers and save it again (`save_pretrained`)"
            )

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer; raises InputError if there is none."""
        return tokenizer_of(self.checkpoint, trust_remote_code=self.loading.trust_remote_code)

    @contextmanager
    def holding(self, names: Iterable[str], change: Callable[[str, Tensor], Tensor]) -> Iterator[Any]:
        """The model with stored tensors as `change(name, value)`, which must not write to the value."""
        written: list[str] = []
        try:
            for name in names:
                stored = self.checkpoint.tensor(name)
                value = change(name, stored)
                if value is not stored:
                    written.append(name)
                    self._put(name, value)
            yield self.model
        finally:
            # Read again, so that no second copy of the weights is held.
            for name in written:
                self._put(name, self.checkpoint.tensor(name))

    def _put(self, name: str, value: Tensor) -> None:
        """Write a tensor of the file into the model, rounded as the file would hold it."""
        self.write(name, value.to(self.checkpoint.headers[name].dtype))

    @cached_property
    def held(self) -> frozenset[str]:
        """The floating tensors of the checkpoint that the model uses."""
        return frozenset(name for name in self._names if self._headers[name].dtype.is_floating_point)

    def named_as(self, other: Checkpoint) -> "Editable":
        """The same running model, its tensors under the names of another checkpoint of the architecture.

        Only `held`, `write` and `slots` are; tensors of another shape have no name.
        """
        named = copy.copy(self)
        named.__dict__.pop("held", None)
        running, headers = self._view.headers, other.headers
        names = shared_tensors(self._view, other, align_checkpoints(self._view, other))
        named._headers = headers
        named._names = {
            name: held for name, held in names.items() if headers[name].shape == running[held].shape
        }
        return named

    def write(self, name: str, value: Tensor) -> None:
        """Write a tensor of the checkpoint into the model, in the model's dtype; skip one that it lacks."""
        if name not in self.held:
            return
        assert value.shape == self._view.headers[self._names[name]].shape, name
        flat = value.reshape(-1)
        for slot in self.slots(name):
            if isinstance(slot.which, slice):
                slot.tensor.detach().copy_(value)
            else:
                slot.tensor.detach().view(-1)[slot.indices] = flat[slot.which].to(slot.tensor)

    def slots(self, name: str, index: Int[Tensor, " entries"] | None = None) -> list[Slot]:
        """Where entries of a tensor of `held` live in the running model; all, or those at flat indices."""
        running, source = self._names[name], self._view.source
        if not isinstance(source, Reverted) or running not in source.sources:
            tensor = self._tensors[running]
            flat = torch.arange(0) if index is None else index.to(tensor.device)
            return [Slot(tensor, flat, slice(None))]
        # transformers keeps it in another form: each entry has a place of its own.
        parts, positions = source.positions(running)
        order = positions.flatten() if index is None else positions.flatten()[index]
        start, slots = 0, []
        for part in parts:
            tensor = self._tensors[part]
            which = ((order >= start) & (order < start + tensor.numel())).nonzero()[:, 0]
            if len(which):
                slots.append(Slot(tensor, (order[which] - start).to(tensor.device), which))
            start += tensor.numel()
        return slots

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """The model's parameters and buffers by the names of its state dict, tied ones the same object."""
        tensors = (*self.model.buffers(), *self.model.parameters())
        by_address = {tensor.data_ptr(): tensor for tensor in tensors}
        return {name: by_address.get(tensor.data_ptr(), tensor) for name, tensor in self._state.items()}
