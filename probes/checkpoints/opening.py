"""Opening a checkpoint by any reference: files, hub ids, adapters, models in memory."""

import pickle
import platform
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from probes.adapters.adapter import Adapter
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.usable import refuse_empty, refuse_empty_factors
from probes.errors import InputError
from probes.files.locate import adapter_files, locate, open_files
from probes.files.quantised import refuse_quantised
from probes.files.reparametrised import resolve
from probes.files.sources import Source
from probes.files.untrusted import confined, one_line, read_json
from probes.naming.architecture import names_of_model


def open_checkpoint(
    ref: Any,
    *,
    base: "Checkpoint | str | Path | None" = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Checkpoint:
    """Open a checkpoint by any reference.

    Args:
        ref: a model or adapter directory; a .safetensors, .bin or .pt file; a hub id (`org/name`,
            `org/name@revision`); in memory an `nn.Module`, `PeftModel`, TransformerLens model or state dict.
        base: what an adapter is applied to; by default the base that its configuration names.
        revision: of a hub id.
        tokenizer: reads the rows for it in this process; by default the one in its directory.

    Raises:
        InputError: nothing there, or not readable; the message says what, where and how to mend it.

    >>> import torch
    >>> open_checkpoint({"model.layers.0.mlp.up_proj.weight": torch.eye(2)}).parameters
    4
    """
    if isinstance(ref, str | Path):
        with one_line(ref):
            ref = _open(str(ref), locate(ref, revision=revision), base)
    elif not isinstance(ref, Checkpoint):
        from probes.checkpoints.in_memory import open_memory

        with one_line("the checkpoint"):
            ref = open_memory(ref)
            refuse_empty(ref)
    return ref if tokenizer is None else ref.with_tokenizer(tokenizer)


def _open(ref: str, path: Path, base: "Checkpoint | str | Path | None") -> Checkpoint:
    adapter = adapter_files(path)
    if adapter is not None:
        checkpoint, weights = _open_adapter(ref, *adapter, base)
    else:
        directory = path if path.is_dir() else path.parent
        settings = directory / "config.json"
        config = read_json(confined(settings, directory)) if settings.is_file() else {}
        lone_file = path.is_file() and not config
        weights = resolve(open_files(path), ref, partial(names_of_model, config))
        checkpoint = Checkpoint(ref, weights, config, directory=None if lone_file else directory)
        refuse_empty(checkpoint)
    checkpoint.opened, checkpoint.reopen = (path.absolute(), weights.stamp()), _reopened
    return checkpoint


# A worker unpickles the pair with each of its matrices, and opens the files once.
@lru_cache(maxsize=8)
def _reopened(ref: str, path: Path, stamp: str, config: bytes, base: Checkpoint | None) -> Checkpoint:
    """A checkpoint that another process opened; raises InputError if its files are not here or differ."""
    machine = f"on {platform.node() or 'this machine'}"
    if not path.exists():
        raise InputError(
            f"{path}: not there {machine}; every worker opens the checkpoints itself, so put the same files "
            "at the same place on each machine"
        )
    checkpoint = _open(ref, path, base)
    if checkpoint.opened != (path, stamp):
        raise InputError(
            f"{path}: {machine} it is not the file that was opened first, by size or time of change; copy it "
            "with its time kept, or start again if it was written meanwhile"
        )
    first_config = pickle.loads(config)
    return checkpoint if checkpoint.config == first_config else checkpoint.described_by(first_config)


def _open_adapter(
    ref: str, settings: Path, weights: Path, base: "Checkpoint | str | Path | None"
) -> tuple[Checkpoint, Source]:
    config = read_json(settings)
    if base is None:
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(named, str) or not named:
            hint = "name it there as base_model_name_or_path, or in Python give base="
            raise InputError(f"{ref}: is an adapter, and {settings.name} names no base; {hint}")
        try:
            base = open_checkpoint(named, revision=revision if isinstance(revision, str) else None)
        except ValueError as error:
            raise InputError(f"{ref}: cannot open the base that this adapter names: {error}") from error
    base = open_checkpoint(base)
    factors = open_files(weights)
    refuse_quantised(ref, factors.headers, {})
    refuse_empty_factors(ref, factors.headers)
    source = Adapter(
        config, factors, base.source, base.matrices, base_config=base.config, where=ref, of=base.ref
    )
    return Checkpoint(ref, source, source.model_config, directory=settings.parent, base=base), factors
