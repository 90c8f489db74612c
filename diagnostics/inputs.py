"""What an audit supplies to its analyses: the pair, and files of rows by role.

An analysis names its inputs by the names of its positional arguments; `OPTIONS` says what supplies each. A
file of rows is checked line by line and recorded; its fields are for the analyses that read it.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# input -> the option that supplies it
OPTIONS = {
    "pair": "BASE TUNED",
    "task": "--task F",
    "keep": "--keep F",
    "guard": "--guard F",
    "ood": "--ood NAME=F",
    "series": "`tunescope series CKPT CKPT…`",
}
ROLES = ("task", "keep", "guard", "ood")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One file of rows in one role.

    Attributes:
        name: what results call it; the file's own name unless `--ood NAME=F` gives one.
        ref: as it was asked for.
        rows: how many it holds.
        fingerprint: blake2b of its bytes.
    """

    name: str
    ref: str
    path: Path
    rows: int
    fingerprint: str

    def describe(self) -> dict[str, Any]:
        """What an audit records of it."""
        return {"name": self.name, "ref": self.ref, "fingerprint": self.fingerprint, "rows": self.rows}


def open_roles(files: Mapping[str, Iterable[str | Path]]) -> dict[str, tuple[Rows, ...]]:
    """The files of each role that has any, checked.

    Args:
        files: role -> references; one of `ood` may be `NAME=F`.

    Raises:
        ValueError: a missing, empty or malformed file, or one name twice in a role.
    """
    opened = {role: tuple(open_rows(role, str(ref)) for ref in refs) for role, refs in files.items()}
    for role, rows in opened.items():
        names = [made.name for made in rows]
        for name in names:
            if names.count(name) > 1:
                hint = "give each a name, --ood NAME=F" if role == "ood" else "rename one of the files"
                raise ValueError(f"--{role}: two files are called {name!r}; {hint}")
    return {role: rows for role, rows in opened.items() if rows}


def open_rows(role: str, ref: str) -> Rows:
    """Check and describe one file.

    Raises:
        ValueError: it is missing, empty or malformed; the message names the file and the line.
    """
    name, _, file = ref.rpartition("=") if role == "ood" and not Path(ref).exists() else ("", "", ref)
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--{role} {ref}: there is no such file; rows are read from .jsonl and .csv files")
    data = path.read_bytes()
    try:
        count = sum(
            1 for _ in (csv_rows if path.suffix == ".csv" else json_rows)(data.decode("utf-8-sig"), path)
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not count:
        raise ValueError(f"{path}: holds no rows")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Rows(name=name or path.stem, ref=ref, path=path, rows=count, fingerprint=digest)


def json_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one a line; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f'{path}:{number}: a row is an object such as {{"text": …}}, this is {line[:40]!r}'
            )
        yield row


def csv_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num}: not as many fields as the header has")
            yield row
    except csv.Error as error:
        line = min(reader.line_num + 1, len(text.splitlines()))  # the line under way is not counted yet
        raise ValueError(f"{path}:{line}: not CSV: {error}") from error
