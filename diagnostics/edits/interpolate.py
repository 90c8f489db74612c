"""Interpolation: a checkpoint of base + α (tuned − base), at the α that the analysis `path` recommends.

Source: Wortsman et al. 2021, arXiv:2109.01903 (WiSE-FT), whose default α is 0.5.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diagnostics.edits.merge_check import check_merge
from diagnostics.edits.trail import write_trail
from diagnostics.evaluation.one_function import refuse_two_functions
from probes import CheckpointPair
from probes.checkpoints.blend import write_blend
from probes.checkpoints.lineage import adapter_notes
from probes.checkpoints.save import refuse_occupied
from probes.errors import InputError

TRAIL = "tunescope_interpolate.json"


@dataclass(frozen=True, kw_only=True)
class InterpolatedCheckpoint:
    """A checkpoint that `interpolate` wrote."""

    out: Path
    alpha: float  # 0 is base, 1 is tuned
    tensors: int  # number of tensors that differ
    displacement: float  # Frobenius norm of tuned − base over these
    notes: tuple[str, ...]
    base_at_0: bool = True  # whether the model at alpha 0 is base, in every tensor and its dtype

    def describe(self) -> dict[str, Any]:
        """The attributes as plain values, as in the JSON file next to the weights."""
        return asdict(self) | {"out": str(self.out)}

    def summary(self) -> str:
        """One sentence for the terminal."""
        base = "base" if self.base_at_0 else "base but for what the notes name"
        return (
            f"Wrote the model at alpha {self.alpha:g} (0 is {base}, 1 is tuned): {self.tensors} tensors "
            f"differ between the two, by a norm of {self.displacement:.4g}."
        )


def _resized(ours: int, theirs: int) -> str:
    if ours < theirs:
        return (
            f"the {theirs - ours} that base lacks are tuned's at every alpha; at alpha 0 the logits of "
            f"base's {ours} tokens are base's."
        )
    return f"the {ours - theirs} that tuned lacks are left out; at alpha 0 the other logits are base's."


def interpolate(
    base: Any, tuned: Any, alpha: float, out: str | Path, *,
    progress: Callable[[int, int, str], None] | None = None,
) -> InterpolatedCheckpoint:  # fmt: skip
    """Write base + α (tuned − base) as full weights that `from_pretrained` loads.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> interpolate(BUNDLED / "base", BUNDLED / "full", 0.5, "halfway").tensors
    28

    Computed in float64 and rounded once, to the dtype that holds both sides. 0 and 1 copy base and tuned, the
    latter in its own dtype. A tensor that base lacks, such as a new head, is tuned's at every α.

    Args:
        base, tuned: the pair, as `CheckpointPair` takes it.
        alpha: 0 is base, 1 is tuned.
        out: a directory that is new or empty.
        progress: called with (done, total, name).

    Raises:
        NotApplicableError: base and tuned have configurations that give two functions.
        InputError: an alpha outside [0, 1], weights that are not finite, an `out` that is occupied or cannot
            be written.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; it goes from 0, base, to 1, tuned")
    out = Path(out).expanduser()
    refuse_occupied(out)
    pair = CheckpointPair(base, tuned)
    refuse_two_functions(pair, instead="copy base or tuned as it is; nothing was written")
    blend = write_blend(pair, out, alpha, progress=progress)
    notes = []
    if blend.alone:
        notes.append(f"{len(blend.alone)} tensors that base lacks come from tuned, such as {blend.alone[0]}.")
    for ours, theirs in dict.fromkeys(pair.resized.values()):
        notes.append(f"The vocabulary went from {ours} to {theirs} rows: " + _resized(ours, theirs))
    lost = [tensor.tensor for tensor in pair.unmatched if tensor.tuned_shape is None]
    if lost:
        notes.append(f"{len(lost)} tensors that tuned lacks were left out, such as {lost[0]}.")
    base_at_0 = not notes
    if pair.base.dtype != pair.tuned.dtype:
        notes.append(
            f"Base is {pair.base.dtype}, tuned {pair.tuned.dtype}: below alpha 1 weights are written in a "
            "dtype that holds both exactly."
        )
    if pair.tuned.kind == "adapter":
        notes.append("The adapter was merged: its factors are not linear in alpha; full weights are written.")
        if rounded_off := math.sqrt(sum(blend.rounded.values())):
            notes.append(
                f"Merged weights are rounded to {pair.tuned.dtype}, by a norm of {rounded_off:.3g}; PEFT, "
                "which runs the adapter beside its base, rounds none."
            )
    notes += adapter_notes(pair.base, pair.tuned)
    interpolated = InterpolatedCheckpoint(
        out=out, alpha=float(alpha), tensors=len(blend.squares),
        displacement=math.sqrt(sum(blend.squares.values())), notes=tuple(notes), base_at_0=base_at_0,
    )  # fmt: skip
    write_trail(out / TRAIL, pair, interpolated.describe(), merge=check_merge(pair, out, alpha))
    return interpolated
