"""Shared by all tests: nothing is downloaded, one thread, and made-up analyses on two tiny checkpoints."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("quiet", deadline=None)
hypothesis.settings.load_profile("quiet")

# Packages under test are imported inside fixtures: jaxtyping hooks its checks in after this file is read.

COMPONENTS = ("q_proj", "o_proj")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def weights(seed: int, *, layers: int = 2, size: int = 8) -> dict[str, torch.Tensor]:
    """A made-up Llama-like state dict of square Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(size, size, generator=generator)
        for layer in range(layers)
        for name in COMPONENTS
    }


def save_model(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write a state dict as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, one for all tests of a process; CHROMIUM names one that is not on the path."""
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("NO CHROMIUM FOUND, so nothing was opened in any browser; set CHROMIUM to its path")
    sync_api = pytest.importorskip("playwright.sync_api", reason="PLAYWRIGHT IS NOT INSTALLED")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[str, str]:
    """A base of four 8x8 matrices, and a tuned one in which every entry is 0.5 larger."""
    base = weights(0)
    tuned = {name: value + 0.5 for name, value in base.items()}
    return str(save_model(tmp_path / "base", base)), str(save_model(tmp_path / "tuned", tuned))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An empty registry in place of the installed analyses."""
    from diagnostics.core import registry

    records: dict[str, Any] = {}
    monkeypatch.setattr(registry, "REGISTRY", records)
    monkeypatch.setattr(registry, "entry_points", lambda **group: [])
    return records


@pytest.fixture
def register(registry: dict[str, Any]) -> Callable[..., Callable[..., Any]]:
    """Registers a made-up analysis: `register("name", function, metrics=...)`."""
    from diagnostics.core.analysis import analysis

    def register_analysis(name: str, function: Callable[..., Any], **record: Any) -> Callable[..., Any]:
        about = {
            "question": f"What does {name} find?",
            "reading": "0 is nothing.",
            "paper": "made up",
            "cost": "none",
            "draw": lambda result: {},
        }
        return analysis(name, **{**about, **record})(function)

    return register_analysis


@pytest.fixture
def norms(register: Callable[..., Any]) -> list[dict[str, Any]]:
    """Registers `norms`, which reads every matrix of a pair; the parameters of each call are appended."""
    import pandas as pd

    from diagnostics.core.analysis import Result

    calls: list[dict[str, Any]] = []

    def norms(
        pair, *, scale: float = 1.0, parts: tuple[str, ...] = ("block",), device="cpu", dtype="float32",
        seed: int = 0, progress=None,
    ):  # fmt: skip
        calls.append({"scale": scale, "parts": parts, "device": device, "dtype": dtype, "seed": seed})
        rows = []
        for done, name in enumerate(pair.matrices):
            if progress:
                progress(done, len(pair.matrices), name)
            base, tuned = pair.read(name)
            rows.append({"matrix": name, "norm": scale * float((tuned - base).norm())})
        table = pd.DataFrame(rows)
        return Result(
            metrics={"norm": float(table["norm"].max()), "matrices": len(table)},
            tables={"matrices": table},
            notes=("nothing was dropped",),
        )

    def draw(result):
        import plotly.express as px

        figure = px.bar(result.tables["matrices"], x="matrix", y="norm", title="Norm of each delta")
        return {"norms": figure}

    register("norms", norms, draw=draw, metrics={"norm": "largest Frobenius norm", "matrices": "how many"})
    return calls
