"""Interpolation: base + α (tuned − base) as a checkpoint, for the α that the analysis `path` finds best.

Source: Wortsman et al. 2021, arXiv:2109.01903 (WiSE-FT), whose default α is 0.5.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probes import CheckpointPair
from probes.checkpoints.blend import write_blend
from probes.checkpoints.save import refuse_occupied
from probes.errors import InputError

TRAIL = "tunescope_interpolate.json"


@dataclass(frozen=True, kw_only=True)
class InterpolatedCheckpoint:
    """What was written.

    Attributes:
        out: the directory.
        alpha: 0 is base, 1 is tuned.
        tensors: how many lie between the two.
        displacement: Frobenius norm of tuned − base over these.
        notes: what a reader must know.
    """

    out: Path
    alpha: float
    tensors: int
    displacement: float
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """All of it as plain values, as written beside the weights."""
        return asdict(self) | {"out": str(self.out)}

    def summary(self) -> str:
        """A sentence for a person."""
        place = {0.0: "base itself", 1.0: "tuned itself"}.get(self.alpha, f"at {self.alpha:g} of the way")
        return (
            f"Wrote the model {place} (0 is base, 1 is tuned): {self.tensors} tensors differ, by "
            f"{self.displacement:.4g} in all."
        )


def interpolate(
    base: Any,
    tuned: Any,
    alpha: float,
    out: str | Path,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> InterpolatedCheckpoint:
    """Write base + α (tuned − base) as full weights that `from_pretrained` loads.

    Computed in float64 and rounded once, to the dtype of tuned. 0 and 1 copy the ends, bit for bit where both
    have one dtype. What base lacks, a new head among it, is tuned's at every α.

    Args:
        base, tuned: the pair, as `CheckpointPair` takes it.
        alpha: 0 is base, 1 is tuned.
        out: a directory that does not exist yet, or is empty.
        progress: called with (done, total, name).

    Raises:
        InputError: an alpha outside [0, 1], weights that are not finite, an `out` that is occupied or cannot
            be written.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; it goes from 0, base, to 1, tuned")
    out = Path(out).expanduser()
    refuse_occupied(out)
    pair = CheckpointPair(base, tuned)
    made = write_blend(pair, out, alpha, progress=progress)
    notes = []
    if made.alone:
        notes.append(f"{len(made.alone)} tensors that base lacks are tuned's, such as {made.alone[0]}.")
    resized = [f"{rows[0]} to {rows[1]} rows" for rows in pair.resized.values()]
    if resized:
        notes.append(f"The vocabulary went from {resized[0]}: rows that base lacks are tuned's.")
    if pair.base.dtype != pair.tuned.dtype:
        notes.append(
            f"Base is {pair.base.dtype}, tuned {pair.tuned.dtype}: all is written as tuned's, rounded once."
        )
    if pair.tuned.kind == "adapter":
        notes.append("The adapter was merged: its factors are not linear in alpha; full weights are written.")
    done = InterpolatedCheckpoint(
        out=out,
        alpha=float(alpha),
        tensors=len(made.squares),
        displacement=math.sqrt(sum(made.squares.values())),
        notes=tuple(notes),
    )
    trail = {"tunescope": version("tunescope"), "base": pair.base.ref, "tuned": pair.tuned.ref}
    (out / TRAIL).write_text(json.dumps(trail | done.describe(), indent=2) + "\n", encoding="utf-8")
    return done
