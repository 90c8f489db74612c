"""The miniature of essential sparsity: its chains, its claims, and, slowly, that they hold."""

import pandas as pd
import pytest
import sparsity_miniature as miniature
import torch
from rich.console import Console

from diagnostics.core.analysis import Result


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_symbol_has_four_successors_of_its_own(generator):
    chances = miniature.chain(generator)
    assert torch.allclose(chances.sum(dim=1), torch.ones(24))
    assert all(sorted(row[row > 0].tolist()) == pytest.approx([0.05, 0.15, 0.25, 0.55]) for row in chances)
    assert len({tuple(row.tolist()) for row in chances}) > 20


def test_a_quarter_of_a_chain_is_drawn_anew(generator):
    chances = miniature.chain(generator)
    changed = (miniature.redrawn(chances, generator) != chances).any(dim=1)
    assert int(changed.sum()) == 6  # of 24


def test_the_model_has_as_many_weights_in_its_blocks_as_is_said():
    model = miniature.make_model(0)
    matrices = [w for name, w in model.named_parameters() if ".layers." in name and w.dim() == 2]
    # 3 blocks of 4 · 48 · 48 + 3 · 48 · 128.
    assert sum(w.numel() for w in matrices) == 82_944


ORDER = "zero-shot, half the weights: 1:2 < 2:4 < 4:8 < one threshold for all"


def outcome(**changed: float) -> miniature.Outcome:
    """An outcome that keeps every claim, but for what is changed."""
    values = {
        "base 0.2": 0.485, "base 0.5": 0.4, "base random": 0.2, "base 4:8": 0.35, "base robust": 0.2,
        "tuned 0.2": 0.515, "tuned random": 0.2, "tuned 1:2": 0.3, "tuned robust": 0.3, "masked robust": 0.5,
        "dbic": 11.0, "before": -0.1, "after": -0.35, "kappa": 0.6,
    }  # fmt: skip
    values |= changed
    zero = {"regime": "zero_shot", "metric": "accuracy"}
    curve = []
    for role, model, dense, one_two in (
        ("keep", "base", 0.49, 0.25),
        ("task", "tuned", 0.52, values["tuned 1:2"]),
    ):
        four_eight = values["base 4:8"] if model == "base" else 0.36
        half = values["base 0.5"] if model == "base" else 0.4
        for pattern, sparsity, value in (
            ("magnitude", 0.0, dense), ("magnitude", 0.2, values[f"{model} 0.2"]), ("magnitude", 0.5, half),
            ("random", 0.2, values[f"{model} random"]), ("1:2", 0.5, one_two), ("2:4", 0.5, 0.32),
            ("4:8", 0.5, four_eight),
        ):  # fmt: skip
            row = {"role": role, "model": model, "pattern": pattern, "sparsity": sparsity, "value": value}
            curve.append(row | zero)
    point = {"dbic": values["dbic"], "slope_before": values["before"], "slope_after": values["after"]}
    points = [
        {"role": role, "model": model, "regime": regime, "robust_at": at, **point}
        for role, model, regime, at in (
            ("keep", "base", "zero_shot", values["base robust"]),
            ("task", "tuned", "zero_shot", values["tuned robust"]),
            ("task", "base", "masked_finetune", values["masked robust"]),
        )
    ]
    overlap = pd.DataFrame({"sparsity": [0.1, 0.2], "kappa": [values["kappa"], 0.9]})
    tables = {"points": pd.DataFrame(points), "curve": pd.DataFrame(curve), "overlap": overlap}
    return miniature.Outcome(0, Result(metrics={}, tables=tables))


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, []),
        ({"base 0.5": 0.445}, ["base, zero-shot: 0.5 costs more than 5 points"]),
        ({"base 0.2": 0.479}, ["base, zero-shot: 0.2 costs less than 1 point"]),
        ({"tuned 0.2": 0.509}, ["tuned, zero-shot: 0.2 costs less than 1 point"]),
        ({"base random": 0.4}, ["base, zero-shot: 0.2 at random costs 10 or more"]),
        ({"tuned random": 0.43}, ["tuned, zero-shot: 0.2 at random costs 10 or more"]),
        ({"base 4:8": 0.41}, [f"base, {ORDER}"]),
        ({"tuned 1:2": 0.32}, [f"tuned, {ORDER}"]),
        ({"base robust": 0.32}, ["tuned behind the mask tolerates 0.2 more than base zero-shot"]),
        ({"tuned robust": float("nan")}, ["tuned behind the mask tolerates 0.2 more than tuned zero-shot"]),
        ({"dbic": 9.0}, ["tuned behind the mask: a hinge (dBIC > 10), 3 times as steep beyond it"]),
        ({"after": -0.29}, ["tuned behind the mask: a hinge (dBIC > 10), 3 times as steep beyond it"]),
        ({"kappa": 0.49}, ["masks of base and tuned: kappa above 0.5 from 0.1 on"]),
    ],
)  # fmt: skip
def test_the_claims_hold_of_tables_that_keep_them_and_fail_one_by_one(changed, failing):
    assert [claim.text for claim in miniature.claims(outcome(**changed)) if not claim.holds] == failing


@pytest.mark.slow
def test_a_quick_run_says_all_that_a_long_one_does(tmp_path, capsys):
    measured = miniature.measure(0, miniature.QUICK, tmp_path)
    miniature.show([measured], miniature.QUICK.grid, Console(width=180))
    printed = capsys.readouterr().out
    for words in ("kappa", "0.3 to 0.5", "14.89", "tuned behind the mask"):
        assert words in printed
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_must_hold_holds(seed, tmp_path, capsys):
    measured = miniature.measure(seed, miniature.Budget(), tmp_path)
    with capsys.disabled():
        miniature.show([measured], miniature.Budget().grid, Console(width=180))
    for claim in miniature.claims(measured):
        assert claim.holds, f"{claim.text}: {claim.numbers}"
