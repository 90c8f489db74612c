"""Contests about models run on rows: likelihood ratios, detection, drift, paths, mitigation, trajectories.

What a user would run instead is a padded batch of 16 rows at a time, in the file's order.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tests.benchmarks import inputs
from tests.benchmarks.contest import Agreement, Contest, near

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.5, 0.8)


# Likelihood ratios


def adapted(folder: Path, quick: bool) -> None:
    from tests.benchmarks.rows import write_pair

    write_pair(folder, width=128 if quick else 512, layers=2 if quick else 8)
    inputs.words(folder / "base")
    inputs.texts(folder / "rows.jsonl", 32 if quick else 200)


def two_models(folder: Path) -> Callable[[], Any]:
    """Base and tuned, both resident, log-softmax over the whole vocabulary."""
    from tests.benchmarks.rows import two_models as both

    def run() -> list[float]:
        base, tuned = both(folder)
        padded_batches = inputs.batched(folder / "base", folder / "rows.jsonl")
        sums = [np.array(inputs.log_likelihoods(model, padded_batches)[0]) for model in (base, tuned)]
        return (sums[0] - sums[1]).tolist()

    return run


def ratios(folder: Path) -> Callable[[], Any]:
    from probes.checkpoints.pair import CheckpointPair
    from probes.models.runnable import RunnablePair
    from probes.text.encode import encode
    from probes.text.rows import read_task
    from tests.benchmarks.rows import ours

    def run() -> list[float]:
        with RunnablePair(CheckpointPair(folder / "base", folder / "tuned"), dtype="float32") as runnable:
            task = read_task(str(folder / "rows.jsonl"))
            return ours(runnable, encode(task, runnable.tokenizer, max_length=runnable.context))

    return run


# Detection metrics


def scores_of(folder: Path, quick: bool) -> None:
    draw, size = np.random.default_rng(0), 10**4 if quick else 10**6
    both = {"outside": draw.normal(1, 1, size), "inside": draw.normal(0, 1, size)}
    for name, values in both.items():
        values[::10] = values[::10].round(1)  # a tenth of them ties
        np.save(folder / f"{name}.npy", values)


def pytorch_ood_metrics() -> Any:
    """pytorch-ood's metrics alone: the rest imports torchvision, which few builds of torch have."""
    spec = importlib.util.find_spec("pytorch_ood")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = ModuleType("pytorch_ood")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["pytorch_ood"] = package
    return importlib.import_module("pytorch_ood.metrics").OODMetrics


def pytorch_ood(folder: Path) -> Callable[[], Any]:
    metrics = pytorch_ood_metrics()
    inside, outside = (np.load(folder / f"{name}.npy") for name in ("inside", "outside"))

    def run() -> dict[str, float]:
        values = torch.from_numpy(np.concatenate([inside, outside]))
        # A negative label is out of distribution to it.
        labels = torch.cat([torch.ones(len(inside)), -torch.ones(len(outside))])
        return dict(metrics().update(values, labels).compute())

    return run


def detection(folder: Path) -> Callable[[], Any]:
    from diagnostics.numerics.detection_metrics import detection as detect

    inside, outside = (np.load(folder / f"{name}.npy") for name in ("inside", "outside"))
    return lambda: detect(inside, outside)


def same_metrics(theirs: dict[str, float], ours: dict[str, float]) -> Agreement:
    names = {"AUROC": "auroc", "AUPR-OUT": "aupr_ood", "AUPR-IN": "aupr_id", "FPR95TPR": "fpr95"}
    apart = {mine: abs(theirs[name] - ours[mine]) for name, mine in names.items()}
    text = ", ".join(f"{name} {ours[name]:.6f} within {value:.0e}" for name, value in apart.items())
    # Where scores are tied the two differ: a constant score, whose AUPR is the prevalence and whose FPR95
    # is 0.95, is the closed-form case of the tests.
    ties_note = "; of ties ours is right, by the constant score" if max(apart.values()) > 1e-9 else ""
    return Agreement(apart["auroc"] < 1e-9 and max(apart.values()) < 1e-2, text + ties_note)


# Drift


def moved_rows(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 512, layers=2 if quick else 8)
    inputs.texts(folder / "rows.jsonl", 32 if quick else 200)


