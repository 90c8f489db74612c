"""What running models costs: scoring rows, capturing activations, measuring detection."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diagnostics.numerics import detection_metrics
from probes.checkpoints.pair import CheckpointPair
from probes.models.body import evaluating, run
from probes.models.runnable import RunnablePair
from probes.passes.activations import capture, pooled
from probes.passes.scores import score_examples
from probes.text.batches import Example, batches
from tests.benchmarks.contest import alone, started, status

VOCABULARY = 8192
TOKENS = 4096
SIZES = ((128, 4), (512, 8))
ROWS, CAPTURED, DETECTED = 200, (200, 2000), 10**6
# Width and layers of the models whose memory is measured, and that are captured.
HEAVY, WATCHED = (1024, 12), (512, 8)
RESIDUALS = ["hook_resid_pre", "hook_resid_post"]


def write_pair(
    folder: Path, *, width: int, layers: int, vocabulary: int = VOCABULARY, rank: int = 16
) -> None:
    """A random Llama at `folder/base` and an adapter on all of its linear layers at `folder/tuned`."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, lora).save_pretrained(folder / "tuned")


# What is in the rows -> the medians of their lengths in tokens, in turns.
KINDS = {"commands": (10,), "commands and paragraphs": (10, 55), "paragraphs": (55,)}


def examples(rows: int, kind: str = "commands and paragraphs") -> list[Example]:
    """Rows of random tokens, their lengths log-normal about the medians."""
    draw = np.random.default_rng(0)
    medians = np.resize(KINDS[kind], rows)
    lengths = (medians * draw.lognormal(0, 0.5, rows)).clip(4, 512).astype(int)
    return [
        Example(
            ids=draw.integers(0, VOCABULARY, length).tolist(),
            scored=[False, *[True] * (length - 1)],
            row=i,
        )
        for i, length in enumerate(lengths.tolist())
    ]


def reference(base: torch.nn.Module, tuned: torch.nn.Module, rows: list[Example]) -> list[float]:
    """The reference way: two resident models, one row at a time, log-softmax over the whole vocabulary."""
    ratios = []
    with torch.no_grad():
        for row in rows:
            ids, scored = torch.tensor([row.ids]), torch.tensor(row.scored[1:])
            sums = []
            for model in (base, tuned):
                logs = model(ids).logits.float().log_softmax(dim=-1)
                chosen = logs[0, :-1].gather(1, ids[0, 1:, None])[scored]
                sums.append(float(chosen.double().sum()))
            ratios.append(sums[0] - sums[1])
    return ratios


def bundled() -> tuple[CheckpointPair, list[Example]]:
    """The bundled adapter and all the rows that come with it, 4 to 500 tokens long."""
    from diagnostics.audit.demo import BUNDLED
    from probes.text.encode import encode
    from probes.text.rows import read_task

    pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
    with RunnablePair(pair) as runnable:
        rows = [
            replace(example, row=0)
            for file in sorted(BUNDLED.glob("*.jsonl"))
            for example in encode(read_task(file), runnable.tokenizer, max_length=runnable.context)
        ]
    return pair, rows


def two_models(folder: Path, tuned: str = "tuned") -> tuple[Any, Any]:
    """Base and tuned, both resident."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, under = (AutoModelForCausalLM.from_pretrained(folder / "base").eval() for _ in range(2))
    return base, PeftModel.from_pretrained(under, folder / tuned).eval()


def ours(runnable: RunnablePair, rows: list[Example]) -> list[float]:
    """Log-likelihood of the base minus that of tuned."""
    with runnable.base() as model:
        base = score_examples(model, rows).log_likelihoods
    with runnable.tuned() as model:
        return (base - score_examples(model, rows).log_likelihoods).tolist()


def scoring(console: Console) -> None:
    """Scored tokens a second, base and tuned together."""
    table = Table(title=f"Likelihood ratios of {ROWS} rows, adapter of rank 16, float32")
    columns = (
        "model",
        "rows",
        "one at a time, tokens/s",
        "tunescope, tokens/s",
        "ratio",
        "largest difference",
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right")
    for width, layers in SIZES:
        with tempfile.TemporaryDirectory() as name:
            write_pair(Path(name), width=width, layers=layers)
            models = two_models(Path(name))
            with RunnablePair(CheckpointPair(Path(name) / "base", Path(name) / "tuned")) as runnable:
                for kind in KINDS:
                    rows = examples(ROWS, kind)
                    tokens = sum(sum(row.scored) for row in rows)
                    ways = partial(reference, *models), partial(ours, runnable)
                    for way in ways:
                        way(rows[:8])
                    seconds, results = fastest(*(partial(way, rows) for way in ways))
                    apart = max(abs(a - b) for a, b in zip(*results, strict=True))
                    table.add_row(
                        f"width {width}, {layers} layers",
                        kind,
                        *(f"{tokens / elapsed:,.0f}" for elapsed in seconds),
                        f"{seconds[0] / seconds[1]:.1f} ×",
                        f"{apart:.1e} nats",
                    )
    pair, rows = bundled()
    rows = rows[: 10 * ROWS]
    models, tokens = two_models(Path(pair.base.ref).parent, "lora-r8"), sum(sum(row.scored) for row in rows)
    with RunnablePair(pair, dtype="float32") as runnable:
        float_models = [model.float() for model in models]
        seconds, results = fastest(partial(reference, *float_models, rows), partial(ours, runnable, rows))
    apart = max(abs(a - b) for a, b in zip(*results, strict=True))
    per_second = (f"{tokens / elapsed:,.0f}" for elapsed in seconds)
    ratio = f"{seconds[0] / seconds[1]:.1f} ×"
    about = "bundled, width 128, 4 layers", f"its own {len(rows):,}"
    table.add_row(*about, *per_second, ratio, f"{apart:.1e} nats")
    console.print(table)


def fastest(*runs: Callable[[], Any], repeats: int = 3) -> tuple[list[float], list[Any]]:
    """The least seconds of each of several runs, in turns, and their results."""
    times: list[list[float]] = [[] for _ in runs]
    results: list[Any] = [None] * len(runs)
    for _ in range(repeats):
        for index, call in enumerate(runs):
            begun = time.perf_counter()
            results[index] = call()
            times[index].append(time.perf_counter() - begun)
    return [min(seconds) for seconds in times], results


def weighed(way: str, folder: Path, count: int) -> float:
    """The most memory of scoring or capturing beyond that of the imported libraries, in bytes."""
    some, before = examples(count), started()
    if way == "two models":
        reference(*two_models(folder), some)
    else:
        with RunnablePair(CheckpointPair(folder / "base", folder / "tuned")) as runnable:
            ours(runnable, some) if way == "one model" else captured(runnable, some)
    return status("VmHWM") - before


def peak(folder: Path, way: str, count: int) -> float:
    """The same of a process of its own, in GB."""
    return float(alone(weighed, way, folder, count, threads=torch.get_num_threads())) / 1e9


def captured(runnable: RunnablePair, rows: list[Example]) -> None:
    """Stream the residuals of every layer, pooled over each row's tokens as `drift` takes them."""
    with runnable.base() as model, capture(model, RESIDUALS, keep=pooled) as activations:
        for _ in activations.stream(batches(rows, tokens=TOKENS, pad_id=0)):
            pass


