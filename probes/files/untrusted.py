"""Files of strangers: reading opens none outside their directory, and any error is one printable line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probes.errors import InputError, UnknownNameError

# Characters of a message; a longer one loses its middle, as the end says how to mend it.
MESSAGE = 1000


@contextmanager
def one_line(where: str | Path) -> Iterator[None]:
    """Let errors out as one printable line, however long or strange the names in a file are."""
    try:
        yield
    except RecursionError as error:
        raise InputError(plain(f"{where}: is nested too deeply to be read")) from error
    except (ValueError, LookupError) as error:
        # A parser's complaint is about the file; subclasses such as KeyError are faults of this program.
        if type(error) not in (ValueError, LookupError) and not isinstance(error, InputError):
            raise
        kind = UnknownNameError if isinstance(error, LookupError) else InputError
        kind = type(error) if isinstance(error, InputError) else kind
        text = str(error)
        if text.startswith("Exceeds the limit"):  # Python's, on writing a whole number out for a message
            text = f"{where}: holds a number of more digits than can be read"
        elif plain(text) == text and type(error) is kind:
            raise
        raise kind(plain(text)) from error


def plain(text: str) -> str:
    """A text without line ends, control characters and lone surrogates, at most as long as a message."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = MESSAGE // 2
    return text if len(text) <= MESSAGE else f"{text[:half]} … {text[-half:]}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises InputError if the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: not readable as JSON ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: should hold a JSON object, holds a {type(content).__name__}")
    return content


def confined(path: Path, directory: Path, what: str = "checkpoint") -> Path:
    """The path; raises InputError if a link leads out of the directory, called `what` in the message.

    An unpacked archive could have any file read through such a link. A snapshot in the Hugging Face cache,
    `models--ORG--NAME/snapshots/REVISION`, consists of links to its repository's blobs, which are allowed. A
    file that a person names is opened wherever it leads.
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
    """The blobs of the Hugging Face cache, if a directory is in one of its snapshots."""
    return [
        parent.parent / "blobs"
        for parent in snapshot.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
