"""What the documentation states of the bundled models and files, measured again and looked up in its text."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# The other figures of the README: times and ratios are of a machine, printed by `decision` and told in
# RESULTS.md; what its papers found is theirs.
ROOT = Path(__file__).parents[2]
DRAWS = 50
# Whether the passes of `sparsity` and `skills` are counted, which runs them; of how many rows. Of fewer it
# is not sure that tuned gains on them, and no skill is searched for.
PASSES, FEW = True, 160


def intruders() -> Iterator[tuple[str, str]]:
    """The audit that the README shows."""
    from diagnostics import intruder_dimensions
    from diagnostics.audit.demo import BUNDLED
    from probes import CheckpointPair

    result = intruder_dimensions(CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8"))
    yield "README.md", f"intruders_per_matrix is {result.metrics['intruders_per_matrix']:.4g}"
    yield "README.md", result.summary()


def models() -> Iterator[tuple[str, str]]:
    """The table of the bundled models in their README."""
    from diagnostics import intruder_dimensions
    from diagnostics.audit.demo import BUNDLED, tuned_models
    from probes import CheckpointPair, open_checkpoint

    base = BUNDLED / "base"
    yield "diagnostics/bundled/README.md", f"a Llama of {open_checkpoint(str(base)).parameters:,} weights"
    scored = scores(base)
    right, nats = scored.pop("task")
    others = " | ".join(f"{loss:.2f}" for _, loss in scored.values())
    yield "diagnostics/bundled/README.md", f"| {right:.3f} | {nats:.3f} | {others} |"
    for model in tuned_models():
        scored = scores(model)
        metrics = intruder_dimensions(CheckpointPair(BUNDLED / "base", model)).metrics
        count, (right, nats) = metrics["intruders"], scored.pop("task")
        others = " | ".join(f"{loss:.2f}" for _, loss in scored.values())
        yield "diagnostics/bundled/README.md", f"| {right:.3f} | {nats:.3f} | {others} | {count} |"


def scores(model: Path) -> dict[str, tuple[float, float]]:
    """Accuracy and nats a unit on the bundled files, as a user's float32 model gives them."""
    from diagnostics.audit.demo import BUNDLED
    from diagnostics.evaluation.row_losses import encoded
    from diagnostics.evaluation.unit_scores import unit_scores
    from probes import open_checkpoint
    from probes.models.editable import Editable
    from probes.text.rows import read_task

    results = {}
    base = None if model.name == "base" else str(BUNDLED / "base")
    checkpoint = open_checkpoint(str(model), base=base)
    editable = Editable(checkpoint, device="cpu", dtype="float32")
    for name in ("task", "keep", "ood-code", "ood-words"):
        task = read_task(str(BUNDLED / f"{name}.jsonl"))
        encoded_task = encoded(editable, task, max_length=None, chat_template=False, batch_tokens=16384)
        units = unit_scores(encoded_task, editable.model)
        results[name] = units.accuracy, units.loss
    return results


def detection() -> Iterator[tuple[str, str]]:
    """How the ratio tells random words from the task's rows."""
    from diagnostics import likelihood_ratio_ood
    from diagnostics.audit.demo import BUNDLED, tuned_models
    from probes import CheckpointPair

    metrics: list[Any] = []
    for model in tuned_models():
        pair = CheckpointPair(BUNDLED / "base", model)
        files = (str(BUNDLED / f"{name}.jsonl") for name in ("task", "ood-words"))
        metrics.append(likelihood_ratio_ood(pair, *files, draws=DRAWS, examples=0).metrics)
    least = math.floor(1000 * min(row["auroc"] for row in metrics)) / 1000
    tuned = [row["auroc_tuned_likelihood"] for row in metrics]
    yield "diagnostics/bundled/README.md", f"AUROC of {least:.3f} or more"
    yield (
        "diagnostics/bundled/README.md",
        f"with {min(tuned):.2f} to {max(tuned):.2f}, the length alone with {metrics[0]['auroc_length']:.2f}",
    )


def passes() -> Iterator[tuple[str, str]]:
    """How often `sparsity` passes over the rows, and `skills` takes a gradient; few rows give the same."""
    from diagnostics import essential_sparsity, skill_localization
    from diagnostics.audit.demo import BUNDLED
    from probes import CheckpointPair

    if not PASSES:
        return
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "task.jsonl"
        lines = (BUNDLED / "task.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:FEW]), encoding="utf-8")
        pair = CheckpointPair(BUNDLED / "base", BUNDLED / "lora-r8")
        count = essential_sparsity(pair, str(file), draws=100).metrics["evaluations"]
        gradients = skill_localization(pair, str(file), draws=100).metrics["gradients"]
    yield "docs/analyses/sparsity.md", f"`sparsity` passes over the rows about {round(count, -1)} times"
    yield "docs/analyses/skills.md", f"`skills` takes some {round(gradients, -2)} gradients"


def mask() -> Iterator[tuple[str, str]]:
    """A mask's file."""
    from probes.checkpoints.mask_file import Patch

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "mask.safetensors"
        patch = Patch(index={"w": torch.arange(8505)}, values={"w": torch.rand(8505)}, base="b", tuned="t")
        patch.save(file)
        size = round(file.stat().st_size, -4)
    yield "docs/repair.md", f"A mask of 8,505 entries is a file of {size / 1000:.0f} kB"


def main() -> None:
    """Print every figure beside whether it is stated.

    Raises:
        SystemExit: one is not what the text says.
    """
    table = Table(title="Figures of the README, measured again")
    for column in ("where", "measured", "stated"):
        table.add_column(column, overflow="fold")
    differ = 0
    for figures in (intruders, models, detection, passes, mask):
        for where, text in figures():
            page = " ".join((ROOT / where).read_text(encoding="utf-8").split())
            same = text in page
            differ += not same
            table.add_row(where, text, "yes" if same else "NO")
    Console(width=150).print(table)
    if differ:
        raise SystemExit(f"{differ} figures are not what the text says")


if __name__ == "__main__":
    main()
