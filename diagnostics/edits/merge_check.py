"""After an edit of an adapter's model: do the files hold base plus so many times the adapter's delta?

The check is that of the analysis `integrity`, on the files as they were written. If it fails, this program is
at fault, never the input.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diagnostics.analyses.integrity.merge import fit_merge, pooled_factor
from diagnostics.analyses.integrity.reading import delta_of, sampled
from diagnostics.analyses.integrity.rounding import changed_entries
from probes import CheckpointPair, open_checkpoint
from probes.checkpoints.blend import Blender
from probes.checkpoints.mask_file import Patch

# Verdicts on a faultless merge; "lost" where the dtype cannot hold the delta.
MERGED = ("merged", "no delta", "lost")


@dataclass(frozen=True, kw_only=True)
class WrittenMerge:
    """The merge in written files.

    Attributes:
        factor: how often the delta was to be added.
        low, high: the interval of how often it was, over all matrices; None where the factor is 0.
    """

    adapter: str
    factor: float
    matrices: int
    low: float | None = None
    high: float | None = None

    def describe(self) -> dict[str, Any]:
        """The attributes as plain values, for the JSON file next to the weights."""
        return asdict(self)


def check_merge(
    pair: CheckpointPair, out: Path, factor: float, *, edited: Collection[str] = ()
) -> WrittenMerge | None:
    """Check each matrix of written files that an adapter changes; None if tuned is no adapter.

    Args:
        factor: how often the delta was to be added to base.
        edited: matrices that are meant to hold something else.

    Raises:
        RuntimeError: a matrix holds something else than was meant.
    """
    if pair.tuned.kind != "adapter":
        return None
    written = open_checkpoint(out, base=pair.tuned.base)
    fits, count = [], 0
    for name in pair.matrices:
        theirs = pair.counterpart(name).name
        if name in edited or theirs not in written.matrices or not pair.tuned.touched(theirs):
            continue
        if written.kind == "adapter" and (pair.delta(name) is None or written.delta(theirs) is None):
            continue  # DoRA's lengths are not linear in the delta
        count += 1
        rows = sampled(pair.matrices[name])
        base = pair.base.matrix(name)[rows]
        values = written.matrix(theirs)[: pair.matrices[name].rows][rows]
        if factor == 0:
            faithful = changed_entries(base, values) == 0
        else:
            delta = delta_of(pair.tuned, theirs, pair.base.matrix(name), rows)
            fit = fit_merge(base, values, factor * delta)
            faithful = fit.verdict in MERGED
            fits.append(fit)
        if not faithful:
            raise fault(out, name, f"base plus {factor:g} times the adapter's delta")
    pooled = pooled_factor([fit for fit in fits if fit.verdict == "merged"])
    low, high = (None, None) if pooled is None else (factor * pooled[1], factor * pooled[2])
    return WrittenMerge(adapter=pair.tuned.ref, factor=factor, matrices=count, low=low, high=high)


def check_graft(pair: CheckpointPair, out: Path, patch: Patch, *, without: bool) -> WrittenMerge | None:
    """Check each tensor of a graft: the adapter's delta where it is tuned's, and nowhere else.

    Raises:
        RuntimeError: a tensor holds something else.
    """
    if pair.tuned.kind != "adapter":
        return None
    written, blender = open_checkpoint(out), Blender(pair)
    for name, index in patch.index.items():
        tuned = pair.tuned.tensor(name)
        base = blender.base_of(name, tuned)
        if base is None:
            continue
        of_tuned = torch.zeros(tuned.numel(), dtype=torch.bool)
        of_tuned[index] = True
        of_tuned ^= without
        flat = [values.reshape(-1) for values in (base, tuned, written.tensor(name))]
        ours, theirs, new = (values[of_tuned][None] for values in flat)
        kept, _, left = (values[~of_tuned] for values in flat)
        merged = ours.numel() == 0 or fit_merge(ours, new, theirs.float() - ours.float()).verdict in MERGED
        if not merged or changed_entries(kept, left):
            raise fault(out, name, "the masked entries of one model in the other")
    return WrittenMerge(adapter=pair.tuned.ref, factor=1.0, matrices=len(patch.index))


def fault(out: Path, name: str, meant: str) -> RuntimeError:
    """The error for files that do not hold what they were to hold."""
    return RuntimeError(f"{out}: {name} was not written as {meant}; do not use it, and report this")
