"""The page that says what large pairs would take, and its figure, from what was measured on small ones."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.growth import Cost, work_of

# Tokens of the rows that an estimate is for: 1,000 rows of 100.
TOKENS = 100_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its published shape.

    Attributes:
        kv: width of keys and of values.
    """

    name: str
    width: int
    inner: int
    layers: int
    kv: int
    vocabulary: int = 128_256

    @property
    def blocks(self) -> int:
        """Parameters in the matrices of the blocks."""
        return self.layers * self.width * (2 * self.width + 2 * self.kv + 3 * self.inner)

    @property
    def head(self) -> int:
        """Parameters of the output matrix."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Parameters in all matrices."""
        return self.blocks + 2 * self.head

    @property
    def largest(self) -> int:
        """Entries of the largest matrix of a block."""
        return self.width * self.inner


SHAPES = (
    Shape(name="8 B", width=4096, inner=14336, layers=32, kv=1024),
    Shape(name="70 B", width=8192, inner=28672, layers=80, kv=1024),
    Shape(name="400 B", width=16384, inner=53248, layers=126, kv=1024),
)
WORK = {
    "intruders": ("2,304 operations a weight of the blocks", "operations"),
    "sparsity": ("8 bytes a weight of the blocks", "bytes"),
    "drift": ("4 operations a weight of the blocks and token", "operations"),
    "ood": ("4 operations a weight of blocks and head and token", "operations"),
}


def rate_of(cost: Cost) -> float:
    """Work a second."""
    return cost.work / cost.seconds


def largest_of(costs: Sequence[Cost]) -> dict[tuple[str, str], Cost]:
    """The largest pair measured, by analysis and device: its rate is the one that is extrapolated."""
    best: dict[tuple[str, str], Cost] = {}
    for cost in sorted(costs, key=lambda cost: cost.parameters):
        best[cost.analysis, cost.device] = cost
    return dict(sorted(best.items(), key=lambda item: (item[0][1], list(WORK).index(item[0][0]))))


def seconds_of(cost: Cost, shape: Shape) -> float:
    """An estimate: the same work a second as of the largest pair that was measured."""
    tokens = TOKENS if cost.tokens else 0
    return work_of(cost.analysis, shape.blocks, tokens, shape.head) / rate_of(cost)


def memory_of(cost: Cost, shape: Shape) -> float:
    """An estimate in bytes: as many largest matrices, or models, as of the largest pair measured."""
    return cost.memory / unit_of(cost) * 4 * (shape.largest if by_matrix(cost.analysis) else shape.parameters)


def by_matrix(analysis: str) -> bool:
    """Whether its memory grows with the largest matrix, and not with the model."""
    return analysis in ("intruders", "sparsity")


def unit_of(cost: Cost) -> float:
    """Bytes of what its memory grows with, in float32."""
    return 4.0 * cost.largest if by_matrix(cost.analysis) else float(cost.model)


def spoken(seconds: float) -> str:
    """A duration to two digits."""
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{_two(seconds / size)} {unit}"
    return f"{_two(seconds)} s"


def _two(value: float) -> str:
    if value <= 0 or not math.isfinite(value):
        return "–"
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{round(value, 1 - math.floor(math.log10(value))):,.{digits}f}"


