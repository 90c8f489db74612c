"""Grafts: what a step of the mask search costs beyond a plain forward and backward pass of the same model."""

import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from diagnostics.analyses.skills.candidates import Candidates, GraftedModel
from diagnostics.analyses.skills.mask_search import budget_search
from diagnostics.analyses.skills.movement import Movement
from diagnostics.analyses.skills.search import PER_ENTRY
from diagnostics.evaluation.row_losses import EncodedTask
from probes.checkpoints.pair import CheckpointPair
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective
from probes.text.batches import Example
from probes.text.rows import task_of
from tests.benchmarks.contest import alone

LENGTH, STEPS = 32, 3
# Rows of a step that is timed, and of one whose memory is measured: few, or activations would hide the rest.
TIMED, WEIGHED = 32, 1
SHARE = 1e-4  # the paper's budget
CANDIDATES = PER_ENTRY * SHARE  # as the analysis takes


def write_pair(folder: Path, *, width: int = 768, layers: int = 12) -> None:
    """A random Llama of about 97 M parameters, and one that has moved from it a little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, vocab_size=8192, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")


def examples(rows: int) -> list[Example]:
    """Texts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            ids=torch.randint(8192, (LENGTH,), generator=generator).tolist(),
            scored=[position > 0 for position in range(LENGTH)],
            row=row,
        )
        for row in range(rows)
    ]


def objective(rows: int) -> Objective:
    """Their loss."""
    task = task_of([{"text": "a"}] * rows)
    return Objective(
        EncodedTask(
            task=task, examples=examples(rows), classes=(), mask_id=None, batch_tokens=16384, notes=()
        )
    )


class Peak:
    """The most memory in use while it is entered, beyond what was in use before, in bytes."""

    def __init__(self, device: str):
        self.device, self.bytes = device, 0

    def used(self) -> int:
        """Memory of this process, without what is only mapped from files."""
        if self.device != "cpu":
            return torch.cuda.memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    def watch(self) -> None:
        """Look again and again."""
        while not self._done.wait(0.002):
            self.most = max(self.most, self.used())

    def __enter__(self) -> "Peak":
        self.most = self.before = self.used()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self.watch)
        if self.device == "cpu":
            self._thread.start()
        else:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cpu":
            self._done.set()
            self._thread.join()
        else:
            self.most = torch.cuda.max_memory_allocated()
        self.bytes = self.most - self.before


@contextmanager
def opened(folder: Path, device: str) -> Iterator[tuple[TwoSidedModel, Movement]]:
    """The pair as base, and how far its blocks moved."""
    with TwoSidedModel(CheckpointPair(folder / "base", folder / "tuned"), device=device) as two_sided:
        two_sided.become("base")
        with torch.no_grad():  # until they are touched they are only mapped from their file
            for parameter in two_sided.model.parameters():
                parameter.mul_(1)
        shapes = {name: two_sided.headers[name].shape for name in two_sided.in_both if ".layers." in name}
        yield two_sided, Movement(shapes, lambda name: (two_sided.read(name, "base"), two_sided.read(name)))


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def plain(folder: Path, device: str, rows: int) -> tuple[float, int]:
    """Seconds of a forward and backward pass that gives the gradient of every weight of the blocks.

    Each gradient is freed at once, so that the memory is that of the activations and the largest gradient.
    """
    loss = objective(rows)
    with opened(folder, device) as (two_sided, movement):
        weights = [two_sided.editable.slots(name, torch.arange(1))[0].tensor for name in movement.entries]

        def free(weight: torch.Tensor) -> None:
            weight.grad = None

        for weight in weights:
            weight.requires_grad_(True)
        handles = [weight.register_post_accumulate_grad_hook(free) for weight in weights]
        with Peak(device) as peak:
            times = [timed(lambda: loss.backward(two_sided.model), device) for _ in range(STEPS + 1)]
        for handle in handles:
            handle.remove()
        return median(times[1:]), peak.bytes


def search(folder: Path, device: str, rows: int) -> tuple[float, int]:
    """Seconds of a step of the search: the mask written, its gradient, the scores moved, the next mask."""
    loss = objective(rows)
    with opened(folder, device) as (two_sided, movement):
        size = round(SHARE * movement.total)
        marks = []

        def mark(done: int, total: int) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        with Peak(device) as peak:
            candidates = Candidates.of(
                movement.largest(round(CANDIDATES * movement.total)),
                lambda name: (two_sided.read(name, "base"), two_sided.read(name)),
            )
            with GraftedModel(two_sided, candidates) as graft:
                budget_search(
                    lambda mask: graft.gradient(mask, loss), candidates.movement(), [size] * (STEPS + 1),
                    candidates.movement, step=mark,
                )  # fmt: skip
        return median(after - before for before, after in pairwise(marks)), peak.bytes


def in_turn(
    folder: Path, way: Callable[[Path, str, int], tuple[float, int]], device: str
) -> tuple[float, int]:
    """Seconds of a way with many rows and its memory with few, each in a process of its own."""
    seconds, _ = alone(way, folder, device, TIMED, threads=torch.get_num_threads())
    _, size = alone(way, folder, device, WEIGHED, threads=torch.get_num_threads())
    return seconds, size


def main(device: str = "", **shape: int) -> None:
    """Time and memory of a step."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        write_pair(folder, **shape)
        model = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        costs = {way.__name__: in_turn(folder, way, device) for way in (plain, search)}
    table = Table(
        title=f"A step of the mask search on {device}: {TIMED} rows of {LENGTH} tokens, "
        f"{model / 4e6:.0f} M weights in float32, {CANDIDATES:g} of them candidates"
    )
    for index, column in enumerate(("way", "seconds a step", "GB beyond the model")):
        table.add_column(column, justify="left" if index == 0 else "right")
    for way, (seconds, size) in costs.items():
        table.add_row(way, f"{seconds:.3f}", f"{size / 1e9:.3f}")
    times = costs["search"][0] / costs["plain"][0]
    extra = (costs["search"][1] - costs["plain"][1]) / model
    table.add_row("ratio, extra of the model", f"{times:.2f}", f"{extra:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:2], **{key: int(value) for key, _, value in (a.partition("=") for a in sys.argv[2:])})
