"""Where results come from: what the checkpoints are, and the key under which a result may be used again."""

import hashlib
import json
import marshal
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.analysis import Analysis, plain
from diagnostics.store import Audit

if TYPE_CHECKING:
    from probes import CheckpointPair


def key(record: Analysis, used: Mapping[str, Any], stamps: Mapping[str, str], rows: Mapping[str, Any]) -> str:
    """Hash of all that a result depends on: it may be used again only under the same key."""
    import torch

    return digest(
        json.dumps(
            {
                "analysis": record.name,
                "parameters": plain(used),
                "checkpoints": stamps,
                "rows": {role: rows[role] for role in (*record.inputs, *record.optional) if role in rows},
                "source": source(record.function),
                "versions": [version("tunescope"), torch.__version__],
            },
            sort_keys=True,
        )
    )


def source(function: Callable[..., Any]) -> str:
    """Hash of the code that a result comes from: the function's package, and ours that reads checkpoints."""
    import probes

    module = sys.modules[function.__module__]
    top = sys.modules[module.__name__.partition(".")[0]]
    places = [Path(place) for package in (top, probes) for place in getattr(package, "__path__", ())]
    files = {file for place in places for file in place.glob("*.py")}
    if getattr(module, "__file__", None):
        files.add(Path(str(module.__file__)))
        code = b""
    else:  # typed at a prompt
        code = marshal.dumps(getattr(function, "__wrapped__", function).__code__)
    return digest(code, *(file.read_bytes() for file in sorted(files)))


def digest(*parts: str | bytes) -> str:
    """Short blake2b of the parts in order."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        made.update(len(data).to_bytes(8, "little") + data)
    return made.hexdigest()


class Described(threading.Thread):
    """Describes the two checkpoints while analyses run: the fingerprint of a large one takes minutes.

    What an earlier audit of the same files says is taken over.
    """

    def __init__(self, pair: "CheckpointPair", earlier: Audit | None):
        # A daemon: an interrupted audit must not wait for it.
        super().__init__(name="fingerprints", daemon=True)
        self.pair = pair
        self.trouble: tuple[str, ...] = ()
        known = (
            earlier is not None and bool(earlier.base["fingerprint"]) and bool(earlier.tuned["fingerprint"])
        )
        self.described = (earlier.base, earlier.tuned) if earlier is not None and known else None
        if self.described is None:
            self.start()

    def run(self) -> None:
        """Describe both; called by the thread."""
        try:
            self.described = (self.pair.base.describe(), self.pair.tuned.describe())
        except Exception as error:  # a file that vanishes meanwhile must not cost the results
            self.trouble = (f"the checkpoints could not be fingerprinted: {one_line(error)}",)

    def wait(self) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[str, ...]]:
        """What base and tuned are, and what went wrong in finding out."""
        if self.ident is not None:
            self.join()
        base, tuned = self.described or ({}, {})
        return base, tuned, self.trouble


def one_line(error: BaseException) -> str:
    """The text of an exception on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
