"""Masks: pruning a sparsity level against torch's own way, and what evaluating under masks costs."""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from probes.checkpoints.pair import CheckpointPair
from probes.checkpoints.prune import magnitude_order
from probes.models.two_sided import TwoSidedModel
from tests.benchmarks.contest import alone, started, status

WIDTH, DEPTH = 768, 12
LEVELS = [round(0.045 * level, 3) for level in range(1, 21)]
# torch's way takes seconds a level.
FEW = (0.1, 0.3, 0.5, 0.7, 0.9)


def write_pair(folder: Path, *, width: int, layers: int) -> None:
    """Two random Llamas of about 97 M parameters, 85 M of them in the scope."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, vocab_size=8192, max_position_embeddings=512,
    )  # fmt: skip
    for seed, side in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / side)


def tunescopes(folder: Path, levels: list[float]) -> tuple[list[float], dict[float, dict[str, Any]]]:
    """Seconds of every level, the search for all thresholds shared among them, and the masks."""
    pair = CheckpointPair(folder / "base", folder / "tuned")
    with TwoSidedModel(pair, device="cpu") as two_sided:
        resident(two_sided.model)
        reset_peak()
        order = magnitude_order(pair.tuned)
        begun = time.perf_counter()
        cuts = order.cuts(levels)
        shared = (time.perf_counter() - begun) / len(levels)
        times, masks = [], {}
        for cut in cuts:
            begun = time.perf_counter()
            two_sided.prune(order, cut, rising=True)
            times.append(shared + time.perf_counter() - begun)
            masks[cut.sparsity] = {
                name: two_sided.model.state_dict()[name] == 0 for name in list(order.shapes)[:7]
            }
        return times, masks


def torchs(folder: Path, levels: list[float]) -> tuple[list[float], dict[float, dict[str, Any]]]:
    """The same by `torch.nn.utils.prune.global_unstructured`, from the dense weights at every level."""
    from torch.nn.utils import prune
    from transformers import AutoModelForCausalLM

    names = list(magnitude_order(CheckpointPair(folder / "base", folder / "tuned").tuned).shapes)
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    times, masks = [], {}
    resident(model)
    reset_peak()
    for level in levels:
        begun = time.perf_counter()
        prune.global_unstructured(
            [(module, "weight") for module in modules.values()], prune.L1Unstructured, amount=level
        )
        times.append(time.perf_counter() - begun)
        masks[level] = {name: modules[name].weight_mask == 0 for name in names[:7]}
        for module in modules.values():  # back to the dense weights
            weight = module.weight_orig
            prune.remove(module, "weight")
            module.weight = weight
    return times, masks


def resident(model: torch.nn.Module) -> None:
    """Have all weights in memory: until they are touched they are only mapped from their file."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1)


def reset_peak() -> None:
    """Let the peak of this process's memory start from where it is."""
    started()


def weighed(way: str, folder: Path) -> float:
    """The most memory of a way beyond that from which it resets the peak, in bytes."""
    before = []

    def marked() -> None:
        before.append(started())

    globals()["reset_peak"] = marked  # of this process alone, which ends here
    globals()[way](folder, [0.5])
    return status("VmHWM") - before[0]


def peak(folder: Path, way: str) -> float:
    """Peak memory of pruning half of a model, in GB beyond the loaded model."""
    return float(alone(weighed, way, folder, threads=torch.get_num_threads())) / 1e9


def pruning(console: Console) -> None:
    """Seconds and memory of a level."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        write_pair(folder, width=WIDTH, layers=DEPTH)
        theirs, masks = torchs(folder, list(FEW))
        ours, our_masks = tunescopes(folder, sorted({*LEVELS, *FEW}))
        apart = sum(
            int((our_masks[level][tensor] != masks[level][tensor]).sum())
            for level in FEW
            for tensor in masks[level]
        )
        memory = {way: peak(folder, way) for way in ("torchs", "tunescopes")}
    table = Table(title="Global magnitude pruning of 85 M weights, float32, evaluation excluded")
    for column in ("", "levels", "seconds a level", "ratio", "extra peak memory, GB", "share"):
        table.add_column(column, justify="right" if column else "left")
    per = [sum(times) / len(times) for times in (theirs, ours)]
    table.add_row(
        "torch.nn.utils.prune", f"{len(theirs)}", f"{per[0]:.2f}", "", f"{memory['torchs']:.2f}", ""
    )
    table.add_row(
        "tunescope", f"{len(ours)}", f"{per[1]:.3f}", f"{per[0] / per[1]:.0f} × (target 10)",
        f"{memory['tunescopes']:.3f}", f"{memory['tunescopes'] / memory['torchs']:.3f} (limit 0.25)",
    )  # fmt: skip
    console.print(table)
    console.print(f"Entries that differ between the two, in 7 tensors at {len(FEW)} levels: {apart}")


def curve(console: Console) -> None:
    """How much of a curve of 20 levels is evaluation."""
    from diagnostics.analyses.sparsity.analysis import essential_sparsity
    from diagnostics.evaluation.row_losses import EncodedTask

    spent: list[float] = []
    measure = EncodedTask.measure

    def timed(self: EncodedTask, model: Any) -> Any:
        begun = time.perf_counter()
        result = measure(self, model)
        spent.append(time.perf_counter() - begun)
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, width=WIDTH, layers=DEPTH)
        words(folder, 8192)
        draw = np.random.default_rng(0)
        rows = [" ".join(f"w{word}" for word in draw.integers(0, 8000, 24)) for _ in range(100)]
        pair = CheckpointPair(folder / "base", folder / "tuned")
        try:
            EncodedTask.measure = timed  # type: ignore[method-assign]
            begun = time.perf_counter()
            result = essential_sparsity(
                pair, rows, grid=(0.0, *LEVELS), refine=0, patterns=(), random=False, draws=1000
            )
            total = time.perf_counter() - begun
        finally:
            EncodedTask.measure = measure  # type: ignore[method-assign]
    console.print(
        f"A curve of 20 levels of base and of tuned, 97 M parameters, 100 rows of 24 tokens: {total:.0f} s, "
        f"{len(spent)} evaluations of them {sum(spent):.0f} s: {sum(spent) / total:.1%} (at least 90 %)"
    )
    assert result.metrics["evaluations"] == len(spent)


def words(folder: Path, size: int) -> None:
    """A tokenizer of whole words beside both models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({f"w{word}": word for word in range(size)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for side in ("base", "tuned"):
        PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0").save_pretrained(folder / side)


def main() -> None:
    console = Console(width=150)
    for run in (pruning, curve):
        run(console)
