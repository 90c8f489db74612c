"""Candidate entries of a graft inside a running model: their mask is written into it, their gradients read
out.

Only the entries that moved furthest are candidates. Base lies in memory, tuned's values are written where the
mask says so, and the gradient of a weight is kept at its candidates alone and freed at once, so that a search
takes one model, its activations, its largest gradient and some numbers a candidate.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from diagnostics.analyses.skills import region
from diagnostics.analyses.skills.movement import Read, delta
from diagnostics.analyses.skills.region import Region
from probes.errors import InputError
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective

# Hard, or with values in [0, 1].
Mask: TypeAlias = Bool[Tensor, " candidates"] | Float[Tensor, " candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Entries with both of their values. As one vector they go by the tensor's name, then by place.

    Attributes:
        index: of each tensor flat indices, rising; 32 bits wide where that is enough.
        base, tuned: their values as the files have them.
    """

    index: Region
    base: Mapping[str, Shaped[Tensor, " _"]]
    tuned: Mapping[str, Shaped[Tensor, " _"]]

    @classmethod
    def of(cls, chosen: Region, read: Read) -> "Candidates":
        """Entries with their values."""
        index, base, tuned = {}, {}, {}
        for name in sorted(chosen):
            index[name] = chosen[name]
            base[name], tuned[name] = (side.reshape(-1)[chosen[name].long()] for side in read(name))
        return cls(index=index, base=base, tuned=tuned)

    def __len__(self) -> int:
        return region.size(self.index)

    @property
    def spans(self) -> Iterator[tuple[str, slice]]:
        """Each tensor with where its entries stand in the vector."""
        start = 0
        for name, entries in self.index.items():
            yield name, slice(start, start + len(entries))
            start += len(entries)

    def region(self, mask: Bool[Tensor, " candidates"]) -> Region:
        """The entries at which a mask is true."""
        chosen = {name: self.index[name][mask[span]] for name, span in self.spans}
        return {name: index for name, index in chosen.items() if len(index)}

    def movement(self, places: Int[Tensor, " _"] | None = None) -> Float[Tensor, " _"]:
        """How far each moved, or those at some places of the vector, which rise."""
        found = []
        for name, span in self.spans:
            base, tuned = self.base[name], self.tuned[name]
            if places is not None:
                first, last = torch.searchsorted(places, torch.tensor([span.start, span.stop])).tolist()
                here = places[first:last] - span.start
                base, tuned = base[here], tuned[here]
            found.append(delta(base, tuned).abs_())
        return torch.cat(found) if found else torch.empty(0)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        held = [*self.index.values(), *self.base.values(), *self.tuned.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class GraftedModel:
    """A pair in memory, base but for candidates at a mask; gives the gradient of the loss to that mask.

    A context manager: the model is base again at its end, and no weight requires a gradient that did not.
    """

    def __init__(self, host: TwoSidedModel, candidates: Candidates):
        """Take a host that is base.

        Raises:
            InputError: a candidate lies in a tensor that the model does not differentiate.
        """
        assert host.side == "base"
        self.host, self.candidates = host, candidates
        self._spans = dict(candidates.spans)
        self._mask: Tensor | None = None  # what is written, while it is hard
        sides = (*candidates.base.values(), *candidates.tuned.values())
        self._dtype = torch.float64 if any(each.dtype == torch.float64 for each in sides) else torch.float32

    def __enter__(self) -> "GraftedModel":
        return self

    def __exit__(self, *error: object) -> None:
        self._mask = None
        self.host.restore(self.candidates.index.keys())

    def put(self, mask: Mask) -> None:
        """Write base + mask ⊙ (tuned − base) at the candidates: a hard mask by selection, a soft one not."""
        hard, present = mask.dtype == torch.bool, self._mask
        for name, span in self._spans.items():
            values, index = mask[span], self.candidates.index[name]
            base, tuned = self.candidates.base[name], self.candidates.tuned[name]
            if hard and present is not None:
                new = (present[span] != values).nonzero()[:, 0]
                if not len(new):
                    continue
                values, index, base, tuned = (each[new] for each in (values, index, base, tuned))
            if hard:
                wide = torch.promote_types(base.dtype, tuned.dtype)
                chosen = torch.where(values, tuned.to(wide), base.to(wide))
            else:
                D = delta(base, tuned)
                chosen = base.to(D.dtype) + values.to(D.dtype) * D
            self.host.write(name, index.long(), chosen)
        self._mask = mask.clone() if hard else None

    def gradient(
        self, mask: Mask, objective: Objective, rows: list[int] | None = None
    ) -> Float[Tensor, " candidates"]:
        """dL/dm of every candidate, at a mask of them.

        Raises:
            InputError: gradients that are NaN or infinite, or as `Objective.backward` says.
        """
        self.put(mask)
        found = torch.zeros(len(self.candidates), dtype=self._dtype)
        parts = {name: found[span] for name, span in self._spans.items()}
        with collecting(self.host, self.candidates.index, parts):
            objective.backward(self.host.model, rows)
        for name, part in parts.items():
            part *= delta(self.candidates.base[name], self.candidates.tuned[name])
        return finite(found, self.host)

    def elsewhere(
        self,
        others: Region,
        read: Read,
        mask: Mask,
        objective: Objective,
        rows: list[int] | None = None,
    ) -> Float[Tensor, " others"]:
        """dL/dm of entries that are no candidates, at a mask of the candidates."""
        self.put(mask)
        parts = {name: torch.zeros(len(entries)) for name, entries in others.items()}
        with collecting(self.host, others, parts):
            objective.backward(self.host.model, rows)
        slopes = [
            part * delta(*(side.reshape(-1)[others[name].long()] for side in read(name)))
            for name, part in parts.items()
        ]
        return finite(torch.cat(slopes) if slopes else torch.empty(0), self.host)


@contextmanager
def collecting(
    host: TwoSidedModel, index: Mapping[str, Int[Tensor, " _"]], found: Mapping[str, Float[Tensor, " _"]]
) -> Iterator[None]:
    """Adds the gradients of weights to `found`, at some entries of each tensor alone, and frees them at once.

    Raises:
        InputError: an entry lies in a tensor that the model does not differentiate.
    """
    # The parameters that hold each tensor: several, where the model keeps it in another form.
    holders: dict[nn.Parameter, list[str]] = {}
    for name, entries in index.items():
        for slot in host.editable.slots(name, entries.long()):
            if not isinstance(slot.tensor, nn.Parameter):
                raise InputError(f"{host.pair.tuned.ref}: {name} is no parameter of the running model")
            holders.setdefault(slot.tensor, []).append(name)

    def collect(parameter: Any) -> None:
        gradient = parameter.grad.reshape(-1)
        for name in holders[parameter]:
            for slot in host.editable.slots(name, index[name].long()):
                if slot.tensor is parameter:
                    found[name][slot.which] += gradient[slot.indices].to("cpu", found[name].dtype)
        parameter.grad = None

    required = {parameter: parameter.requires_grad for parameter in holders}
    handles = []
    try:
        for parameter in holders:
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(collect))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)
            parameter.grad = None


def finite(gradient: Float[Tensor, " _"], host: TwoSidedModel) -> Float[Tensor, " _"]:
    """The gradient itself.

    Raises:
        InputError: it is NaN or infinite somewhere.
    """
    if not gradient.isfinite().all():
        raise InputError(
            f"{host.pair.tuned.ref}: gradients are NaN or infinite; half precision overflows at times: run "
            "it in float32 (--dtype float32)"
        )
    return gradient
