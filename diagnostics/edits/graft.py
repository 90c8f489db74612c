"""Grafting: the base with a sufficient region of tuned's weights, as a checkpoint.

θ(g) = g ⊙ θ_tuned + (1 − g) ⊙ θ_base for a mask g, by selection and never by arithmetic: base + 1 · (tuned −
base) is not tuned in floating point. Source: Panigrahi et al. 2023, arXiv:2302.06600, section 2.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch, write_graft
from probes.checkpoints.save import refuse_occupied

TRAIL = "tunescope_graft.json"


@dataclass(frozen=True, kw_only=True)
class GraftedCheckpoint:
    """What was written.

    Attributes:
        out: the directory.
        mask: the file that names the entries.
        without: the complement was written: tuned with these entries from base.
        entries: of the mask.
        tensors: in which they lie.
        weights: entries that both sides have.
        notes: what a reader must know.
    """

    out: Path
    mask: Path
    without: bool
    entries: int
    tensors: int
    weights: int
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """All of it as plain values, as written beside the weights."""
        return asdict(self) | {"out": str(self.out), "mask": str(self.mask)}

    def summary(self) -> str:
        """A sentence for a person."""
        share = f"{self.entries:,} of {self.weights:,} weights ({self.entries / max(1, self.weights):.3g})"
        host, guest = ("tuned", "base") if self.without else ("base", "tuned")
        return f"Wrote {host} with {share} from {guest}, in {self.tensors} tensors."


def graft(
    base: Any,
    tuned: Any,
    mask: str | Path,
    out: str | Path,
    *,
    without: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> GraftedCheckpoint:
    """Write the base with the entries of a mask from tuned, as full weights that `from_pretrained` loads.

    Args:
        base, tuned: the pair that the mask was found on, as `CheckpointPair` takes it.
        mask: a file that an audit kept in its `masks`.
        out: a directory that does not exist yet, or is empty.
        without: write tuned with these entries from base instead: what tuned is worth without them.
        progress: called with (done, total, name).

    Raises:
        InputError: the mask is missing, damaged or of another pair; `out` is occupied or cannot be written.
    """
    out, mask = Path(out).expanduser(), Path(mask).expanduser()
    refuse_occupied(out)
    patch = Patch.load(mask)
    pair = CheckpointPair(base, tuned)
    patch.check(pair, str(mask))
    made = write_graft(pair, patch, out, without=without, progress=progress)
    notes = []
    if made.alone:
        notes.append(f"{len(made.alone)} tensors that base lacks are tuned's, such as {made.alone[0]}.")
    if made.lost:
        notes.append(f"{len(made.lost)} tensors that tuned lacks were left out, such as {made.lost[0]}.")
    if made.widened:
        notes.append(
            f"{len(made.widened)} tensors are written in base's wider dtype, so that its values stay exact; "
            "load them with that dtype."
        )
    if pair.tuned.kind == "adapter":
        notes.append("The adapter was merged: the mask is over merged weights, and full weights are written.")
    grafted = GraftedCheckpoint(
        out=out,
        mask=mask,
        without=without,
        entries=patch.count,
        tensors=len(patch.index),
        weights=made.weights,
        notes=tuple(notes),
    )
    trail = {"tunescope": version("tunescope"), "base": pair.base.ref, "tuned": pair.tuned.ref}
    trail |= grafted.describe() | {"about": dict(patch.about)}
    (out / TRAIL).write_text(json.dumps(trail, indent=2) + "\n", encoding="utf-8")
    return grafted
