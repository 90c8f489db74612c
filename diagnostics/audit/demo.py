"""The bundled checkpoints, audited: one small base, and models tuned from it in different ways."""

from pathlib import Path
from typing import Any

from diagnostics.audit.plan import Progress
from diagnostics.audit.run import audit
from diagnostics.audit.series import prefixed
from diagnostics.store.audit_store import Audit
from probes.errors import InputError

BUNDLED = Path(__file__).parents[1] / "bundled"


def demo(out: str | Path, *, progress: Progress | None = None, **options: Any) -> dict[str, Audit]:
    """Audit every bundled model against the bundled base; the audits by the name of the model.

    >>> {name: audit.verdict for name, audit in demo("demo", only="intruders").items()}
    {'full': 'pass', 'lora-r1': 'warn', 'lora-r8': 'warn'}

    Args:
        out: directory for the audit of each model.
        progress: as of `audit`; names of analyses are preceded by the model.
        options: of `audit`.

    Raises:
        InputError: the checkpoints are not there, or as `audit`.
    """
    base = BUNDLED / "base"
    if not base.is_dir():
        missing = "the bundled checkpoints are missing from this installation"
        raise InputError(f"{base}: {missing}; reinstall tunescope")
    audits = {}
    for tuned in tuned_models():
        bar, directory = prefixed(progress, tuned.name), Path(out) / tuned.name
        audits[tuned.name] = audit(base, tuned, out=directory, progress=bar, **options)
    return audits


def tuned_models() -> list[Path]:
    """The directories of the bundled models tuned from the base; the series lie one level deeper."""
    directories = {file.parent for file in BUNDLED.glob("*/*.safetensors")}
    return sorted(directory for directory in directories if directory != BUNDLED / "base")
