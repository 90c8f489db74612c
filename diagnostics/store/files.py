"""Files that are written whole or not at all, and JSON and parquet that every reader takes."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


# Of one table; the largest that an analysis writes have a hundredth of it. A few bytes of parquet can stand
# for any number of equal rows.
CELLS = 2**26


class CannotWriteError(OSError):
    """A file could not be written; the text says where, why and how to mend it."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turn what goes wrong on the disk into a CannotWriteError that says where, and how to mend it."""
    try:
        yield path
    except CannotWriteError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotWriteError(
            f"cannot write {path}: {reason}; mend that and run it again, finished analyses are kept"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and vanishes otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            yield part
            with part.open("rb+") as written:
                os.fsync(written.fileno())  # else a power cut may leave the new name on an empty file
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def write_table(path: Path, frame: "pd.DataFrame") -> None:
    """Write a frame as parquet in one step, with checksums."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    with replacing(path) as part:
        pyarrow.parquet.write_table(table, part, write_page_checksum=True)


def read_table(path: Path) -> "pd.DataFrame":
    """Read a frame back."""
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
            cells = table.metadata.num_rows * max(1, len(table.schema.names))
            if cells > CELLS:
                raise InputError(f"says that it has {cells} cells")
            return table.read().to_pandas()
    except Exception as error:  # a damaged file breaks in the ways of several libraries
        reason = "is damaged" if path.is_file() else "is missing"
        raise InputError(f"{path}: {reason}; run the audit again") from error


def to_json(record: Any) -> str:
    """JSON that every reader takes: a number that is not finite is the text NaN, Infinity or -Infinity."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return value

    return json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def number(value: Any) -> float | int:
    """A number as `to_json` wrote it."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if not isinstance(value, int | float) or (isinstance(value, int) and value.bit_length() > 1023):
        raise InputError(f"{value!r:.80} is not a number")
    return value
