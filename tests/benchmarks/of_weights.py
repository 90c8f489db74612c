"""Contests about weights alone: intruders, update norms, spectra, mitigation, masks, movement, sparseness."""

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.benchmarks import inputs
from tests.benchmarks.contest import Agreement, Contest, near

K, EPSILON, SCALE = 10, 0.5, 0.75
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def block_matrices(file: Path) -> dict[str, torch.Tensor]:
    """The matrices of the blocks of a checkpoint of one file, in float32."""
    return {name: W.float() for name, W in load_file(file).items() if W.ndim == 2 and ".layers." in name}


# Intruders


def spectral(folder: Path, quick: bool) -> None:
    inputs.spectral_pair(folder, width=256 if quick else 2048, layers=1)


def two_svds(folder: Path) -> Callable[[], Any]:
    """Algorithm 1 of arXiv:2410.21228, as its released code runs it, over all matrices."""

    def run() -> dict[str, int]:
        sides = [block_matrices(folder / side / "model.safetensors") for side in ("base", "tuned")]
        counts = {}
        for name, base in sides[0].items():
            U0 = torch.linalg.svd(base, full_matrices=False).U
            U1 = torch.linalg.svd(sides[1][name], full_matrices=False).U[:, :K]
            counts[name] = int(((U0.mT @ U1).abs().amax(dim=0) < EPSILON).sum())
        return counts

    return run


def intruders(folder: Path) -> Callable[[], Any]:
    """The whole analysis."""
    from diagnostics.analyses.intruders.analysis import intruder_dimensions
    from probes import CheckpointPair

    def run() -> Any:
        result = intruder_dimensions(CheckpointPair(folder / "base", folder / "tuned"), k=K, epsilon=EPSILON)
        return {name: table.to_dict("list") for name, table in result.tables.items()}

    return run


def same_counts(theirs: dict[str, int], ours: Any) -> Agreement:
    our_counts = dict(zip(ours["matrices"]["matrix"], ours["matrices"]["intruders"], strict=True))
    # A matrix that tunescope calls too small to judge is no matter of counting.
    judged = {name: int(count) for name, count in our_counts.items() if not math.isnan(count)}
    other = [name for name, count in judged.items() if theirs[name] != count]
    total = sum(theirs[name] for name in judged)
    if other:
        return Agreement(False, f"{len(other)} of {len(judged)} matrices differ: {other[0]}")
    return Agreement(True, f"{total} intruders in {len(judged)} matrices, equal in each")


# Update norms


def modeldelta(folder: Path) -> Callable[[], Any]:
    from modeldelta.core.weight_diff import compare_models
    from modeldelta.utils.model_loader import get_tensor_map

    def run() -> Any:
        maps = [
            {name: file for name, file in get_tensor_map(str(folder / side)).items() if ".layers." in name}
            for side in ("base", "tuned")
        ]
        rows, _ = compare_models(*maps)
        return {row["name"]: row for row in rows if row["has_svd"]}

    return run


# Theirs are summed in float32, which in matrices of millions of entries is off; the tests have a case.
SUMMED = 5e-3


def same_norms(theirs: Any, ours: Any) -> Agreement:
    table = ours["matrices"]
    names = table["matrix"]
    norms = near(
        [theirs[name]["frob_norm"] for name in names], table["update_norm"], SUMMED, "Frobenius norms"
    )
    relative = near(
        [theirs[name]["frob_norm_relative"] for name in names], table["relative_update"], SUMMED, "relative"
    )
    low, high = np.array(table["effective_rank_low"]), np.array(table["effective_rank_high"])
    rank = np.array([theirs[name]["effective_rank"] for name in names])
    inside = int(((rank >= 0.99 * low) & (rank <= 1.01 * high)).sum())
    text = f"{norms.text}; {relative.text}; effective rank within our bounds in {inside} of {len(names)}"
    return Agreement(norms.same and relative.same and inside == len(names), text)


# Spectra


def weightwatcher(folder: Path) -> Callable[[], Any]:
    import weightwatcher as ww

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    logging.getLogger("powerlaw").setLevel(logging.CRITICAL)

    def run() -> Any:
        eigenvalues: dict[str, list[float]] = {}
        for side in ("base", "tuned"):
            table = ww.WeightWatcher(model=inputs.loaded(folder / side)).analyze(plot=False)
            for name, value in zip(table["longname"], table["lambda_max"], strict=True):
                eigenvalues.setdefault(str(name), []).append(float(value))
        return eigenvalues

    return run


def same_values(theirs: dict[str, list[float]], ours: Any) -> Agreement:
    vectors = ours["vectors"]
    first = {
        matrix: value
        for matrix, value, rank in zip(
            vectors["matrix"], vectors["singular_value"], vectors["rank"], strict=True
        )
        if rank == 1
    }
    # lambda_max is the largest eigenvalue of WᵀW.
    values = [theirs[name.removesuffix(".weight")][1] for name in first]
    return near(values, [value**2 for value in first.values()], 1e-3, "largest eigenvalues of WᵀW, tuned")


# Mitigation


