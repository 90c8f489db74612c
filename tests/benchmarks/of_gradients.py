"""Contests about derivatives and routes: Hessians, tangent kernels, mask gradients, pathways."""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tests.benchmarks import inputs
from tests.benchmarks.contest import Agreement, Contest, apart, near

# Products with the Hessian: of each side for the ends of the spectrum, and for the trace.
STEPS, SIGNS = 20, 10
KERNEL_ROWS = 8


class Curvature(NamedTuple):
    """The eigenvalue of largest magnitude, and the trace with its standard error."""

    top: float
    trace: float
    error: float


# The Hessian of one block


def small_model(folder: Path, quick: bool) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    width, layers = (64, 2) if quick else (256, 4)
    LlamaForCausalLM(inputs.llama(width, layers, vocabulary=1024)).save_pretrained(folder / "base")
    rows = torch.randint(1024, (8 if quick else 16, 32), generator=torch.Generator().manual_seed(0))
    torch.save(rows, folder / "rows.pt")


def block_of(folder: Path) -> tuple[Any, torch.Tensor]:
    """A model whose first block alone requires gradients, and its rows; attention is differentiable twice."""
    model, rows = inputs.loaded(folder / "base"), torch.load(folder / "rows.pt", weights_only=True)
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    return model, rows


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean nats of a token after the first."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Logits(nn.Module):
    """A language model as a module from ids to logits."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def of_samples(top: float, samples: Sequence[float]) -> Curvature:
    values = np.asarray(samples, float)
    return Curvature(top, float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))


def pyhessian(folder: Path) -> Callable[[], Any]:
    from pyhessian import hessian

    model, rows = block_of(folder)

    def run() -> Curvature:
        torch.manual_seed(0)
        estimator = hessian(Logits(model), token_loss, data=(rows, rows), cuda=False)
        values, _ = estimator.eigenvalues(maxIter=STEPS, tol=0.0)
        # With a tolerance of 0 it would stop as soon as the running mean is negative.
        estimate = of_samples(values[0], estimator.trace(maxIter=SIGNS, tol=-math.inf))
        model.zero_grad(set_to_none=True)
        return estimate

    return run


def eigenthings(folder: Path) -> Callable[[], Any]:
    from hessian_eigenthings import HessianOperator, lanczos, trace

    model, rows = block_of(folder)

    def run() -> Curvature:
        operator = HessianOperator(
            Logits(model),
            [rows],
            lambda module, ids: token_loss(module(ids), ids),
            param_filter=lambda name, weight: weight.requires_grad,
        )
        values = lanczos(operator, k=1, max_iter=STEPS, seed=0).eigenvalues
        trace_estimate = trace(operator, num_matvecs=SIGNS, method="hutchinson", seed=0)
        return Curvature(float(values[0]), trace_estimate.estimate, trace_estimate.stderr)

    return run


def curvature(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.sharpness.curvature import HessianProduct, spectrum
    from diagnostics.evaluation.row_losses import EncodedTask
    from probes.models.perturb import PerturbedWeights
    from probes.text.batches import Example
    from probes.text.rows import task_of

    model, rows = block_of(folder)
    block = list(model.model.layers[0].parameters())
    model.requires_grad_(False)
    examples = [
        Example(ids=row, scored=[False] + [True] * (len(row) - 1), row=index)
        for index, row in enumerate(rows.tolist())
    ]
    encoded = EncodedTask(
        task=task_of(["x"] * len(rows)), examples=examples, classes=(), mask_id=None, batch_tokens=2**14,
        notes=(),
    )  # fmt: skip

    def run() -> Curvature:
        with PerturbedWeights(block, adaptive=False) as moved:
            twice = HessianProduct(model, encoded, tuple(range(len(rows))), moved)
            estimate = spectrum(
                twice.product, moved.zero, steps=STEPS, probes=SIGNS,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        return Curvature(max(estimate.top, estimate.bottom, key=abs), estimate.trace, estimate.trace_error)

    return run


def same_curvature(theirs: Curvature, ours: Curvature) -> Agreement:
    off = abs(theirs.top - ours.top) / abs(ours.top)
    error = 4 * (theirs.error**2 + ours.error**2) ** 0.5
    text = f"top eigenvalue {theirs.top:.4g} and {ours.top:.4g}"
    if off > 0.01:
        # Both are bounds from below: of a softmax regression, whose Hessian is known, the tests say so.
        right = "ours" if abs(ours.top) > abs(theirs.top) else "theirs"
        text += f" after {STEPS} products: {right} is nearer, since both approach it from below"
    text += f"; trace {theirs.trace:.4g} ± {theirs.error:.2g} and {ours.trace:.4g} ± {ours.error:.2g}"
    return Agreement(off < 0.2 and abs(theirs.trace - ours.trace) < error, text)


# The tangent kernel


def kernel_input(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 512, layers=2 if quick else 8)
    inputs.texts(folder / "rows.jsonl", KERNEL_ROWS)


def direction(size: int) -> torch.Tensor:
    """A random direction of logits."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / size**0.5


