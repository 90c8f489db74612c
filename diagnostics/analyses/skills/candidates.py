"""A graft's candidate entries in a running model: masks are written into it, gradients read out of it.

The gradient of a weight is kept at its candidates alone and freed at once, so that memory is one model, its
activations, its largest gradient and some numbers a candidate.
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
    """Entries with both of their stored values; in a vector they are ordered by tensor name, then index."""

    index: Region  # ascending flat indices of each tensor, in 32 bits where these suffice
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
        """The slice of the vector that belongs to each tensor."""
        start = 0
        for name, entries in self.index.items():
            yield name, slice(start, start + len(entries))
            start += len(entries)

    def region(self, mask: Bool[Tensor, " candidates"]) -> Region:
        """The entries at which a mask is true."""
        chosen = {name: self.index[name][mask[span]] for name, span in self.spans}
        return {name: index for name, index in chosen.items() if len(index)}

    def movement(self, positions: Int[Tensor, " _"] | None = None) -> Float[Tensor, " _"]:
        """|tuned − base| of all, or at ascending positions of the vector."""
        parts = []
        for name, span in self.spans:
            base, tuned = self.base[name], self.tuned[name]
            if positions is not None:
                first, last = torch.searchsorted(positions, torch.tensor([span.start, span.stop])).tolist()
                chosen = positions[first:last] - span.start
                base, tuned = base[chosen], tuned[chosen]
            parts.append(delta(base, tuned).abs_())
        return torch.cat(parts) if parts else torch.empty(0)


class GraftedModel:
    """A running graft of the candidates; a context manager at whose end the model is base again."""

    def __init__(self, two_sided: TwoSidedModel, candidates: Candidates):
        """Prepare a two-sided model that is base."""
        assert two_sided.side == "base"
        self.two_sided, self.candidates = two_sided, candidates
        self._spans = dict(candidates.spans)
        self._mask: Tensor | None = None  # the hard mask that is written
        sides = (*candidates.base.values(), *candidates.tuned.values())
        wide = any(values.dtype == torch.float64 for values in sides)
        self._dtype = torch.float64 if wide else torch.float32

    def __enter__(self) -> "GraftedModel":
        return self

    def __exit__(self, *error: object) -> None:
        self._mask = None
        self.two_sided.restore(self.candidates.index.keys())

    def write_mask(self, mask: Mask) -> None:
        """Write base + mask ⊙ (tuned − base) at the candidates; a hard mask selects values."""
        hard, present = mask.dtype == torch.bool, self._mask
        for name, span in self._spans.items():
            values, index = mask[span], self.candidates.index[name]
            base, tuned = self.candidates.base[name], self.candidates.tuned[name]
            if hard and present is not None:
                new = (present[span] != values).nonzero()[:, 0]
                if not len(new):
                    continue
                values, index, base, tuned = (part[new] for part in (values, index, base, tuned))
            if hard:
                wide = torch.promote_types(base.dtype, tuned.dtype)
                chosen = torch.where(values, tuned.to(wide), base.to(wide))
            else:
                D = delta(base, tuned)
                chosen = base.to(D.dtype) + values.to(D.dtype) * D
            self.two_sided.write(name, index.long(), chosen)
        self._mask = mask.clone() if hard else None

    def gradient(
        self, mask: Mask, objective: Objective, rows: list[int] | None = None
    ) -> Float[Tensor, " candidates"]:
        """dL/dm of every candidate at a mask."""
        self.write_mask(mask)
        gradient = torch.zeros(len(self.candidates), dtype=self._dtype)
        parts = {name: gradient[span] for name, span in self._spans.items()}
        with collect_gradients(self.two_sided, self.candidates.index, parts):
            objective.backward(self.two_sided.model, rows)
        for name, part in parts.items():
            part *= delta(self.candidates.base[name], self.candidates.tuned[name])
        return check_finite(gradient, self.two_sided)

    def gradient_at(
        self, others: Region, read: Read, mask: Mask, objective: Objective, rows: list[int] | None = None
    ) -> Float[Tensor, " others"]:
        """dL/dm of entries that are no candidates, at a mask of the candidates."""
        self.write_mask(mask)
        parts = {name: torch.zeros(len(entries)) for name, entries in others.items()}
        with collect_gradients(self.two_sided, others, parts):
            objective.backward(self.two_sided.model, rows)
        for name, part in parts.items():
            parts[name] = part * delta(*(side.reshape(-1)[others[name].long()] for side in read(name)))
        return check_finite(torch.cat(list(parts.values())) if parts else torch.empty(0), self.two_sided)


@contextmanager
def collect_gradients(
    two_sided: TwoSidedModel, index: Mapping[str, Int[Tensor, " _"]], sums: Mapping[str, Float[Tensor, " _"]]
) -> Iterator[None]:
    """Add the gradients of some entries of each tensor to `sums`, and free all gradients at once."""
    # A tensor may be in several parameters, where the model keeps it in another form.
    holders: dict[nn.Parameter, list[str]] = {}
    for name, entries in index.items():
        for slot in two_sided.editable.slots(name, entries.long()):
            if not isinstance(slot.tensor, nn.Parameter):
                raise InputError(f"{two_sided.pair.tuned.ref}: {name} is no parameter of the running model")
            holders.setdefault(slot.tensor, []).append(name)

    def collect(parameter: Any) -> None:
        gradient = parameter.grad.reshape(-1)
        for name in holders[parameter]:
            for slot in two_sided.editable.slots(name, index[name].long()):
                if slot.tensor is parameter:
                    sums[name][slot.which] += gradient[slot.indices].to("cpu", sums[name].dtype)
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


def check_finite(gradient: Float[Tensor, " _"], two_sided: TwoSidedModel) -> Float[Tensor, " _"]:
    """The gradient, checked."""
    if not gradient.isfinite().all():
        raise InputError(
            f"{two_sided.pair.tuned.ref}: gradients are NaN or infinite; half precision may overflow: use "
            "--dtype float32"
        )
    return gradient
