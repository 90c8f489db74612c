"""Detecting torch files that are small on disk and huge in memory, before they are opened.

`torch.load(weights_only=True)` runs no code, but unpacks records of any size and hashes keys of any depth.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

from probes.errors import InputError

# Most nested parts of a tuple. torch's own tuples hold a shape.
PARTS = 2**16
# Pickles before the bytes of a file from before torch 1.6: magic number, version, system, tensors, keys.
LEGACY = 5
CHANGES_IN_PLACE = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class TooManyError(Exception):
    """A pickle holds nested tuples of more parts than can be processed."""


def refuse_bombs(path: Path, zipped: bool) -> None:
    """Raise InputError for a file far larger in memory than on disk, or that would never finish loading.

    Truncated files are left to torch. `zipped`: an archive, as torch writes since 1.6; else a bare pickle.
    """
    try:
        if not zipped:
            with path.open("rb") as file:
                for _ in range(LEGACY):
                    bounded(file)
            return
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if squeezed := [record for record in records if record.compress_type != zipfile.ZIP_STORED]:
                raise TooManyError(f"{squeezed[0].filename[:80]!r} is compressed, which torch never does")
            for record in records:
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as file:
                        bounded(file)
    except TooManyError as error:
        raise InputError(
            f"{path}: is made to fill the memory ({error}) and is not opened; where you trust it, save its "
            "tensors again as safetensors"
        ) from error
    except Exception:  # a damaged archive or pickle raises anything
        return


def bounded(file: Any) -> None:
    """Count the nested parts of the tuples of one pickle, without building it.

    Thirty tuples that each hold the previous one twice take a hundred bytes, and a billion steps to hash.
    Raises TooManyError for more than `PARTS` parts; ValueError, IndexError or KeyError for no whole pickle.
    """
    mark = -1
    stack: list[int] = []
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(file):
        name = code.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(mark)
        else:
            taken = _taken(code, stack, mark)
            parts = 1 + sum(taken) if name.startswith("TUPLE") else 1
            if parts > PARTS:
                raise TooManyError(f"a tuple of {parts} parts")
            kept = taken[:1] if name in CHANGES_IN_PLACE else []
            stack += kept or [parts] * len(code.stack_after)


def _taken(code: Any, stack: list[int], mark: int) -> list[int]:
    """The items that an operation takes off the stack."""
    before, taken = code.stack_before, []
    if pickletools.stackslice in before:
        while (part := stack.pop()) != mark:
            taken.append(part)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]