def memory(console: Console) -> None:
    """Peak memory of scoring with an adapter, and of capturing more and more rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, width=HEAVY[0], layers=HEAVY[1])
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
        both, single = peak(folder, "two models", 40), peak(folder, "one model", 40)
        console.print(
            f"Peak memory of scoring, base and adapter of {size:.2f} GB: two resident models {both:.2f} GB, "
            f"tunescope {single:.2f} GB: {single / both:.2f} × (limit 0.6)"
        )
    with tempfile.TemporaryDirectory() as name:
        write_pair(Path(name), width=HEAVY[0] // 4, layers=HEAVY[1] // 2)
        few, many = (peak(Path(name), "capture", count) for count in CAPTURED)
        console.print(
            f"Peak memory of capturing residuals: {few:.2f} GB for {CAPTURED[0]} rows, {many:.2f} for "
            f"{CAPTURED[1]}"
        )


def capturing(console: Console) -> None:
    """What capturing the residuals of every layer costs."""
    rows = examples(ROWS // 2)
    with tempfile.TemporaryDirectory() as name:
        write_pair(Path(name), width=WATCHED[0], layers=WATCHED[1])
        pair = CheckpointPair(Path(name) / "base", Path(name) / "tuned")
        padded_batches = list(batches(rows, tokens=TOKENS, pad_id=0))
        with RunnablePair(pair) as runnable, runnable.base() as model:

            def plain() -> None:
                with evaluating(model):
                    for batch in padded_batches:
                        run(model, batch)

            with capture(model, RESIDUALS, keep=pooled) as activations:

                def hooked() -> None:
                    for _ in activations.stream(padded_batches):
                        pass

                seconds, _ = fastest(plain, hooked, repeats=5)
    console.print(
        f"Residuals of all {WATCHED[1]} layers of width {WATCHED[0]} by the {activations.route}: "
        f"{seconds[1]:.2f} s, the plain forward {seconds[0]:.2f} s: "
        f"{seconds[1] / seconds[0]:.2f} × (limit 1.3)"
    )


def detection(console: Console) -> None:
    """AUROC, average precision and false alarms of two million scores, a tenth of them ties."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    draw = np.random.default_rng(0)
    outside, inside = draw.normal(1, 1, DETECTED), draw.normal(0, 1, DETECTED)
    for scores in (outside, inside):
        scores[::10] = scores[::10].round(1)
    values, labels = np.concatenate([inside, outside]), np.repeat([0, 1], DETECTED)
    runs: dict[str, Callable[[], Any]] = {
        "tunescope": lambda: detection_metrics.detection(inside, outside),
        "scikit-learn": lambda: (roc_auc_score(labels, values), average_precision_score(labels, values)),
    }
    if importlib.util.find_spec("pytorch_ood") is not None:
        from tests.benchmarks.of_rows import pytorch_ood_metrics

        OODMetrics = pytorch_ood_metrics()

        def theirs() -> Any:
            metrics = OODMetrics()
            # A negative label is out of distribution to it.
            metrics.update(torch.from_numpy(values), torch.from_numpy(1 - 2 * labels))
            return metrics.compute()

        runs["pytorch-ood"] = theirs
    else:
        console.print("pytorch-ood is not installed, and left out: make bench installs it")
    times, results = fastest(*runs.values())
    outcomes = dict(zip(runs, zip(times, results, strict=True), strict=True))
    table = Table(title=f"Detection metrics of {2 * DETECTED:,} scores")
    for column in ("", "seconds", "over tunescope's", "AUROC"):
        table.add_column(column, justify="right" if column else "left")
    for name, (seconds, result) in outcomes.items():
        area = {"tunescope": "auroc", "pytorch-ood": "AUROC"}.get(name, 0)
        table.add_row(name, f"{seconds:.2f}", f"{seconds / times[0]:.1f} ×", f"{float(result[area]):.13f}")
    console.print(table)


def main() -> None:
    console = Console(width=150)
    scoring(console)
    memory(console)
    capturing(console)
    detection(console)
