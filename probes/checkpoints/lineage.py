"""Whether an adapter is applied to the base that it was trained on."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from weakref import WeakKeyDictionary

from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from probes.files.sources import same_bytes

# `org/name`, or `name` of the first models on the hub.
_HUB = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_CACHED = re.compile(r"models--(?:([^/\\]+?)--)?([^/\\]+)[/\\]snapshots[/\\]")


def other_base(checkpoint: Checkpoint) -> str | None:
    """A sentence on an adapter that names another base than the one it is applied to; None if it does not.

    Weights are compared where the named base is a directory here; else names are: ids of the hub as a whole,
    and the last part of a path.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> other_base(open_checkpoint(BUNDLED / "lora-r8", base=BUNDLED / "base")) is None
    True
    """
    if checkpoint not in _COMPARED:
        _COMPARED[checkpoint] = _compared(checkpoint)
    return _COMPARED[checkpoint]


# Every analysis of an audit asks for the same two.
_COMPARED: WeakKeyDictionary[Checkpoint, str | None] = WeakKeyDictionary()


def _compared(checkpoint: Checkpoint) -> str | None:
    base, facts = checkpoint.base, checkpoint.adapter
    named = (facts or {}).get("base")
    if base is None or not isinstance(named, str) or not named.strip():
        return None
    named = named.strip()
    where = f"{checkpoint.ref} was trained on {named!r} and is applied to {base.ref}"
    local = Path(named).expanduser()
    if local.is_dir() and base.directory is not None:
        same = local.resolve() == base.directory.resolve() or _same_weights(local, base)
        if same is not None:
            return None if same else f"{where}, which holds other weights"
    given = _name(base)
    if given is None or _alike(named, given):
        revision = _other_revision(checkpoint, named, base)
        return None if revision is None else f"{where}: is revision {revision} the same model?"
    return f"{where}: is that the same model?"


def adapter_notes(*checkpoints: Checkpoint) -> tuple[str, ...]:
    """How the adapters among checkpoints are read, and whether they name another base; each once."""
    notes: list[str] = []
    for checkpoint in checkpoints:
        notes += [f"{checkpoint.ref}: {note}" for note in checkpoint.notes]
        notes += filter(None, [other_base(checkpoint)])
    return tuple(dict.fromkeys(notes))


def rounding_notes(*checkpoints: Checkpoint) -> tuple[str, ...]:
    """That an adapter on a base in half precision is rounded where it runs merged; empty for all others.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> rounding_notes(open_checkpoint(BUNDLED / "base"))
    ()
    """
    return tuple(
        f"{checkpoint.ref}: analyses that change weights run the adapter merged and rounded to the base's "
        f"{checkpoint.base.dtype}; those that only read the model run it unmerged, as PEFT does. The "
        "losses of tuned differ by this rounding."
        for checkpoint in checkpoints
        if checkpoint.base is not None and checkpoint.base.dtype in ("bfloat16", "float16")
    )


def _same_weights(named: Path, base: Checkpoint) -> bool | None:
    """Whether a directory holds the weights of a base; None if it holds none that can be read."""
    try:
        trained_on = open_checkpoint(named)
        if trained_on.stamp() == base.stamp():
            return True
        ours, theirs = base.headers, trained_on.headers
        if {n: (h.shape, h.dtype) for n, h in ours.items()} != {
            n: (h.shape, h.dtype) for n, h in theirs.items()
        }:
            return False
        return all(same_bytes(base.tensor(name), trained_on.tensor(name)) for name in ours)
    except ValueError:
        return None


def _name(base: Checkpoint) -> str | None:
    """What a base is called: its id on the hub, or the path of its directory; None in memory."""
    if base.module is not None:
        return getattr(getattr(base.module, "config", None), "_name_or_path", None) or None
    path = Path(base.ref).expanduser()
    if path.exists():
        directory = path if path.is_dir() else path.parent
        return str(directory.resolve())
    return base.ref if base.directory is not None else None


def _alike(named: str, given: str) -> bool:
    """Whether two names may be of one model."""
    ids = [_hub_id(name) for name in (named, given)]
    if all(ids):
        return ids[0] == ids[1]
    return _last(named) == _last(given)


def _hub_id(name: str) -> str | None:
    """The id on the hub that a name is, or is a cached copy of; None for other paths."""
    if cached := _CACHED.search(f"{name}/"):
        return "/".join(filter(None, cached.groups())).casefold()
    bare = name.partition("@")[0]
    hub = _HUB.fullmatch(bare) and not Path(name).expanduser().exists()
    return bare.casefold() if hub else None


def _last(name: str) -> str:
    """The last part of a path, of whichever system, or of an id."""
    if cached := _CACHED.search(f"{name}/"):
        return cached[2].casefold()
    bare = name if Path(name).exists() else name.partition("@")[0]
    parts = PureWindowsPath(bare).parts if "\\" in bare else PurePosixPath(bare).parts
    return parts[-1].casefold() if parts else ""


def _other_revision(checkpoint: Checkpoint, named: str, base: Checkpoint) -> str | None:
    """The revision that an adapter was trained on, if the base was given as another."""
    trained_on = getattr(checkpoint.source, "config", {}).get("revision")
    _, _, given = base.ref.partition("@")
    apart = isinstance(trained_on, str) and trained_on and given and given != trained_on
    return trained_on if apart and _hub_id(named) else None