def adapter(folder: Path, quick: bool) -> None:
    from tests.benchmarks.rows import write_pair

    write_pair(folder, width=256 if quick else 1024, layers=1 if quick else 2, vocabulary=1024, rank=8)


def peft_reducer(folder: Path) -> Callable[[], Any]:
    from peft import PeftModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    def run() -> Any:
        model = PeftModel.from_pretrained(inputs.loaded(folder / "base"), folder / "tuned")
        lines: list[str] = []
        reduce_intruder_dimension(
            model, top_k=K, threshold_epsilon=EPSILON, mitigation_lambda=SCALE, logging_sink=lines.append
        )
        with tempfile.TemporaryDirectory() as name:
            model.save_pretrained(name, selected_adapters=["intruder_reduced"])
        counts = {
            line.split(": ", 1)[0]: int(line.rsplit(": ", 1)[1]) if ": Intruders: " in line else 0
            for line in lines
            if ": " in line
        }
        deltas = {}
        for name, module in model.named_modules():
            if name in counts:
                deltas[name] = module.get_delta_weight("intruder_reduced").detach()[:64, :64].clone()
        return counts, deltas

    return run


def mitigated(folder: Path) -> Callable[[], Any]:
    from diagnostics.edits.mitigate import mitigate
    from probes import open_checkpoint

    def run() -> Any:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "out"
            result = mitigate(
                folder / "base", folder / "tuned", out, scale=SCALE, mode="all", k=K, epsilon=EPSILON
            )
            counts = {edit.matrix: edit.rank for edit in result.edits}
            written = open_checkpoint(str(out), base=str(folder / "base"))
            deltas = {}
            for matrix in written.matrices:
                delta = written.delta(matrix)
                if delta is not None:
                    deltas[matrix] = delta.dense()[:64, :64].clone()
            return counts, deltas

    return run


def same_adapters(theirs: Any, ours: Any) -> Agreement:
    counts, deltas = ({_plain(name): value for name, value in part.items()} for part in theirs)
    our_counts, written = ({_plain(name): value for name, value in part.items()} for part in ours)
    if {name: count for name, count in counts.items() if count} != our_counts:
        return Agreement(False, f"{sum(counts.values())} intruders against {sum(our_counts.values())}")
    apart = max(float((deltas[name] - written[name]).norm() / deltas[name].norm()) for name in deltas)
    text = f"{sum(our_counts.values())} intruders, equal in each of {len(counts)} matrices; deltas written"
    return Agreement(apart < 1e-2, f"{text} within {apart:.0e}")


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")


# Masks


def pruned_pair(folder: Path, quick: bool) -> None:
    from tests.benchmarks.masks import write_pair

    write_pair(folder, width=128 if quick else 768, layers=2 if quick else 12)


def torch_prune(folder: Path) -> Callable[[], Any]:
    """`torch.nn.utils.prune`, from the dense weights at every level."""
    from tests.benchmarks.masks import torchs

    return lambda: torchs(folder, list(LEVELS))[1]


def cuts(folder: Path) -> Callable[[], Any]:
    from tests.benchmarks.masks import tunescopes

    return lambda: tunescopes(folder, list(LEVELS))[1]


def same_masks(theirs: Any, ours: Any) -> Agreement:
    apart = sum(
        int((theirs[level][name] != ours[level][name]).sum()) for level in LEVELS for name in ours[level]
    )
    entries = sum(mask.numel() for mask in ours[LEVELS[0]].values())
    text = f"{apart or 'no'} entries of {entries:,} in 7 tensors differ, at {len(LEVELS)} levels"
    return Agreement(apart == 0, text)


# Movement


def moved_pair(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 768, layers=2 if quick else 12)


def weightscope(folder: Path) -> Callable[[], Any]:
    from weightscope.diff import diff_models

    def run() -> Any:
        diff = diff_models(str(folder / "base"), str(folder / "tuned"))
        return {tensor.name: tensor.n_changed for tensor in diff.tensors}

    return run


def movement(folder: Path) -> Callable[[], Any]:
    """How many entries of each tensor moved, and the one in ten thousand that moved furthest."""
    from diagnostics.analyses.skills.movement import Movement
    from probes import CheckpointPair

    def run() -> Any:
        pair = CheckpointPair(folder / "base", folder / "tuned")
        shapes = {name: header.shape for name, header in pair.base.headers.items()}
        return Movement(shapes, lambda name: (pair.base.tensor(name), pair.tuned.tensor(name))).moved

    return run


def same_movement(theirs: dict[str, int], ours: dict[str, int]) -> Agreement:
    hidden = {name: ours.get(name, 0) - count for name, count in theirs.items()}
    total = sum(ours.values())
    if any(count < 0 for count in hidden.values()):
        return Agreement(False, f"weightscope counts more: {min(hidden, key=lambda name: hidden[name])}")
    missed = sum(hidden.values())
    if not missed:
        return Agreement(True, f"{total:,} entries moved, equal in each of {len(theirs)} tensors")
    # Entries that moved by at most its threshold of 1e-6: the planted case of the tests.
    text = f"{total:,} entries moved; weightscope misses {missed:,} that moved by 1e-6 or less: ours is right"
    return Agreement(missed < 0.01 * total, text)