def hidden_states(folder: Path) -> Callable[[], Any]:
    """Telly's way with `output_hidden_states`: means over tokens, cosines of rows, their correlation."""

    def run() -> list[float]:
        padded_batches = inputs.batched(folder / "base", folder / "rows.jsonl")
        means = []
        for side in ("base", "tuned"):
            model, pooled = inputs.loaded(folder / side), []
            with torch.no_grad():
                for ids, mask in padded_batches:
                    states = model(
                        input_ids=ids, attention_mask=mask, output_hidden_states=True
                    ).hidden_states
                    kept = mask.clone()
                    kept[:, 0] = 0
                    share = (kept / kept.sum(1, keepdim=True))[..., None]
                    pooled.append([(state * share).sum(1) for state in states])
            means.append([torch.cat(layer).double().numpy() for layer in zip(*pooled, strict=True)])
        above = np.triu_indices(len(means[0][0]), k=1)
        similar = []
        for X, Y in zip(*means, strict=True):
            cosines = []
            for points in (X, Y):
                unit = points / np.linalg.norm(points, axis=1, keepdims=True)
                cosines.append((unit @ unit.T)[above])
            similar.append(float(np.corrcoef(*cosines)[0, 1]))
        return similar

    return run


def drift(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.drift.analysis import representation_drift
    from probes import CheckpointPair

    def run() -> list[float]:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        return representation_drift(pair, str(folder / "rows.jsonl")).tables["layers"]["rsa"].tolist()

    return run


def same_similarity(theirs: list[float], ours: list[float]) -> Agreement:
    agreement = near(theirs[:-1], ours[:-1], 1e-4, "RSA at all layers but the last")
    # The last hidden state of transformers is behind the final norm, and is no residual stream.
    text = f"; at the last, theirs is behind the final norm: {theirs[-1]:.4f}, ours {ours[-1]:.4f}"
    return Agreement(agreement.same, agreement.text + text)


# A path


def state_dicts(folder: Path) -> Callable[[], Any]:
    """WiSE-FT's way: both state dicts, and a model that each blend of them is loaded into."""

    def run() -> list[float]:
        padded_batches = inputs.batched(folder / "base", folder / "rows.jsonl")
        model = inputs.loaded(folder / "base")
        base = {name: value.clone() for name, value in model.state_dict().items()}
        tuned = inputs.loaded(folder / "tuned").state_dict()
        losses = []
        for alpha in ALPHAS:
            model.load_state_dict({name: (1 - alpha) * base[name] + alpha * tuned[name] for name in base})
            sums, tokens, _ = inputs.log_likelihoods(model, padded_batches)
            losses.append(-sum(sums) / tokens)
        return losses

    return run


def path(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.path.analysis import interpolation_path
    from probes import CheckpointPair

    def run() -> list[float]:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        table = interpolation_path(pair, str(folder / "rows.jsonl"), alphas=ALPHAS).tables["path"]
        return table.loc[table["metric"] == "loss"].sort_values("alpha")["value"].tolist()

    return run


# Mitigation, judged


def spectral_rows(folder: Path, quick: bool) -> None:
    inputs.spectral_pair(folder, width=128 if quick else 512, layers=1 if quick else 4)
    for side in ("base", "tuned"):
        inputs.words(folder / side, size=512)
    for name, seed in (("task", 1), ("keep", 2)):
        inputs.texts(folder / f"{name}.jsonl", 16 if quick else 100, seed=seed, vocabulary=512)


def edited(folder: Path) -> Callable[[], Any]:
    """The paper's way: decompose each matrix once, write each edit into a model, run it."""

    def run() -> dict[str, float]:
        batches = {
            name: inputs.batched(folder / "base", folder / f"{name}.jsonl") for name in ("task", "keep")
        }
        base, model = inputs.loaded(folder / "base"), inputs.loaded(folder / "tuned")
        old = dict(base.named_parameters())
        tuned = {name: value.detach().clone() for name, value in model.named_parameters()}
        first = {}
        with torch.no_grad():
            for name, W in tuned.items():
                if W.ndim == 2 and ".layers." in name:
                    U0 = torch.linalg.svd(old[name], full_matrices=False).U
                    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
                    new = ((U0.mT @ U[:, :10]).abs().amax(0) < 0.5).nonzero()[:, 0]
                    if len(new):
                        at = int(new[0])
                        first[name] = S[at] * torch.outer(U[:, at], Vh[at])
            losses = {}
            for mode in ("top", "update"):
                for scale in SCALES:
                    for name, weight in model.named_parameters():
                        if mode == "update":
                            weight.copy_(old[name] + scale * (tuned[name] - old[name]))
                        else:
                            weight.copy_(tuned[name] + (scale - 1) * first.get(name, torch.tensor(0.0)))
                    for name, rows in batches.items():
                        sums, tokens, _ = inputs.log_likelihoods(model, rows)
                        losses[f"{mode} {scale} {name}"] = -sum(sums) / tokens
        return losses

    return run


def judged(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.mitigation.analysis import judged_mitigation
    from probes import CheckpointPair

    def run() -> dict[str, float]:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        files = (str(folder / f"{name}.jsonl") for name in ("task", "keep"))
        curve = judged_mitigation(pair, *files, scales=SCALES, draws=100).tables["curve"]
        return {
            f"{row.mode} {row.scale} {name}": getattr(row, f"{name}_loss")
            for row in curve.itertuples()
            for name in ("task", "keep")
        }

    return run


# A trajectory


def run_of_four(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 512, layers=2 if quick else 8, steps=3)
    inputs.texts(folder / "rows.jsonl", 32 if quick else 200)


def one_after_another(folder: Path) -> Callable[[], Any]:
    """Each checkpoint loaded and run, and the length of each step from the weights of the one before."""

    def run() -> list[list[float]]:
        padded_batches = inputs.batched(folder / "base", folder / "rows.jsonl")
        measurements, before = [], None
        for side in ("base", "tuned-1", "tuned-2", "tuned-3"):
            model = inputs.loaded(folder / side)
            sums, tokens, right = inputs.log_likelihoods(model, padded_batches)
            here = dict(model.named_parameters())
            length = 0.0
            if before is not None:
                squares = [float((here[name] - old).double().square().sum()) for name, old in before.items()]
                length = sum(squares) ** 0.5
            measurements.append([-sum(sums) / tokens, right / tokens, length])
            before = {name: value.detach() for name, value in here.items()}
        return measurements

    return run


def trajectory(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.trajectory.analysis import training_trajectory

    def run() -> list[list[float]]:
        series = [str(folder / side) for side in ("base", "tuned-1", "tuned-2", "tuned-3")]
        tables = training_trajectory(series, str(folder / "rows.jsonl")).tables
        steps, way = tables["steps"], tables["path"]
        lengths = way["length"].fillna(0.0).tolist()
        return [list(row) for row in zip(steps["loss"], steps["metric"], lengths, strict=True)]

    return run


def same_curves(what: str, limit: float) -> Callable[[Any, Any], Agreement]:
    def agree(theirs: Any, ours: Any) -> Agreement:
        if isinstance(theirs, dict):
            missing = sorted(set(theirs) - set(ours))
            if missing:
                return Agreement(False, f"{what}: ours has no {missing[0]}")
            theirs, ours = list(theirs.values()), [ours[name] for name in theirs]
        return near(np.ravel(theirs).tolist(), np.ravel(ours).tolist(), limit, what)

    return agree


CONTESTS = [
    Contest(
        analysis="ood",
        what="likelihood ratios of an adapter",
        peer="two resident models, batches of 16",
        make=adapted,
        theirs=two_models,
        ours=ratios,
        agree=same_curves("ratios in nats", 1e-3),
    ),
    Contest(
        analysis="ood",
        what="AUROC, AUPR, FPR95",
        peer="pytorch-ood OODMetrics",
        packages=("pytorch-ood",),
        make=scores_of,
        theirs=pytorch_ood,
        ours=detection,
        agree=same_metrics,
    ),
    Contest(
        analysis="drift",
        what="similarity at every layer",
        peer="output_hidden_states, batches of 16",
        make=moved_rows,
        theirs=hidden_states,
        ours=drift,
        agree=same_similarity,
        apart="ours also CKA and Procrustes",
    ),
    Contest(
        analysis="path",
        what=f"loss at {len(ALPHAS)} blends",
        peer="state dicts blended, batches of 16",
        make=moved_rows,
        theirs=state_dicts,
        ours=path,
        agree=same_curves("losses in nats", 1e-5),
    ),
    Contest(
        analysis="mitigation",
        what="task and keep loss, 2 modes, 2 strengths",
        peer="the paper's full SVDs, batches of 16",
        make=spectral_rows,
        theirs=edited,
        ours=judged,
        agree=same_curves("losses in nats", 1e-4),
        apart="ours has 2 modes, both ends and matched strengths beyond",
    ),
    Contest(
        analysis="trajectory",
        what="loss, accuracy, length of 4 checkpoints",
        peer="one after another, batches of 16",
        make=run_of_four,
        theirs=one_after_another,
        ours=trajectory,
        agree=same_curves("losses, accuracies and lengths", 1e-4),
        apart="ours also angles and troughs",
    ),
]
