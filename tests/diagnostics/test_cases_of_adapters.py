"""Adapters of real training runs: tied embeddings trained in ten ways, experts as three writers pack them.

The makers lie in `shared/cases` beside the repository, with what is right.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from diagnostics import essential_sparsity, interpolation_path
from diagnostics.edits.interpolate import interpolate
from diagnostics.edits.mitigate import mitigate
from probes import CheckpointPair
from probes.models.runnable import RunnablePair
from probes.models.two_sided import TwoSidedModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import PeftModel

MAKERS = Path(__file__).parents[3] / "shared" / "cases"
IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def run_maker(name: str, out: Path, *arguments: str) -> tuple[Path, str]:
    """Run a maker; its directory, and what it prints. Skips where the makers are not at hand."""
    script = MAKERS / f"{name}.py"
    if not script.is_file():
        pytest.skip(f"{script} IS NOT THERE, so its pairs were not made")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, script, out, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return out, run.stdout


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> tuple[Path, dict[str, tuple[float, float]]]:
    """The directory of the tied pairs, and PEFT's and transformers' losses of tuned and base by adapter."""
    out, printed = run_maker("tied_embeddings", tmp_path_factory.mktemp("tied"))
    losses = {}
    for line in printed.splitlines():
        name, *_, tuned, _, _, base = line.replace(",", "").split()
        losses[name] = float(tuned), float(base)
    return out, losses


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def written(directory: Path) -> torch.Tensor:
    """Logits of full weights, as transformers alone loads them."""
    return run(transformers.AutoModelForCausalLM.from_pretrained(directory).eval())


RUN = [
    "save-both", "save-embed", "save-head", "save-both-tying", "lora-head", "lora-embed", "tokens",
    "save-both-grown",
]  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_one_tuned_model_is_measured_and_written_which_is_the_one_that_was_trained(name, tied, tmp_path):
    directory, losses = tied
    task = directory / "task.jsonl"
    pair = CheckpointPair(directory / "base", directory / name)
    tuned_nats, base_nats = losses[name]
    path = interpolation_path(pair, task, alphas=(0.0, 0.5, 1.0))
    sparsity = essential_sparsity(pair, task, grid=(0.2, 0.5, 0.8), patterns=(), random=False)
    of_tuned = path.metrics["tuned_task_nats"], sparsity.metrics["value_tuned"]
    assert of_tuned == pytest.approx([tuned_nats] * 2, abs=1e-4)
    of_base = path.metrics["base_task_nats"], sparsity.metrics["value_base"]
    assert of_base == pytest.approx([base_nats] * 2, abs=1e-4)
    expected = torch.load(directory / name / "logits.pt")
    with RunnablePair(pair) as runnable:
        with runnable.tuned() as model:
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
        with runnable.base() as model:
            assert torch.equal(run(model), written(directory / "base"))
    interpolate(directory / "base", directory / name, 1.0, tmp_path / "end")
    mitigate(directory / "base", directory / name, tmp_path / "whole", scale=1.0, mode="update", full=True)
    for out in ("end", "whole"):
        torch.testing.assert_close(written(tmp_path / out), expected, rtol=1e-4, atol=1e-4)
    interpolate(directory / "base", directory / name, 0.0, tmp_path / "start")
    start = written(tmp_path / "start")[..., :64]
    torch.testing.assert_close(start, written(directory / "base"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["save-embed-grown", "tokens-grown"])
def test_a_head_that_was_not_saved_is_said_in_one_line(name, tied):
    directory, _ = tied
    with pytest.raises(ValueError, match=r"Resize the base as in training .*, save it and give that as base"):
        CheckpointPair(directory / "base", directory / name)


@pytest.mark.parametrize("inner", ["128", "96"])
def test_factors_of_experts_that_three_writers_pack_are_one_delta(inner, tmp_path):
    directory, _ = run_maker("expert_lora_packings", tmp_path, inner)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base")
    expected = run(PeftModel.from_pretrained(base, directory / "peft021").eval())
    first = CheckpointPair(directory / "base", directory / "peft021")
    touched = [name for name in first.matrices if first.tuned.touched(name)]
    assert sum("expert" in name for name in touched) == 2 * 4 * 2  # layers, experts, gate and up
    for name in ("peft021", "unsloth", "peft018"):
        pair = CheckpointPair(directory / "base", directory / name)
        for matrix in touched:
            ours, theirs = pair.delta(matrix), first.delta(matrix)
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(ours.dense(), theirs.dense())
        with RunnablePair(pair) as runnable, runnable.tuned() as model:
            torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
        with TwoSidedModel(pair) as two_sided:
            torch.testing.assert_close(run(two_sided.model), expected, rtol=1e-3, atol=1e-3)
