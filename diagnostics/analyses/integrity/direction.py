"""Are base and tuned the right way round? What the files say of each other.

Ours. Strong evidence is a file of one side that names the other as its base. Weak evidence, such as a
trainer's state next to base alone, is also what a base that was itself fine-tuned brings: it is shown, not
counted.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from probes import CheckpointPair
from probes.checkpoints.checkpoint import Checkpoint

Says = Literal["right", "swapped"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One fact on the direction of a pair."""

    evidence: str
    says: Says
    weight: Literal["strong", "weak"]


def evidence(pair: CheckpointPair, adapter: Checkpoint | None) -> list[Evidence]:
    """What speaks for and against base being the model that tuned was made from."""
    return [*_adapters(pair, adapter), *_names(pair), *_trainer(pair)]


def _adapters(pair: CheckpointPair, adapter: Checkpoint | None) -> Iterator[Evidence]:
    if pair.base.kind == "adapter" and pair.tuned.kind == "full":
        named = str((pair.base.adapter or {}).get("base") or "")
        if pair.base.base is not None and pair.base.base.source.stamp() == pair.tuned.source.stamp():
            text = f"base is an adapter of {pair.tuned.ref}"
            yield Evidence(evidence=text, says="swapped", weight="strong")
        elif names(named, pair.tuned):
            text = f"base is an adapter that names {named}, which is tuned"
            yield Evidence(evidence=text, says="swapped", weight="strong")
    for checkpoint in (pair.tuned, adapter):
        named = str((checkpoint.adapter or {}).get("base") or "") if checkpoint is not None else ""
        if checkpoint is None or not named:
            continue
        sides = [names(named, side) for side in (pair.base, pair.tuned if checkpoint is adapter else None)]
        if sides[0] != sides[1]:
            text = f"the adapter {checkpoint.ref} names {named} as its base, which is "
            text += "base" if sides[0] else "tuned"
            yield Evidence(evidence=text, says="right" if sides[0] else "swapped", weight="strong")


def _names(pair: CheckpointPair) -> Iterator[Evidence]:
    """A base that config.json or the model card names."""
    for role, side, other, says in (
        ("tuned", pair.tuned, pair.base, "right"),
        ("base", pair.base, pair.tuned, "swapped"),
    ):
        for file, named in _named_bases(side):
            if names(named, other) and not names(named, side):
                text = f"{file} of {role} names {named} as where it comes from"
                yield Evidence(evidence=text, says="right" if says == "right" else "swapped", weight="strong")


def _trainer(pair: CheckpointPair) -> Iterator[Evidence]:
    """A trainer's state next to one side, or further on next to base."""
    steps = [_step(side) for side in (pair.base, pair.tuned)]
    if steps[0] is None and steps[1] is None:
        return
    if steps[0] is not None and steps[1] is not None and steps[0] == steps[1]:
        return
    later = (steps[0] or -1) > (steps[1] or -1)
    texts = [f"step {step}" if step is not None else "none" for step in steps]
    text = f"trainer_state.json: {texts[0]} next to base, {texts[1]} next to tuned"
    yield Evidence(evidence=text, says="swapped" if later else "right", weight="weak")


def _named_bases(side: Checkpoint) -> Iterator[tuple[str, str]]:
    """Files of a side and the model that they name as its base."""
    if side.kind == "adapter":
        return  # its config.json and card are its base's
    named = side.config.get("_name_or_path")
    if isinstance(named, str) and named:
        yield "config.json", named
    card = side.directory / "README.md" if side.directory else None
    if card is not None and card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
        for match in re.finditer(r"^base_model:\s*(?:\n?- )?(\S+)", front[1] if front else "", re.M):
            yield "README.md", match[1].strip("\"'")


def names(named: str, side: Checkpoint | None) -> bool:
    """Whether a name is that of a checkpoint: its path, its reference, or a hub id as a whole."""
    if side is None or not named:
        return False
    wanted = named.rstrip("/")
    if side.ref.rstrip("/").partition("@")[0] == wanted:
        return True
    directory = side.directory
    if directory is None:
        return False
    path, parts = Path(wanted), Path(wanted).parts
    if path.is_absolute() or path.exists():
        return path.resolve() == directory.resolve()
    in_cache = "models--" + wanted.replace("/", "--")
    resolved = directory.resolve()
    return in_cache in resolved.parts or (len(parts) > 1 and resolved.parts[-len(parts) :] == parts)


def _step(side: Checkpoint) -> int | None:
    file = side.directory / "trainer_state.json" if side.directory else None
    if file is None or not file.is_file():
        return None
    try:
        step = json.loads(file.read_text(encoding="utf-8")).get("global_step")
    except (ValueError, OSError, AttributeError):
        return None
    return step if isinstance(step, int) else None
