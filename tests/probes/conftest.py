"""Tiny models, made from configurations in code, and directories that hold them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def llama() -> Callable[..., Any]:
    """Makes a Llama of about 20 thousand parameters: `llama(seed=0, **config)`."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def make(seed: int = 0, **settings: Any) -> Any:
        torch.manual_seed(seed)
        config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
            "max_position_embeddings": 64,
        } | settings
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()

    return make


@pytest.fixture
def directory(llama: Callable[..., Any], tmp_path: Path) -> Path:
    """A saved Llama in one safetensors file."""
    path = tmp_path / "base"
    llama().save_pretrained(path)
    return path


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copies a one-file checkpoint with its tensors edited: `edited(directory, edit)`, where `edit(tensors)`
    changes the dict in place."""

    def make(source: Path, edit: Callable[[dict[str, torch.Tensor]], Any], name: str = "tuned") -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in source.iterdir():
            if file.suffix == ".json":
                (target / file.name).write_bytes(file.read_bytes())
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return make