# Sparseness of a run


def run_of_four(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 512, layers=2 if quick else 8, steps=3)


def whole_vectors(folder: Path) -> Callable[[], Any]:
    """The obvious way: all weights of a checkpoint in one vector."""

    def run() -> list[list[float]]:
        statistics = []
        for side in ("base", "tuned-1", "tuned-2", "tuned-3"):
            matrices = block_matrices(folder / side / "model.safetensors")
            flat = torch.cat([W.flatten() for W in matrices.values()])
            small = sum(int((W.abs() < 0.1 * W.square().mean().sqrt()).sum()) for W in matrices.values())
            hoyer = 0.0
            for W in matrices.values():
                root = math.sqrt(W.numel())
                hoyer += W.numel() * float((root - W.double().abs().sum() / W.double().norm()) / (root - 1))
            size = len(flat)
            statistics.append(
                [float((flat == 0).double().mean()), float((flat.abs() < 1e-3).double().mean()),
                 small / size, hoyer / size]
            )  # fmt: skip
        return statistics

    return run


def sparsified(folder: Path) -> Callable[[], Any]:
    from diagnostics.analyses.sparsification import abrupt_sparsification

    def run() -> Any:
        series = [str(folder / side) for side in ("base", "tuned-1", "tuned-2", "tuned-3")]
        table = abrupt_sparsification(series).tables["checkpoints"]
        return table[["zero", "near_zero", "small", "hoyer"]].to_numpy().tolist()

    return run


# Integrity


def integrity_pair(folder: Path, quick: bool) -> None:
    inputs.moved(folder, width=128 if quick else 1024, layers=2 if quick else 4)


def loaded_both(folder: Path) -> Callable[[], Any]:
    """The obvious way: load both files, and count what differs and what is not finite."""

    def run() -> list[int]:
        base, tuned = (load_file(folder / side / "model.safetensors") for side in ("base", "tuned"))
        changed = sum(int((base[name] != tuned[name]).sum()) for name in tuned)
        broken = sum(int((~side[name].isfinite()).sum()) for side in (base, tuned) for name in side)
        dead = sum(
            int((tuned[name] == 0).all(dim=1).sum()) - int((base[name] == 0).all(dim=1).sum())
            for name in tuned
            if tuned[name].ndim == 2
        )
        return [changed, broken, dead]

    return run


def integrity(folder: Path) -> Callable[[], Any]:
    from diagnostics import checkpoint_integrity
    from probes import CheckpointPair

    def run() -> Any:
        result = checkpoint_integrity(CheckpointPair(folder / "base", folder / "tuned"))
        broken = result.metrics["nonfinite_base"] + result.metrics["nonfinite_tuned"]
        return [int(result.tables["compared"]["changed"].sum()), broken, result.metrics["dead_rows"]]

    return run


CONTESTS = [
    Contest(
        analysis="integrity", what="entries that changed, are not finite, or are dead", peer="load both",
        make=integrity_pair, theirs=loaded_both, ours=integrity,
        agree=lambda theirs, ours: near(theirs, ours, 0, "counts"),
        apart="ours also compares files and asks transformers what is required",
    ),
    Contest(
        analysis="intruders", what="intruders of a full pair", peer="the paper's two full SVDs",
        make=spectral, theirs=two_svds, ours=intruders, agree=same_counts,
        apart="ours also measures updates and spectra",
    ),
    Contest(
        analysis="intruders", what="update norms, effective rank", peer="modeldelta compare_models",
        packages=("modeldelta",), make=spectral, theirs=modeldelta, ours=intruders, agree=same_norms,
        apart="ours also decides intruders",
    ),
    Contest(
        analysis="intruders", what="leading singular values", peer="weightwatcher analyze",
        packages=("weightwatcher",), make=spectral, theirs=weightwatcher, ours=intruders, agree=same_values,
        apart="theirs fits power laws, ours decides intruders",
    ),
    Contest(
        analysis="mitigation", what="adapter, intruders damped", peer="peft reduce_intruder_dimension",
        packages=("peft",), make=adapter, theirs=peft_reducer, ours=mitigated, agree=same_adapters,
    ),
    Contest(
        analysis="sparsity", what="5 global magnitude masks", peer="torch.nn.utils.prune", make=pruned_pair,
        theirs=torch_prune, ours=cuts, agree=same_masks,
    ),
    Contest(
        analysis="skills", what="entries that moved", peer="weightscope diff_models",
        packages=("weightscope",), make=moved_pair, theirs=weightscope, ours=movement, agree=same_movement,
    ),
    Contest(
        analysis="sparsification", what="4 measures of 4 checkpoints", peer="all weights in one vector",
        make=run_of_four, theirs=whole_vectors, ours=sparsified,
        agree=lambda theirs, ours: near(
            np.ravel(theirs).tolist(), np.ravel(ours).tolist(), 1e-5, "shares and indices"
        ),
    ),
]  # fmt: skip
