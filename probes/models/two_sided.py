"""One running model with entries of base or of tuned.

Evaluation under a mask needs no second copy of the model: entries are zeroed, or set to the other side's
values, in place. Values are selected, never computed, so that they are restored bit for bit.

Where the configurations of the two give other functions, the weights of base in a model of tuned's are not
base. Each side is then a model of its own, and only one is in memory.
"""

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from probes.checkpoints.blend import Blender
from probes.checkpoints.pair import CheckpointPair, Side
from probes.checkpoints.prune import Cut, Order
from probes.errors import InputError, UnknownNameError
from probes.files.layout import Header
from probes.models.config_changes import differing, function_changes
from probes.models.editable import Editable
from probes.models.loading import kind_of
from probes.models.runnable import common_context
from probes.models.vocabulary import BaseVocabulary

# Integers as wide as a float.
CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TwoSidedModel:
    """A pair as one running model, under the names of tuned's file; a context manager that ends as tuned.

    A model in memory is copied, never written to. A tensor with several names is one tensor, under the name
    in the checkpoint.

    Args:
        device, dtype: of the model; by default the dtype that holds both sides exactly.
        trust_remote_code: run code that a repository brings.
        apart: take configurations that give other functions too, each side as a model of its own. `headers`
            are then those tensors alone that both models have in one shape.

    Attributes:
        editable: the model with its tokenizer, kind, context and labels.
        side: the checkpoint that it is at rest.
        vocabulary: cuts the logits of base, also when pruned, to base's vocabulary.
        changes: the fields of the configurations that give other functions.

    Raises:
        InputError: tuned does not run, or its adapter cannot be merged; the configurations give other
            functions, and the sides are not taken apart.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        apart: bool = False,
    ):
        self.changes = function_changes(pair.base, pair.tuned)
        if self.changes and not apart:
            raise InputError(f"{differing(self.changes)}, so base does not run in a model of tuned's")
        if dtype is None and pair.base.dtype != pair.tuned.dtype:
            dtype = torch.promote_types(getattr(torch, pair.base.dtype), getattr(torch, pair.tuned.dtype))
        self.pair = pair
        self._options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        self._blender = Blender(pair)
        self.editable: Editable
        self._open("tuned")

    def _open(self, side: Side) -> None:
        """Load a side; the model that it replaces is freed before."""
        if self.__dict__.pop("editable", None) is not None:
            gc.collect()
        self.editable = Editable(getattr(self.pair, side), **self._options)
        self.editable.context = common_context(self.pair, self.editable.loading)
        if side == "base":
            if self.editable.kind != kind_of(self.pair.tuned):
                kinds = f"is a {self.editable.kind} model, tuned is {kind_of(self.pair.tuned)}"
                raise InputError(
                    f"{self.pair.base.ref}: {kinds}, and {differing(self.changes)}: base cannot run as what "
                    "tuned is"
                )
            self.editable = self.editable.named_as(self.pair.tuned)
        self.side: Side = side
        self._changed: set[str] = set()
        self._retrained = False
        self.vocabulary = BaseVocabulary(self.pair, self.editable.model)

    def __enter__(self) -> "TwoSidedModel":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.changes:
            self.become("tuned")

    @property
    def model(self) -> Any:
        """The torch model, in evaluation mode."""
        return self.editable.model

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Every floating tensor of tuned that the model has."""
        headers, held = self.pair.tuned.headers, self.editable.held
        if self.changes:
            resized = {self.pair.counterpart(name).tensor for name in self.pair.resized}
            has_base = self._blender.has_base
            held = frozenset(n for n in held if n not in resized and has_base(n, headers[n].shape))
        return {name: headers[name] for name in headers if name in held}

    @cached_property
    def in_both(self) -> frozenset[str]:
        """The tensors of which base has entries too; the others are tuned's on either side."""
        has_base = self._blender.has_base
        return frozenset(name for name, header in self.headers.items() if has_base(name, header.shape))

    @property
    def only_tuned(self) -> tuple[str, ...]:
        """The tensors that base lacks, in the order of the file."""
        return tuple(name for name in self.headers if name not in self.in_both)

    def read(self, name: str, side: Side = "tuned") -> Shaped[Tensor, "..."]:
        """A tensor as in a side's file, on the CPU, not to be written to.

        An adapter's merged weights are rounded once, to the dtype of its base's file; tensors that base lacks
        are tuned's. Raises UnknownNameError if the model has no such tensor.
        """
        if name not in self.headers:
            raise UnknownNameError(f"{self.pair.tuned.ref}: has no tensor {name!r} that the model runs with")
        stored = self.pair.tuned.tensor(name).to(self.headers[name].dtype)
        if side == "tuned":
            return stored
        base = self._blender.base_of(name, stored)
        return stored if base is None else base

    def settled(self, name: str) -> Shaped[Tensor, "..."]:
        """A tensor of tuned with base's value in each entry that only a dtype rounded."""
        return self._blender.settled(name, self.read(name))

    def become(self, side: Side) -> None:
        """Set every tensor to a side's."""
        if side != self.side and self.changes:
            self._open(side)
        elif side != self.side:
            self._changed = self._changed | self.in_both
            self.side = side
        self.restore()

    def changed(self, names: Collection[str] | None = None) -> None:
        """Note that tensors, by default all, were changed by other means, such as training."""
        self._retrained = self._retrained or (names is None and bool(self.changes))
        self._changed.update(self.headers if names is None else names)
        self.vocabulary.cut = False

    def restore(self, names: Collection[str] | None = None) -> None:
        """Restore changed tensors, by default all, to those of the present side."""
        if self._retrained and names is None:  # among them some that only this side has
            self._open(self.side)
        for name in sorted(self._changed if names is None else self._changed.intersection(names)):
            self.editable.write(name, self.read(name, self.side))
            self._changed.discard(name)
        if not self._changed:
            self.vocabulary.cut = self.side == "base"

    def prune(self, order: Order, cut: Cut, *, rising: bool = False) -> None:
        """Set the entries that a cut prunes to zero.

        Args:
            rising: the order is of magnitudes and only lower cuts of it were applied: the running weights
                then serve as keys, and no file is read.
        """
        for name in order.shapes:
            keys = self._live(name) if rising and not cut.divides_ties(name) else None
            if keys is None:
                # Entries that a lower cut pruned count with their original magnitude.
                keys = self.read(name, self.side) if rising else order.read(name)
            self.zero(name, cut.pruned(name, keys))

    def _live(self, name: str) -> Tensor | None:
        """The running tensor, if it is stored in one piece and in a dtype at least as wide; else None."""
        (slot, *more) = self.editable.slots(name)
        if more or not isinstance(slot.which, slice):
            return None
        dtype, tensor = self._blender.dtypes.get(name, self.headers[name].dtype), slot.tensor.detach()
        return tensor if torch.promote_types(dtype, tensor.dtype) == tensor.dtype else None

    def zero(self, name: str, where: Bool[Tensor, "..."]) -> None:
        """Set entries of a tensor to zero, by a mask in the stored shape."""
        self._changed.add(name)
        for slot in self.editable.slots(name):
            tensor = slot.tensor.detach()
            if isinstance(slot.which, slice):
                # Bit patterns times 0 or 1: several times as fast as filling, and exact for other entries.
                tensor.view(CODES[tensor.itemsize]).mul_(~where.to(tensor.device))
            else:
                selected = where.reshape(-1)[slot.which].to(slot.indices.device)
                tensor.view(-1)[slot.indices[selected]] = 0

    def write(self, name: str, index: Int[Tensor, " entries"], values: Shaped[Tensor, " entries"]) -> None:
        """Write values, as in a side's file, into entries of a tensor at flat indices."""
        self.changed([name])
        for slot in self.editable.slots(name, index):
            slot.tensor.detach().view(-1)[slot.indices] = values[slot.which].to(slot.tensor)

    @contextmanager
    def selecting(self, index: Mapping[str, Int[Tensor, " entries"]], side: Side) -> Iterator[Any]:
        """Inside, the entries at some flat indices have a side's values."""
        try:
            for name, entries in index.items():
                self.write(name, entries, self.read(name, side).reshape(-1)[entries])
            yield self.model
        finally:
            self.restore(index.keys())
