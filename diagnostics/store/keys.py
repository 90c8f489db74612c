"""Where results come from: what the checkpoints are, and the key under which a result may be used again."""

import hashlib
import json
import marshal
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core.analysis import Analysis, plain
from diagnostics.store.audit_store import Audit

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
    files = {file for place in places for file in place.rglob("*.py")}
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


def described(
    pair: "CheckpointPair", earlier: Audit | None
) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[str, ...]]:
    """What base and tuned are, and what went wrong in finding out; hashes both, which takes minutes if large.

    To be called after the analyses: threads that hash beside them make both many times slower.

    Args:
        earlier: an audit of the same files, whose answer is taken over.
    """
    if earlier is not None and earlier.base["fingerprint"] and earlier.tuned["fingerprint"]:
        return earlier.base, earlier.tuned, ()
    try:
        return pair.base.describe(), pair.tuned.describe(), ()
    except Exception as error:  # a file that vanishes meanwhile must not cost the results
        return {}, {}, (f"the checkpoints could not be fingerprinted: {one_line(error)}",)


def one_line(error: BaseException) -> str:
    """The text of an exception on one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
