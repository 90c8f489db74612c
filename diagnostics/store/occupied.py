"""What a directory holds already, so that an audit does not take its place unasked."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.store.audit_store import load
from diagnostics.store.keys import digest
from probes.errors import InputError
from probes.files.untrusted import plain

if TYPE_CHECKING:
    from probes.checkpoints.checkpoint import Checkpoint

# Files of a model, which an audit among them would seem to belong to.
OF_A_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin", "*.gguf")
SERIES = "the audits of a series"


def refuse_occupied(out: Path, what: str | None) -> None:
    """Raise InputError if there is something in a directory that an audit would replace, or mix with."""
    if what:
        remedy = "name another directory, or give --replace to write there all the same"
        raise InputError(plain(f"--out {out}: holds {what}; {remedy}"))


def stranger(out: Path) -> str | None:
    """What a directory holds besides an audit of two checkpoints: a model, a series, a lone report."""
    files = sorted(file.name for file in chain.from_iterable(map(out.glob, OF_A_MODEL)))
    if files:
        return f"a model ({files[0]})"
    if (out / "series.json").exists():
        return SERIES
    lone = (out / "report.html").exists() and not (out / "audit.json").exists()
    return "a report.html without its audit" if lone else None


def other_audit(out: Path, base: "Checkpoint", tuned: "Checkpoint | None") -> str | None:
    """The audit in a directory, if it is of another program or of other checkpoints.

    One of the same two, by their references or by their weights, is continued, or started over with --fresh.
    Without `tuned`, any audit with this base is the same.
    """
    if not (out / "audit.json").exists():
        return None
    try:
        earlier = load(out, damaged="drop")
    except InputError as error:
        # A writer of ours leaves its lock: a damaged audit, which `Store.earlier` reports.
        return None if (out / ".lock").exists() else f"an audit.json of another program ({error})"
    if _same(earlier.base, base) and (tuned is None or _same(earlier.tuned, tuned)):
        return None
    return f"an audit of another pair, {earlier.tuned.get('ref')} against {earlier.base.get('ref')}"


def _same(record: Mapping[str, Any], checkpoint: "Checkpoint") -> bool:
    """Whether an audit's record of a checkpoint is of this one: the same reference, or the same weights."""
    if record.get("stamp") == digest(checkpoint.stamp()):
        return True
    paths = [Path(ref).expanduser().absolute() for ref in (str(record.get("ref")), checkpoint.ref)]
    return checkpoint.opened is not None and paths[0] == paths[1]  # in memory many are called the same
