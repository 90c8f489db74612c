"""Every reader of files that others may have made, with the inputs that it is tried on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hypothesis.strategies import SearchStrategy

from tests.fuzz import checkpoints, records
from tests.fuzz.hostile import documents


class Target(NamedTuple):
    """One reader.

    Attributes:
        read: reads the bytes as a file, or as the files of a directory, all that can be asked of it.
        inputs: malformed files made from valid ones.
        prepare: writes what it may read besides, and decoys, beside the directory.
    """

    read: Callable[[bytes, Path], None]
    inputs: SearchStrategy[bytes]
    prepare: Callable[[Path], None] = checkpoints.prepare


TARGETS = {
    "safetensors": Target(checkpoints.safetensors, checkpoints.safetensors_files),
    "model": Target(checkpoints.model, checkpoints.models()),
    "pair": Target(checkpoints.pair, checkpoints.models()),
    "adapter": Target(checkpoints.adapter, checkpoints.adapters()),
    "torch": Target(checkpoints.torch_file, checkpoints.torch_files),
    "mask": Target(checkpoints.patch, checkpoints.patches()),
    "jsonl": Target(records.jsonl, records.jsonl_files()),
    "csv": Target(records.csv, records.csv_files()),
    "audit": Target(records.audit, records.audits(), records.prepare),
    "table": Target(records.table, records.tables),
    "series": Target(records.series, documents(records.SERIES), records.prepare),
    "policy": Target(records.policy, records.policies()),
}
