"""The JSON file next to the weights that an edit writes: the checkpoints, the parameters, the change."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probes import CheckpointPair


def write_trail(file: Path, pair: CheckpointPair, facts: Mapping[str, Any]) -> None:
    """Write the version, the references of the pair and the facts on the edit."""
    trail = {"tunescope": version("tunescope"), "base": pair.base.ref, "tuned": pair.tuned.ref, **facts}
    file.write_text(json.dumps(trail, indent=2) + "\n", encoding="utf-8")