# Rows whose products are taken in float64 too, to see who is right.
EXACT = 2


class Kernel(NamedTuple):
    """Products of whole gradients, and those of the first rows summed in float64."""

    entries: list[list[float]]
    exact: list[list[float]]


def whole_gradients(folder: Path, rows: int) -> torch.Tensor:
    """The gradient of each row in all weights, one beside the other."""
    model = inputs.loaded(folder / "base")
    weights = list(model.parameters())
    output_direction = direction(model.config.vocab_size).to(weights[0].dtype)
    gradients = []
    for ids, mask in islice(inputs.batched(folder / "base", folder / "rows.jsonl", rows=1), rows):
        logits = model(input_ids=ids, attention_mask=mask).logits[0, :-1]
        by_weight = torch.autograd.grad((logits @ output_direction).mean(), weights)
        gradients.append(torch.cat([gradient.flatten() for gradient in by_weight]))
    return torch.stack(gradients)


def jacobian(folder: Path) -> Callable[[], Any]:
    """Every row's gradient in all weights, and their products."""
    J = whole_gradients(folder, EXACT).double()
    exact = (J @ J.T).tolist()

    def run() -> Kernel:
        J = whole_gradients(folder, KERNEL_ROWS)
        return Kernel((J @ J.T).tolist(), exact)

    return run


def kernel(folder: Path) -> Callable[[], Any]:
    from diagnostics.evaluation.row_losses import encoded
    from probes import open_checkpoint
    from probes.models.editable import Editable
    from probes.passes.tangent_kernel import tangent_kernel
    from probes.text.rows import read_task

    def run() -> list[list[float]]:
        editable = Editable(open_checkpoint(str(folder / "base")), device="cpu", dtype="float32")
        task = read_task(str(folder / "rows.jsonl"))
        encoded_task = encoded(editable, task, max_length=None, chat_template=False, batch_tokens=2**14)
        output_direction = direction(editable.model.config.vocab_size)
        return tangent_kernel(editable.model, encoded_task, range(KERNEL_ROWS), output_direction).tolist()

    return run


def same_kernel(theirs: Kernel, ours: list[list[float]]) -> Agreement:
    exact = np.ravel(theirs.exact).tolist()
    agreement = near(
        exact, np.array(ours)[:EXACT, :EXACT].ravel().tolist(), 1e-4, "entries summed in float64"
    )
    off = apart(np.ravel(theirs.entries).tolist(), np.ravel(ours).tolist())
    # Millions of products summed in float32.
    rounding_note = f"; theirs sums in float32 and is off by {off:.0e}: ours is right" if off > 1e-5 else ""
    return Agreement(agreement.same and off < 0.1, agreement.text + rounding_note)


# The gradient of a mask


def masked_pair(folder: Path, quick: bool) -> None:
    from tests.benchmarks.grafts import write_pair

    write_pair(folder, width=128 if quick else 768, layers=2 if quick else 12)


MASK_ROWS = 8