def page(costs: Sequence[Cost]) -> str:
    """docs/cost.md."""
    best = largest_of(costs)
    sizes = sorted({cost.parameters for cost in costs})
    kinds = sorted({(cost.device, cost.threads) for cost in costs})
    where = " and ".join(
        "a GPU" if device != "cpu" else f"{threads} CPU thread{'s' if threads > 1 else ''}"
        for device, threads in kinds
    )
    busy = max(cost.load - cost.threads for cost in costs)
    load_note = f", with other work beside it (load {busy + kinds[0][1]:.1f})" if busy > 0.5 else ""
    lines = [
        "# What an audit costs",
        "",
        f"Measured on {where}{load_note}, on pairs of {_two(sizes[0] / 1e6)} M to {_two(sizes[-1] / 1e6)} M "
        "parameters in bfloat16; what is beyond is an estimate, and says so. `python -m "
        "tests.benchmarks.growth --write docs` measures again and writes this page, its figure and "
        "[cost.csv](cost.csv), from which all numbers here follow.",
        "",
        "![Seconds and memory against parameters](cost.png)",
        "",
        "## Measured",
        "",
        "Rates are of the largest pair; smaller ones pay for what does not grow with them. Memory is beyond "
        "that of the imported libraries, and counts what is mapped from files. These were in the page cache: "
        "add what your disk takes.",
        "",
        "| analysis | on | counted work | largest pair | seconds | rate | memory |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for (analysis, device), cost in best.items():
        text, unit = WORK[analysis]
        lines.append(
            f"| `{analysis}` | {device} | {text} | {_two(cost.parameters / 1e6)} M | {_two(cost.seconds)} "
            f"| {_two(rate_of(cost) / 1e9)} G {unit} a second | {held(cost)} |"
        )
    lines += [
        "",
        "`intruders` decides every vector by products of each matrix with 32 columns, so that its work grows "
        "with the parameters and not with the third power of the width, as a decomposition's does; matrices "
        "that need the decomposition after all are few, and dear. `sparsity` is its weights' side, 23 levels "
        "of base and of tuned; its curve needs forward passes as `ood` does, about 25 for each of the two. "
        "`drift` and `ood` hold one model in float32, of base or of tuned, beside what is mapped from files.",
        "",
        "## Estimated",
        "",
        f"Work of the published shapes over the rates above; `drift` and `ood` for {TOKENS:,} tokens, such "
        "as 1,000 rows of 100. Nothing here was run. Memory is as many largest matrices, or models, as "
        "above, which is too much where some of it does not grow; where it is more than a machine has, "
        "`drift` and `ood` do not run there.",
        "",
        "| pair | parameters | on disk, both, bfloat16 | analysis | on | work | time | memory |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for shape in SHAPES:
        for (analysis, device), cost in best.items():
            work = work_of(analysis, shape.blocks, TOKENS if cost.tokens else 0, shape.head)
            lines.append(
                f"| {shape.name} | {_two(shape.parameters / 1e9)} B | {_two(4 * shape.parameters / 1e9)} GB "
                f"| `{analysis}` | {device} | {work:.1e} {WORK[analysis][1]} "
                f"| {spoken(seconds_of(cost, shape))} | {_two(memory_of(cost, shape) / 1e9)} GB |"
            )
    first = SHAPES[0]
    cost = next(iter(best.values()))
    lines += [
        "",
        f"The first line, for example: {first.layers} layers of {first.width} × (2 × {first.width} + 2 × "
        f"{first.kv} + 3 × {first.inner}) are {first.blocks:,} weights; 2,304 operations each are "
        f"{work_of('intruders', first.blocks, 0, 0):.2e}; at {rate_of(cost) / 1e9:.1f} G a second that takes "
        f"{spoken(seconds_of(cost, first))}.",
        "",
        "Matrices are independent, as are batches of rows, and `--engine` divides them over machines. Fewer "
        "rows will do, with wider intervals. A line in days is one for a GPU.",
    ]
    return "\n".join(lines) + "\n"


def held(cost: Cost) -> str:
    """Measured memory in the unit that it grows by."""
    gigabytes = f"{_two(cost.memory / 1e9)} GB"
    what = "the largest matrix" if by_matrix(cost.analysis) else "a model"
    return f"{gigabytes}, {_two(cost.memory / unit_of(cost))} × {what} in float32"


def figure(costs: Sequence[Cost]) -> Any:
    """Seconds and memory against parameters, both axes in powers of ten."""
    from plotly.subplots import make_subplots

    colours = dict(zip(WORK, ("#3366cc", "#dc7633", "#2e8b57", "#8e44ad"), strict=True))
    chart = make_subplots(rows=1, cols=2, subplot_titles=("Time", "Memory beyond the start"))
    for device in sorted({cost.device for cost in costs}):
        for analysis in WORK:
            line = sorted(
                (cost for cost in costs if (cost.analysis, cost.device) == (analysis, device)),
                key=lambda cost: cost.parameters,
            )
            for column, values in enumerate(
                ([cost.seconds for cost in line], [cost.memory / 1e9 for cost in line]), start=1
            ):
                chart.add_scatter(
                    x=[cost.parameters for cost in line], y=values, mode="lines+markers", row=1, col=column,
                    name=analysis if device == "cpu" else f"{analysis} on {device}", showlegend=column == 1,
                    line={"color": colours[analysis], "dash": "solid" if device == "cpu" else "dot"},
                )  # fmt: skip
    chart.update_xaxes(type="log", title="parameters in the blocks", exponentformat="B", dtick=1)
    chart.update_yaxes(type="log", exponentformat="none", dtick=1)
    chart.update_yaxes(title="seconds", row=1, col=1)
    chart.update_yaxes(title="GB", row=1, col=2)
    return chart.update_layout(
        template="plotly_white", width=1000, height=420, margin={"t": 40, "r": 10, "b": 50, "l": 60},
        legend={"orientation": "h", "y": -0.2},
    )  # fmt: skip


def picture(costs: Sequence[Cost], file: Path) -> None:
    """The figure as a PNG, drawn by a headless Chromium.

    Raises:
        RuntimeError: there is none.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("no chromium: cost.png was not drawn")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        html = Path(name) / "cost.html"
        figure(costs).write_html(html, config={"displayModeBar": False, "staticPlot": True})
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": 1020, "height": 440}, device_scale_factor=1.5)
        shown.goto(html.as_uri())
        shown.wait_for_selector(".js-plotly-plot .main-svg")
        shown.locator(".js-plotly-plot").screenshot(path=file)
        browser.close()


def write(costs: Sequence[Cost], folder: Path) -> None:
    """The page and its figure."""
    (folder / "cost.md").write_text(page(costs), encoding="utf-8")
    picture(costs, folder / "cost.png")
