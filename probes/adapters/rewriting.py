"""An adapter's files as today's PEFT would write them, for PEFT to load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from probes.adapters.adapter import Adapter
from probes.adapters.expert_layouts import first_in_a
from probes.adapters.parts import AdapterUpdate
from probes.adapters.targets import canonical


@contextmanager
def rewritten(adapter: Adapter, directory: Path, version: str, transposed: bool) -> Iterator[Path]:
    """The directory of an adapter, or a temporary one with its tensors as a version of PEFT reads them.

    Args:
        version: of PEFT.
        transposed: whether the model's module of experts says `is_transposed`.
    """
    names = {key: canonical(key) for key in adapter.weights.headers}
    exchanged = first_in_a(version, transposed) != adapter.targets.transposed_stacks
    stacks = {
        update.A: update
        for updates in adapter.targets.updates.values()
        for update in updates
        if update.experts and (update.grouped or update.exchanged != exchanged)
    }
    if not stacks and all(key == name for key, name in names.items()):
        yield directory
        return
    tensors = {name: adapter.weights.read(key) for key, name in names.items()}
    for update in stacks.values():
        tensors[names[update.A]], tensors[names[update.B]] = _packed(adapter, update, exchanged)
    with TemporaryDirectory() as temporary:
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, Path(temporary) / "adapter_model.safetensors", metadata={"format": "pt"})
        yield Path(temporary)


def _packed(adapter: Adapter, update: AdapterUpdate, exchanged: bool) -> tuple[Tensor, Tensor]:
    """The factors of all experts: A expert after expert, B with the experts innermost."""
    factors = [adapter.factors(update, expert) for expert in range(update.experts)]
    pairs = [(low.B.mT, low.A.mT) if exchanged else (low.A, low.B) for low in factors]
    return torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=-1).flatten(1)
