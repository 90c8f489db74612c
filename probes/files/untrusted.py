"""Files that others made: their paths, their JSON and their words, before anybody relies on them.

A checkpoint, an audit or a mask may come from a stranger. Reading one never opens a file outside of its
directory, and whatever is wrong with it is said in one line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probes.errors import InputError, UnknownNameError

# Characters of a message; what is cut out stands in its middle, for the end says how to mend it.
MESSAGE = 1000


@contextmanager
def one_line(where: str | Path) -> Iterator[None]:
    """Let errors out as one printable line, however long or strange the names in a file are.

    Args:
        where: what is read.

    Raises:
        InputError, UnknownNameError: as raised inside; nesting too deep to be followed is a ValueError.
    """
    try:
        yield
    except RecursionError as error:
        raise InputError(plain(f"{where}: is nested too deeply to be read")) from error
    except (ValueError, LookupError) as error:
        # A parser complains about the file; subclasses such as KeyError are faults of this program.
        if type(error) not in (ValueError, LookupError, InputError, UnknownNameError):
            raise
        kind = UnknownNameError if isinstance(error, LookupError) else InputError
        text = str(error)
        if text.startswith("Exceeds the limit"):  # Python's, on writing a whole number out for a message
            text = f"{where}: holds a number of more digits than can be read"
        elif plain(text) == text and type(error) is kind:
            raise
        raise kind(plain(text)) from error


def plain(text: str) -> str:
    """A text without line ends, control characters and half characters, not longer than a message."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = MESSAGE // 2
    return text if len(text) <= MESSAGE else f"{text[:half]} … {text[-half:]}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not readable as JSON (nested too deeply)") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: should hold a JSON object, holds a {type(content).__name__}")
    return content


def confined(path: Path, directory: Path, what: str = "checkpoint") -> Path:
    """The path, if what it leads to through links lies in a directory.

    A link may lead to another place in the directory, and from a snapshot in the Hugging Face cache,
    `models--ORG--NAME/snapshots/REVISION`, to the blobs of the same repository, of which such a snapshot is
    made. Any other link that leaves the directory is refused, because a checkpoint or an audit that was
    unpacked from an archive could have anything read by it. A file that a person names is no such link: it
    is opened wherever it leads.

    Args:
        what: the directory, in messages.

    Raises:
        InputError: it leads elsewhere.
    """
    try:
        real, root = path.resolve(), directory.resolve()
    except (RuntimeError, OSError) as error:  # a circle of links
        raise InputError(f"{directory}: {path.name!r} is a link that leads nowhere ({error})") from error
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise InputError(
            f"{directory}: {path.name!r} is a link to {real}, outside of the {what}; not opened, put the "
            "file itself there"
        )
    return path


def _blobs(snapshot: Path) -> list[Path]:
    """The blobs beside the snapshot in the Hugging Face cache that a directory is, or is part of."""
    return [
        parent.parent / "blobs"
        for parent in snapshot.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
