"""What results come from: the checkpoints, and the key under which a result may be used again."""

import hashlib
import json
import marshal
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from diagnostics.core.analysis import Analysis, plain
from diagnostics.store.audit_store import Audit
from diagnostics.store.source_files import OURS, sources

if TYPE_CHECKING:
    from probes import CheckpointPair


def key(record: Analysis, used: Mapping[str, Any], stamps: Mapping[str, str], rows: Mapping[str, Any]) -> str:
    """Hash of all that a result depends on: it may be used again only under the same key."""
    import torch

    parts = {
        "analysis": record.name, "parameters": plain(used), "checkpoints": stamps,
        "rows": {role: rows[role] for role in (*record.inputs, *record.optional) if role in rows},
        "source": source(record.function), "versions": [version("tunescope"), torch.__version__],
    }  # fmt: skip
    return digest(json.dumps(parts, sort_keys=True))


def source(function: Callable[..., Any]) -> str:
    """Hash of the code that a result comes from: the function's module, and all that it imports and runs."""
    module = sys.modules[function.__module__]
    files = sources(module.__name__)
    code = b""
    if not getattr(module, "__file__", None):  # typed at a prompt: there is no file to read imports from
        typed = getattr(function, "__wrapped__", function).__code__
        code = marshal.dumps(typed)
        values = vars(module).values()
        names = {str(getattr(value, "__module__", getattr(value, "__name__", ""))) for value in values}
        for name in names | set(typed.co_names):
            if name.partition(".")[0] in OURS:
                files |= sources(name)
    return digest(code, *(f"{name} {hashed}" for name, hashed in sorted(files.items())))


def digest(*parts: str | bytes) -> str:
    """Short blake2b of the parts in order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def described(
    pair: "CheckpointPair", earlier: Audit | None
) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[str, ...]]:
    """Descriptions of base and tuned with their fingerprints, and a note on what could not be read.

    Hashing takes minutes where they are large. Call it after the analyses: threads that hash at the same time
    make both many times slower.

    Args:
        earlier: an audit of the same files; its descriptions are used again.
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
