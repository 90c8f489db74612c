"""Notes of `integrity`: which tensors are meant, and what was not looked at."""

from collections.abc import Iterable, Sequence
from typing import Any

from diagnostics.analyses.integrity.direction import Evidence
from diagnostics.analyses.integrity.model_files import ModelFiles
from diagnostics.analyses.integrity.reading import Measured
from diagnostics.analyses.integrity.tables import placed
from probes import CheckpointPair
from probes.checkpoints.usable import Problem, in_a_line
from probes.files.untrusted import plain

NAMED = 4  # tensors or layers in a note
# verdict -> what it means of the matrices that are named
MERGES = {
    "unmerged": "The adapter is not merged in",
    "doubled": "The adapter's delta was added twice in",
    "scaled": "The adapter's delta was added by another factor in",
    "subtracted": "The adapter's delta was subtracted, as if base and tuned were swapped, in",
    "other": "Another delta than this adapter's is in",
    "more": "More than this adapter's delta, as after further training or a second adapter, is in",
    "lost": "The rounding of the merge took most of the adapter's delta; merge in float32:",
}


def notes_of(
    pair: CheckpointPair, sides: tuple[ModelFiles, ModelFiles], measured: Measured,
    required: Sequence[Sequence[Problem]], facts: Sequence[Evidence],
) -> list[str]:  # fmt: skip
    """All notes, the gravest first."""
    notes = []
    for role, problems in zip(("base", "tuned"), required, strict=True):
        if problems:
            notes.append(f"{role.capitalize()} cannot be used: {plain(in_a_line(problems))}.")
    for role in ("base", "tuned"):
        broken = [
            row for row in measured.healths if row.side == role and row.health.nan + row.health.infinite
        ]
        if broken:
            notes.append(
                f"{role.capitalize()} holds NaN or infinity in {some(row.tensor for row in broken)}."
            )
    notes += merge_notes(measured)
    swapped = [fact.evidence for fact in facts if fact.says == "swapped" and fact.weight == "strong"]
    if swapped:
        notes.append(plain(f"Are base and tuned swapped? {'; '.join(swapped)}."))
    alone = [row.tensor for row in measured.compared if not row.compared and row.entries]
    if alone:
        notes.append(f"Tuned alone has {some(alone)}.")
    lacking = [
        role
        for role, files in zip(("Base", "Tuned"), sides, strict=True)
        if not files.tokenizer and not files.slow_files()
    ]
    if lacking:
        verb = "brings" if len(lacking) == 1 else "bring"
        notes.append(f"{' and '.join(lacking).capitalize()} {verb} no tokenizer: tokens were not compared.")
    return notes


def merge_notes(measured: Measured) -> list[str]:
    """Which matrices were merged otherwise, a note for each way."""
    notes = []
    for verdict, meaning in MERGES.items():
        rows = [row for row in measured.merges if row.fit is not None and row.fit.verdict == verdict]
        if rows:
            factors = [row.fit.factor for row in rows if row.fit is not None]
            times = f" (factor {_range(factors)})" if verdict == "scaled" else ""
            where = some(located(row.name, row.matrix) for row in rows)
            notes.append(f"{meaning} {_matrices(len(rows))}{times}: {where}.")
    outside = [row for row in measured.merges if row.fit is None and not row.scheme]
    if outside:
        where = some(located(row.name, row.matrix) for row in outside)
        notes.append(f"Changed, although the adapter leaves them alone: {_matrices(len(outside))}, {where}.")
    schemes = {row.fit.scheme if row.fit else row.scheme for row in measured.merges} - {""}
    if schemes:
        notes.append(
            f"The adapter was merged into a base quantised to {' and '.join(sorted(schemes))}: tuned is that "
            "base's dequantised weights with the delta, not base's own."
        )
    if measured.unread:
        notes.append(f"The adapter changes tensors that tuned lacks: {some(measured.unread)}.")
    return notes


def _matrices(count: int) -> str:
    return f"{count} {'matrix' if count == 1 else 'matrices'}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def located(name: str, matrix: Any) -> str:
    """Layer and component in words."""
    where = placed(matrix, name)
    return f"layer {where['layer']} {where['component']}" if where["layer"] is not None else name


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return plain(", ".join(listed[:NAMED])) + more
