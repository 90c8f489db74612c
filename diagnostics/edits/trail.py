"""The JSON file next to the weights that an edit writes: the checkpoints, the parameters, the change."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diagnostics.edits.merge_check import WrittenMerge
from probes import CheckpointPair


def write_trail(
    file: Path, pair: CheckpointPair, facts: Mapping[str, Any], *, merge: WrittenMerge | None = None
) -> None:
    """Write the version, the references of the pair, the facts on the edit, and the adapter merged in it."""
    trail = {"tunescope": version("tunescope"), "base": pair.base.ref, "tuned": pair.tuned.ref, **facts}
    trail |= {} if merge is None else {"merge": merge.describe()}
    file.write_text(json.dumps(trail, indent=2) + "\n", encoding="utf-8")
