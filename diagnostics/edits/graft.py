"""Grafting: a checkpoint of the base with the masked weights of tuned.

θ(g) = g ⊙ θ_tuned + (1 − g) ⊙ θ_base for a mask g. Values are selected, not computed: base + 1 · (tuned −
base) is not tuned in floating point. Source: Panigrahi et al. 2023, arXiv:2302.06600, section 2.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diagnostics.edits.merge_check import check_graft
from diagnostics.edits.trail import write_trail
from diagnostics.evaluation.one_function import refuse_two_functions
from probes import CheckpointPair
from probes.checkpoints.lineage import adapter_notes
from probes.checkpoints.mask_file import Patch, write_graft
from probes.checkpoints.save import refuse_occupied

TRAIL = "tunescope_graft.json"


@dataclass(frozen=True, kw_only=True)
class GraftedCheckpoint:
    """A checkpoint that `graft` wrote.

    Attributes:
        entries, tensors: number of masked entries, and of tensors with any.
    """

    out: Path
    mask: Path
    without: bool  # whether it is the complement: tuned with the masked entries of base
    entries: int
    tensors: int
    weights: int  # number of entries that both checkpoints have
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """The attributes as plain values, as in the JSON file next to the weights."""
        return asdict(self) | {"out": str(self.out), "mask": str(self.mask)}

    def summary(self) -> str:
        """One sentence for the terminal."""
        share = f"{self.entries:,} of {self.weights:,} weights ({self.entries / max(1, self.weights):.3g})"
        recipient, donor = ("tuned", "base") if self.without else ("base", "tuned")
        return f"Wrote {recipient} with {share} from {donor}, in {self.tensors} tensors."


def graft(
    base: Any, tuned: Any, mask: str | Path, out: str | Path, *, without: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> GraftedCheckpoint:  # fmt: skip
    """Write the base with the masked entries of tuned, as full weights that `from_pretrained` loads.

    >>> import torch
    >>> from diagnostics.audit.demo import BUNDLED
    >>> from probes.checkpoints.mask_file import Patch
    >>> base, tuned = BUNDLED / "base", BUNDLED / "full"
    >>> mask = {"model.layers.0.mlp.up_proj.weight": torch.tensor([0, 5, 9])}
    >>> Patch.of(CheckpointPair(base, tuned), mask).save("mask.safetensors")
    >>> graft(base, tuned, "mask.safetensors", "grafted").entries
    3

    Args:
        base, tuned: the pair of the mask, as `CheckpointPair` takes it.
        mask: a file in the `masks` of an audit.
        out: a directory that is new or empty.
        without: write the complement, tuned with the masked entries of base.
        progress: called with (done, total, name).

    Raises:
        NotApplicableError: base and tuned have configurations that give two functions.
        InputError: the mask is missing, damaged or of another pair; `out` is occupied or cannot be written.
    """
    out, mask = Path(out).expanduser(), Path(mask).expanduser()
    refuse_occupied(out)
    patch = Patch.load(mask)
    pair = CheckpointPair(base, tuned)
    refuse_two_functions(pair, instead="a graft of the two would be neither, and nothing was written")
    patch.check(pair, str(mask))
    written = write_graft(pair, patch, out, without=without, progress=progress)
    notes, alone, lost = [], written.alone, written.lost
    if alone:
        notes.append(f"{len(alone)} tensors that base lacks come from tuned, such as {alone[0]}.")
    if lost:
        notes.append(f"{len(lost)} tensors that tuned lacks were left out, such as {lost[0]}.")
    if written.widened:
        notes.append(
            f"{len(written.widened)} tensors are written in base's wider dtype, which keeps them exact."
        )
    if pair.tuned.kind == "adapter":
        notes.append("The adapter was merged: the mask selects merged weights, and full weights are written.")
    notes += adapter_notes(pair.base, pair.tuned)
    grafted = GraftedCheckpoint(
        out=out, mask=mask, without=without, entries=patch.count, tensors=len(patch.index),
        weights=written.weights, notes=tuple(notes),
    )  # fmt: skip
    merge = check_graft(pair, out, patch, without=without)
    write_trail(out / TRAIL, pair, grafted.describe() | {"about": dict(patch.about)}, merge=merge)
    return grafted
