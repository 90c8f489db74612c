"""Closed-form cases that say who is right where benchmarks differ, and that benchmarks fail in the open."""

import contextlib
import importlib.util
import io
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.benchmarks import against, cost, growth, of_gradients, of_rows
from tests.benchmarks.__main__ import ALL, run
from tests.benchmarks.contest import Agreement, Contest, Line, Spent, apart, held, measured, near

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("who", ["tunescope", "pytorch-ood"])
def test_a_constant_score_is_flagged_by_chance(who):
    # Of 30 in-distribution and 10 OOD rows a score that is always 1 tells nothing: precision is the
    # prevalence, 10/40, and on the line from (0, 0) to (1, 1) 95 % of one kind are 95 % of the other.
    inside, outside = np.ones(30), np.ones(10)
    if who == "tunescope":
        from diagnostics.numerics.detection_metrics import detection

        result = detection(inside, outside)
        assert (result["auroc"], result["aupr_ood"], result["aupr_id"]) == (0.5, 0.25, 0.75)
        assert result["fpr95"] == pytest.approx(0.95)
        return
    if importlib.util.find_spec("pytorch_ood") is None:
        pytest.skip("pytorch-ood is not installed")
    metrics = of_rows.pytorch_ood_metrics()()
    metrics.update(torch.ones(40), torch.tensor([1] * 30 + [-1] * 10))
    with pytest.warns(UserWarning, match="AUTC is undefined"):
        result = metrics.compute()
    # Trapezoids from (0, 1) give (1 + prevalence) / 2, which is not chance.
    assert result["AUROC"] == 0.5
    assert result["AUPR-OUT"] == pytest.approx((1 + 0.25) / 2)


def softmax_regression():
    """At zero weights, 4 classes: H = (I − 11ᵀ/4)/4 ⊗ XᵀX/n, of known eigenvalues.

    XᵀX/n = diag(9, 4, 1) by X = diag(3, 2, 1) √3, n = 3. I − 11ᵀ/4 has the eigenvalue 1 three times and 0
    once, so that the top is 9/4 and the trace 3/4 · (9 + 4 + 1) = 10.5.
    """
    X = torch.diag(torch.tensor([3.0, 2.0, 1.0])) * 3**0.5
    return X, torch.tensor([0, 1, 2]), nn.Linear(3, 4, bias=False)


def test_the_hessian_of_a_softmax_regression_has_its_known_spectrum():
    from diagnostics.analyses.sharpness.curvature import spectrum

    X, y, model = softmax_regression()
    with torch.no_grad():
        model.weight.zero_()

    def product(v):
        def loss(W):
            return nn.functional.cross_entropy(X @ W.T, y)

        return torch.autograd.functional.hvp(loss, model.weight.detach(), v.view(4, 3))[1].flatten()

    estimate = spectrum(product, torch.zeros(12), probes=400, generator=torch.Generator().manual_seed(0))
    assert estimate.top == pytest.approx(9 / 4, rel=1e-4)
    assert estimate.bottom == pytest.approx(0, abs=1e-5)
    assert abs(estimate.trace - 10.5) < 4 * estimate.trace_error


def test_hessian_libraries_agree_on_that_spectrum():
    pyhessian = pytest.importorskip("pyhessian")
    eigenthings = pytest.importorskip("hessian_eigenthings")
    X, y, model = softmax_regression()
    with torch.no_grad():
        model.weight.zero_()
    operator = eigenthings.HessianOperator(
        model, [(X, y)], lambda module, batch: nn.functional.cross_entropy(module(batch[0]), batch[1])
    )
    assert float(eigenthings.lanczos(operator, k=1, max_iter=9, seed=0).eigenvalues[0]) == pytest.approx(
        9 / 4
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward() with create_graph, told once a process
        estimator = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(X, y), cuda=False)
    assert estimator.eigenvalues(maxIter=50, tol=0.0)[0][0] == pytest.approx(9 / 4, rel=1e-3)


