"""The bundled checkpoints, audited: one small base, and models tuned from it in different ways."""

from pathlib import Path
from typing import Any

from diagnostics.audit.plan import Progress
from diagnostics.audit.run import audit
from diagnostics.store.audit_store import Audit
from probes.errors import InputError

BUNDLED = Path(__file__).parents[1] / "bundled"


def demo(out: str | Path, *, progress: Progress | None = None, **options: Any) -> dict[str, Audit]:
    """Audit every bundled model against the bundled base.

    Args:
        out: holds an audit's directory for each.
        progress: as of `audit`; names of analyses are preceded by the model.
        options: of `audit`.

    Returns:
        The audits by the name of the tuned model.

    Raises:
        InputError: the checkpoints are not there, or as `audit`.
    """
    base = BUNDLED / "base"
    if not base.is_dir():
        raise InputError(
            f"{base}: the bundled checkpoints are missing from this installation; reinstall tunescope"
        )
    made = {}
    for tuned in tuned_models():

        def shown(name: str, done: int, total: int, what: str, model: str = tuned.name) -> None:
            if progress:
                progress(f"{model}: {name}", done, total, what)

        made[tuned.name] = audit(base, tuned, out=Path(out) / tuned.name, progress=shown, **options)
    return made


def tuned_models() -> list[Path]:
    """The directories of the bundled models that were tuned from the base, by name; a series lies deeper."""
    holding = {file.parent for file in BUNDLED.glob("*/*.safetensors")}
    return sorted(directory for directory in holding if directory != BUNDLED / "base")