def whole_mask(folder: Path) -> Callable[[], Any]:
    """The paper's way: a mask entry for every weight of the blocks, differentiated through the model."""
    from torch.func import functional_call

    from tests.benchmarks.grafts import examples

    def run() -> dict[str, list[float]]:
        base, tuned = inputs.loaded(folder / "base"), inputs.loaded(folder / "tuned")
        weights = {name: value.detach() for name, value in base.named_parameters()}
        deltas = {
            name: value.detach() - weights[name]
            for name, value in tuned.named_parameters()
            if ".layers." in name
        }
        del tuned
        masks = {name: torch.zeros_like(delta).requires_grad_() for name, delta in deltas.items()}
        ids = torch.tensor([example.ids for example in examples(MASK_ROWS)])
        blended = {name: weights[name] + masks[name] * delta for name, delta in deltas.items()}
        logits = functional_call(base, weights | blended, (), {"input_ids": ids, "use_cache": False}).logits
        token_loss(logits, ids).backward()
        gradients = {}
        for name, mask in masks.items():
            assert mask.grad is not None
            gradients[name] = mask.grad.flatten()[:: max(1, mask.numel() // 50)].tolist()
        return gradients

    return run


def candidates(folder: Path) -> Callable[[], Any]:
    """The gradient at the 0.8 % of entries that moved furthest, and at any others that are asked for."""
    from diagnostics.analyses.skills.candidates import Candidates, GraftedModel
    from tests.benchmarks.grafts import CANDIDATES, objective, opened

    def run() -> dict[str, list[float]]:
        loss = objective(MASK_ROWS)
        with opened(folder, "cpu") as (two_sided, movement):

            def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
                return two_sided.read(name, "base"), two_sided.read(name)

            chosen = Candidates.of(movement.largest(round(CANDIDATES * movement.total)), read)
            with GraftedModel(two_sided, chosen) as graft:
                mask = torch.zeros(len(chosen), dtype=torch.bool)
                graft.gradient(mask, loss)
                asked = {
                    name: torch.arange(0, entries, max(1, entries // 50))
                    for name, entries in movement.entries.items()
                }
                gradients = graft.gradient_at(asked, read, mask, loss)
            parts = gradients.split([len(index) for index in asked.values()])
            return {name: part.tolist() for name, part in zip(asked, parts, strict=True)}

    return run


def same_gradient(theirs: dict[str, list[float]], ours: dict[str, list[float]]) -> Agreement:
    if set(theirs) != set(ours):
        return Agreement(False, f"tensors differ: {sorted(set(theirs) ^ set(ours))[0]}")
    expected = [value for name in sorted(theirs) for value in theirs[name]]
    actual = [value for name in sorted(theirs) for value in ours[name]]
    return near(expected, actual, 1e-4, "mask gradients")


# Pathways


def paths(folder: Path, quick: bool) -> None:
    from tests.benchmarks import pathways

    kept, pathways.PATHWAYS = pathways.PATHWAYS, 30 if quick else 150
    (folder / "words.txt").write_text("\n".join(pathways.random_pathways()), encoding="utf-8")
    pathways.PATHWAYS = kept


def plain_distances(folder: Path) -> Callable[[], Any]:
    from tests.benchmarks.pathways import plainly

    words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")
    return lambda: [plainly(word, other) for row, word in enumerate(words) for other in words[:row]]


def distances(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.pathways.pathway import distances as between

    words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")

    def run() -> list[int]:
        matrix = between(words)
        return matrix[np.tril_indices(len(words), k=-1)].tolist()

    return run


CONTESTS = [
    Contest(
        analysis="sharpness",
        what=f"Hessian of a block, {STEPS + SIGNS} products",
        peer="PyHessian",
        packages=("PyHessian",),
        make=small_model,
        theirs=pyhessian,
        ours=curvature,
        agree=same_curvature,
    ),
    Contest(
        analysis="sharpness",
        what=f"Hessian of a block, {STEPS + SIGNS} products",
        peer="hessian-eigenthings",
        packages=("hessian-eigenthings",),
        make=small_model,
        theirs=eigenthings,
        ours=curvature,
        agree=same_curvature,
    ),
    Contest(
        analysis="dynamics",
        what=f"tangent kernel of {KERNEL_ROWS} rows",
        peer="whole gradients, one beside the other",
        make=kernel_input,
        theirs=jacobian,
        ours=kernel,
        agree=same_kernel,
    ),
    Contest(
        analysis="skills",
        what="gradient of a mask",
        peer="the paper's mask over all weights",
        make=masked_pair,
        theirs=whole_mask,
        ours=candidates,
        agree=same_gradient,
        apart="ours twice, at its candidates and at the entries compared",
    ),
    Contest(
        analysis="pathways",
        what="edit distances of all pairs",
        peer="plain dynamic programme",
        make=paths,
        theirs=plain_distances,
        ours=distances,
        agree=lambda theirs, ours: Agreement(
            theirs == ours, f"{len(ours):,} distances, {'equal' if theirs == ours else 'not equal'}"
        ),
    ),
]