class Saddle(nn.Module):
    """w itself, whose loss −½ (w₁ + w₂)² has the Hessian −11ᵀ: eigenvalues −2 and 0, trace −2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, 0.4]))

    def forward(self, X):
        return self.w


def downhill(w, _):
    return -0.5 * w.sum() ** 2


def test_a_negative_trace_is_estimated_from_all_samples():
    from diagnostics.analyses.sharpness.curvature import spectrum

    # vᵀHv of random signs is −4 or 0, half of the times each.
    estimate = spectrum(
        lambda v: -v.sum() * torch.ones(2),
        torch.zeros(2),
        probes=400,
        generator=torch.Generator().manual_seed(0),
    )
    assert (estimate.bottom, estimate.top) == (pytest.approx(-2), pytest.approx(0, abs=1e-6))
    assert estimate.trace_error == pytest.approx(0.1, rel=0.05)  # 2 / √400
    assert abs(estimate.trace + 2) < 4 * estimate.trace_error
    pyhessian = pytest.importorskip("pyhessian")
    X = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pyhessian.hessian(Saddle(), downhill, data=(X, X), cuda=False)
    torch.manual_seed(0)
    samples = theirs.trace(maxIter=400)
    # The change is divided by the negative mean, which is below any tolerance.
    assert len(samples) < 20
    torch.manual_seed(0)
    assert len(theirs.trace(maxIter=400, tol=-math.inf)) == 400


def test_a_move_of_less_than_a_millionth_is_a_move():
    from diagnostics.analyses.skills.movement import Movement

    base, tuned = torch.zeros(3, 4), torch.zeros(3, 4)
    base[1, 2], tuned[1, 2] = 1e-7, 2e-7  # doubled
    assert Movement({"w": (3, 4)}, lambda name: (base, tuned)).moved == {"w": 1}
    weightscope = pytest.importorskip("weightscope.diff")
    assert weightscope.diff_tensor("w", base, tuned).n_changed == 0
    assert weightscope.diff_tensor("w", base, tuned, threshold=0).n_changed == 1


def test_two_equal_directions_are_an_update_of_effective_rank_two():
    from diagnostics.numerics.linalg import effective_rank

    base = torch.zeros(40, 40)
    delta = torch.zeros(40, 40)
    delta[0, 0] = delta[1, 1] = 3  # singular values 3 and 3: norm 3 √2, entropy ln 2
    assert effective_rank(torch.linalg.svdvals(delta)) == pytest.approx(2)
    modeldelta = pytest.importorskip("modeldelta.core.weight_diff")
    result = modeldelta.analyze_delta(base, base + delta)
    assert result["effective_rank"] == pytest.approx(2)
    assert result["frob_norm"] == pytest.approx(3 * 2**0.5)


def test_the_norm_of_a_large_constant_matrix_is_summed_in_float64():
    from diagnostics.analyses.intruders.delta_shape import update_of
    from diagnostics.execution.lockstep import run_in_lockstep

    rows, columns = 1024, 2048
    base, delta = torch.zeros(rows, columns), torch.full((rows, columns), 0.1)
    generator = torch.Generator().manual_seed(0)
    # float32 sums of two million equal squares lose their last digits
    exact = float(torch.tensor(0.1).double()) * (rows * columns) ** 0.5
    (update,) = run_in_lockstep([update_of(base, base + delta, None, generator)])
    assert update.norm == pytest.approx(exact, rel=1e-9)
    assert float(delta.norm()) != pytest.approx(exact, rel=1e-4)  # what modeldelta takes


def test_a_tangent_kernel_is_that_of_whole_gradients_in_float64(tmp_path, monkeypatch):
    from tests.benchmarks import inputs

    inputs.moved(tmp_path, width=64, layers=1)
    inputs.texts(tmp_path / "rows.jsonl", of_gradients.KERNEL_ROWS)
    ours = np.ravel(of_gradients.kernel(tmp_path)())
    loaded = inputs.loaded
    monkeypatch.setattr(inputs, "loaded", lambda folder: loaded(folder).double())
    kernel = of_gradients.jacobian(tmp_path)()
    assert apart(np.ravel(kernel.entries).tolist(), ours.tolist()) < 1e-5
    assert kernel.exact == pytest.approx(np.array(kernel.entries)[:2, :2])


def test_every_analysis_is_held_against_something():
    from diagnostics.core.registry import installed_analyses

    assert set(installed_analyses()) <= {contest.analysis for contest in against.CONTESTS}


def five(folder: Path):
    return lambda: [5.0]


def breaks(folder: Path):
    raise ValueError("no such thing")


def nothing(folder: Path, quick: bool) -> None:
    (folder / "made").write_text("", encoding="utf-8")


def contest(**changed) -> Contest:
    given = {
        "analysis": "drift", "what": "fives", "peer": "naive", "make": nothing, "theirs": five, "ours": five,
        "agree": partial(near, limit=0.1, what="fives"),
    }  # fmt: skip
    return Contest(**(given | changed))


def test_a_contest_gives_both_times_and_a_side_that_fails_is_a_line_that_says_so(capfd):
    hold = partial(held, quick=True, threads=1, rounds=1)
    line = hold(contest())
    assert line.agreement == Agreement(True, "fives: 1 within 0e+00")
    assert line.theirs is not None
    assert line.theirs.seconds >= 0
    assert not line.failed
    broken = hold(contest(theirs=breaks))
    assert broken.failed
    assert against.row(broken)[-1] == "FAILED: ValueError: no such thing"
    assert "no such thing" in capfd.readouterr().err
    absent = hold(contest(packages=("no-such-peer",)))
    assert not absent.failed
    assert "no-such-peer is not installed" in against.row(absent)[-1]


def test_the_table_has_the_ratio_and_both_memories():
    line = Line(contest(), Spent(6.0, 2e9), Spent(2.0, 5e8), Agreement(True, "equal"))
    assert against.row(line)[3:8] == ["6.00", "2.00", "3.0 ×", "2.00", "0.50"]


def test_numbers_that_are_all_zero_do_not_agree():
    assert not near([0.0], [0.0], 1, "zeros").same
    assert not near([1.0, 2.0], [1.0], 1, "other counts").same
    assert near([1.0, 4.0], [1.2, 4.0], 0.06, "to a share of the largest: 0.2 / 4 = 0.05").same


def test_a_run_is_timed_again_only_while_it_is_short():
    ran = []
    spent, answer = measured(lambda folder: lambda: ran.append(0), Path())
    assert (len(ran), answer) == (3, None)
    assert spent.seconds < 3


def test_a_section_that_fails_leaves_the_others_running():
    def fails() -> None:
        raise RuntimeError("broken")

    done = []
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert run({"one": fails, "two": lambda: done.append(2)}) == ["one"]
    assert done == [2]
    assert "one FAILED: broken" in output.getvalue()


def line_of(analysis: str, **changed) -> growth.Cost:
    given = {
        "analysis": analysis, "device": "cpu", "threads": 2, "parameters": 10**9, "tokens": 0,
        "work": 2.304e12, "seconds": 100.0, "memory": 1e9, "largest": 10**7, "model": 4 * 10**9, "load": 2.0,
    }  # fmt: skip
    return growth.Cost(**(given | changed))


def test_an_estimate_is_counted_work_over_the_measured_rate():
    shape = cost.SHAPES[0]
    # 32 layers of 2 · 4096² (q, o), 2 · 4096 · 1024 (k, v) and 3 · 4096 · 14336.
    assert shape.blocks == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) == 6_979_321_856
    # 1e9 weights took 100 s: 6.979e9 take 697.9 s, at any number of tokens.
    assert cost.seconds_of(line_of("intruders"), shape) == pytest.approx(697.9, rel=1e-4)
    # 4e9 weights and tokens took 1 s; 100,000 tokens of 6.979e9 + 128,256 · 4096 weights of blocks and head.
    rows = line_of("ood", tokens=1, work=4e9, seconds=1.0)
    assert cost.seconds_of(rows, shape) == pytest.approx((6_979_321_856 + 128_256 * 4096) * 100_000 / 1e9)


def test_memory_is_in_largest_matrices_of_weights_and_in_models_of_rows():
    shape = cost.SHAPES[0]
    # 1e9 bytes for a matrix of 4e7 bytes are 25 of it; 4096 · 14336 entries of 4 bytes are 0.2349e9 bytes.
    assert cost.memory_of(line_of("intruders"), shape) == pytest.approx(25 * 4 * 4096 * 14336)
    # 1e9 bytes for a model of 4e9 are a quarter of it: a byte a parameter.
    assert cost.memory_of(line_of("ood"), shape) == pytest.approx(shape.parameters)


def test_durations_have_two_digits_and_a_unit_that_fits():
    spans = (3.14159, 119, 180, 7300, 500_000)
    assert [cost.spoken(seconds) for seconds in spans] == ["3.1 s", "120 s", "3.0 min", "2.0 h", "5.8 days"]


def test_the_page_of_costs_follows_from_what_was_measured():
    costs = growth.load(DOCS / "cost.csv")
    assert (DOCS / "cost.md").read_text(encoding="utf-8") == cost.page(costs)
    assert (DOCS / "cost.png").stat().st_size < 200_000


def test_measurements_survive_being_written(tmp_path):
    costs = [line_of("intruders"), line_of("ood", memory=math.nan)]
    growth.save(costs, tmp_path / "cost.csv")
    again = growth.load(tmp_path / "cost.csv")
    assert again[0] == costs[0]
    assert math.isnan(again[1].memory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_section_runs_small(name):
    command = [sys.executable, "-m", "tests.benchmarks", "--quick", name]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert f"-- {name}: " in ran.stdout
