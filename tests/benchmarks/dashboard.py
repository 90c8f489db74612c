"""How long a person waits for the dashboard: its start, its first paint, a filter."""

import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

LAYERS, COMPONENTS = 80, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS, ROWS = 10, 10_000
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
RUNS = 5


def large() -> dict[str, Any]:
    """Results such as an audit of 80 layers of 7 matrices leaves, 5,600 vectors and 10,000 OOD rows."""
    from diagnostics.core.analysis import Result, plain

    draws = np.random.default_rng(0)
    matrices = pd.DataFrame(
        [(f"model.layers.{i}.{c}.weight", i, c) for i in range(LAYERS) for c in COMPONENTS],
        columns=["matrix", "layer", "component"],
    )
    matrices = matrices.assign(
        rows=4096, columns=4096, intruders=draws.poisson(0.4, len(matrices)), examined=RANKS, floor=0.05,
        status="measured", min_cosine_low=draws.uniform(0.1, 0.9, len(matrices)),
        update_norm=draws.uniform(1, 9, len(matrices)),
    )  # fmt: skip
    vectors = (
        matrices[["matrix", "layer", "component"]].loc[matrices.index.repeat(RANKS)].reset_index(drop=True)
    )
    cosine = draws.beta(5, 1, len(vectors))
    vectors = vectors.assign(
        rank=np.tile(np.arange(1, RANKS + 1), len(matrices)),
        singular_value=draws.uniform(1, 50, len(vectors)),
        cosine_low=cosine, cosine_high=np.minimum(1, cosine + 0.02), tier="subspace", intruder=cosine < 0.5,
    )  # fmt: skip
    measured = {
        "intruders": int(matrices["intruders"].sum()),
        "intruders_per_matrix": float(matrices["intruders"].mean()),
        "matrices": len(matrices),
        "descendant": 1,
    }
    return {
        "intruders": Result(
            metrics=measured,
            tables={"matrices": matrices, "vectors": vectors},
            analysis="intruders",
            parameters=plain({"k": RANKS, "epsilon": 0.5}),
        ),
        "ood": detected(draws),
    }


def detected(draws: np.random.Generator) -> Any:
    """OOD detection on 1,000 task rows and 10,000 rows of three other sets."""
    from diagnostics.analyses.ood.tables import detection_of, gains_of, ratio_scores
    from diagnostics.core.analysis import Result

    sets = np.concatenate([np.repeat("task", 1_000), np.array(["code", "words", "law"])[np.arange(ROWS) % 3]])
    inside, length = sets == "task", draws.integers(10, 90, len(sets))
    base = -3.0 * length + draws.normal(0, 20, len(sets))
    tuned = base + np.where(inside, 20.0, -5.0) + draws.normal(0, 20, len(sets))
    rows = pd.DataFrame(
        {"set": sets, "role": np.where(inside, "task", "ood"), "row": np.arange(len(sets)), "group": None,
         "tokens": length, "log_likelihood_base": base, "log_likelihood_tuned": tuned,
         **ratio_scores(base, tuned, length.astype(float)), "truncated": False,
         "text": [f"row {i}: " + "a word or two " * 6 for i in range(len(sets))],
         "p_value": 0.5, "flagged": ~inside}
    )  # fmt: skip
    table = detection_of(rows[inside], rows[~inside], draws=20, seed=0)
    area = float(table.loc[table["score"] == "ratio", "auroc"].iloc[0])
    tables = {"detection": table, "sets": gains_of(rows), "rows": rows}
    return Result(metrics={"auroc": area}, tables=tables, analysis="ood", parameters={})


def write(out: Path) -> None:
    """Save an audit of these results."""
    from diagnostics.core.policy import default_policy
    from diagnostics.store.audit_store import Audit, Outcome, Store

    results = large()
    audit = Audit(
        base={"ref": "org/base", "kind": "full", "parameters": 70_000_000_000},
        tuned={"ref": "org/tuned", "kind": "full", "parameters": 70_000_000_000},
        policy=default_policy(),
        analyses={name: Outcome(status="ok", seconds=1, result=result) for name, result in results.items()},
        created="2026-02-11T09:41:07Z",
        tunescope="0.1.0",
    )
    with Store(out) as store:
        for name, result in results.items():
            store.write_result(name, result)
        store.write(audit)


@contextmanager
def serving(out: Path) -> Iterator[tuple[str, float]]:
    """Run the command; its address, and the seconds until it answered."""
    command = [str(Path(sys.executable).with_name("tunescope")), "dashboard", str(out), "--port", "0"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address) as answer:
            answer.read()
        yield address, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()


def median(times: list[float]) -> float:
    """The middle one."""
    return sorted(times)[len(times) // 2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "large"
        write(out)
        starts = []
        for _ in range(RUNS):
            with serving(out) as (_, seconds):
                starts.append(seconds)
        print(f"tunescope dashboard, first answer after {median(starts):.2f} s (median of {RUNS}; limit 3)")
        chromium = shutil.which("chromium")
        if chromium is None:
            print("no chromium: first paint and filters were not measured")
            return
        browse(chromium, out)


def browse(chromium: str, out: Path) -> None:
    """Measure what a person sees."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        paints = []
        for _ in range(RUNS):
            with serving(out) as (address, _):
                page = browser.new_page()
                begun = time.perf_counter()
                page.goto(address, wait_until="commit")
                page.wait_for_selector(".verdict .says")
                paints.append(time.perf_counter() - begun)
                page.close()
        print(
            f"first paint of the overview, nothing cached: {median(paints):.2f} s (median of {RUNS}; limit 1)"
        )
        with serving(out) as (address, _):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            for name in ("ood", "intruders"):
                # The second time the analysis is imported, and its figures are in the browser's reach.
                for _ in range(2):
                    begun = time.perf_counter()
                    page.goto(f"{address}?analysis={name}", wait_until="commit")
                    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
                    seconds = time.perf_counter() - begun
                    page.wait_for_load_state("networkidle")
                print(f"page of {name} until its first figure: {seconds:.2f} s")
            page.locator(".js-plotly-plot").nth(1).wait_for()
            times = [redraw(page, f"layer=0-{last}") for last in range(70, 14, -5)]
            took = 1000 * median(times)
            print(f"a filter of 80 layers of 7 matrices redraws in {took:.0f} ms (median of 12; limit 300)")
        browser.close()


def redraw(page: Any, selection: str) -> float:
    """Seconds from a change of the filters until every figure that follows them is drawn."""
    return float(
        page.evaluate(
            """async (selection) => {
                const plots = [...document.querySelectorAll('.pictures .js-plotly-plot')];
                const drawn = plots.map((plot) => new Promise((done) => plot.once('plotly_afterplot', done)));
                const begun = performance.now();
                const search = `?analysis=intruders&${selection}`;
                window.dash_clientside.set_props('url', { search });
                await Promise.all(drawn);
                return (performance.now() - begun) / 1000;
            }""",
            selection,
        )
    )
