"""Correlations over several audits: does sharpness go with quality on OOD rows?

The audits are of models tuned from one base. Question and warnings are those of
`diagnostics.numerics.rank_correlation`: each correlation is given raw and partial, given displacement, and
none below 12 models. The outcome is read at tuned, half-way, or at the best alpha of each model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.numerics.rank_correlation import LEAST, correlations
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, panels, points
from diagnostics.store.audit_store import Audit, load
from diagnostics.store.files import replacing, write_table
from probes.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Where = Literal["tuned", "half", "best"]
Metric = Literal["loss", "accuracy"]
ALL_BLOCKS = "all blocks"
# Parameters of `sharpness` that may differ: its values do not depend on them.
IRRELEVANT = {"layer_alphas", "alphas", "curvature", "batch_tokens", "sharpen", "trust_remote_code"}
PANELS = 9  # most panels of the scatter that can be read


@dataclass(frozen=True, kw_only=True)
class Correlations:
    """Correlations over tuned models of one base.

    Attributes:
        models: a row an audit: model, displacement, outcome, and sharpness at tuned of all blocks and of each
            layer, `sharpness:NAME`.
    """

    models: "pd.DataFrame"
    table: "pd.DataFrame"  # of `diagnostics.numerics.rank_correlation.correlations`
    outcome: str  # the predicted quantity in words
    notes: tuple[str, ...] = ()

    def figures(self) -> "dict[str, go.Figure]":
        """The scatter, and the correlations with their intervals if there are any."""
        figures = {"scatter": draw_scatter(self)}
        if self.table["raw"].notna().any():
            figures["correlations"] = draw_intervals(self)
        return figures

    def write(self, out: Path) -> None:
        """Write both tables as parquet, and the figures as one page that opens offline."""
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "models.parquet", self.models)
        write_table(out / "correlations.parquet", self.table)
        with replacing(out / "correlations.html") as part:
            part.write_text(correlations_page(self), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        facts = {"models": len(self.models), "outcome": self.outcome}
        return {**facts, "correlations": rows, "notes": list(self.notes)}


def correlate(
    audits: Sequence[str | Path | Audit], *, metric: Metric = "loss", where: Where = "half",
    permutations: int = 10_000, seed: int = 0,
) -> Correlations:  # fmt: skip
    """Correlate sharpness at tuned, of all blocks and of each layer, with quality on OOD rows.

    Args:
        audits: 12 or more to get a correlation, each with `sharpness` and OOD rows, of one base and one set
            of rows.
        metric: on the OOD rows, averaged over their sets.
        where: point of the path where the metric is read: tuned, half-way (WiSE-FT's default), or the best
            alpha of each model.
        permutations, seed: as of `correlations`.

    Raises:
        InputError: fewer than two audits, one without what is needed, or audits that cannot be compared; the
            message names it.
    """
    import pandas as pd

    opened = [audit if isinstance(audit, Audit) else load(audit) for audit in audits]
    if len(opened) < 2:
        raise InputError(f"{len(opened)} audit given; a correlation needs several, one for each tuned model")
    check_comparable(opened)
    models = pd.DataFrame([model_row(audit, metric, where) for audit in opened])
    predictors = [str(column) for column in models if str(column).startswith("sharpness:")]
    table = correlations(
        models, outcome="outcome", predictors=predictors, permutations=permutations, seed=seed
    )
    table["predictor"] = table["predictor"].str.removeprefix("sharpness:")
    notes = [
        "Learning rate and length of tuning change sharpness and quality together: read the column given "
        "displacement. No correlation shows that sharpness makes a model worse."
    ]
    if len(models) < LEAST:
        notes.insert(0, f"{len(models)} models: correlations are computed from {LEAST} on.")
    point = {"tuned": "at tuned", "half": "half-way", "best": "at each model's best alpha"}[where]
    return Correlations(models=models, table=table, outcome=f"OOD {metric} {point}", notes=tuple(notes))


def check_comparable(audits: Sequence[Audit]) -> None:
    """Refuse audits of another base, other rows or other parameters of sharpness."""
    for audit in audits:
        result = audit.results.get("sharpness")
        name = audit_name(audit)
        if result is None:
            raise InputError(
                f"{name}: has no result of sharpness; run `tunescope audit` with --task F and --ood F"
            )
        if not (result.tables["path"]["role"] == "ood").any():
            raise InputError(f"{name}: its sharpness was measured without OOD rows; run it with --ood NAME=F")
    for what, expected in comparison_facts(audits[0]).items():
        for audit in audits[1:]:
            if comparison_facts(audit)[what] != expected:
                pair = f"{audit_name(audit)}: has other {what} than {audit_name(audits[0])}"
                raise InputError(f"{pair}; sharpness compares only at equal ones")


def audit_name(audit: Audit) -> str:
    """The directory of an audit, or its tuned model."""
    return str(audit.path or audit.tuned["ref"])


def comparison_facts(audit: Audit) -> dict[str, Any]:
    """What must be equal for two audits to be compared."""
    parameters = audit.results["sharpness"].parameters
    return {
        "bases": audit.base.get("fingerprint") or audit.base["ref"],
        "task rows": [file["fingerprint"] for file in audit.data.get("task", [])],
        "OOD rows": sorted(file["fingerprint"] for file in audit.data.get("ood", [])),
        "parameters of sharpness": {k: v for k, v in parameters.items() if k not in IRRELEVANT},
    }


def model_row(audit: Audit, metric: Metric, where: Where) -> dict[str, Any]:
    """The row of one audit in the table of models."""
    name = audit_name(audit)
    result = audit.results["sharpness"]
    layers, path = result.tables["layers"], result.tables["path"]
    alpha = {"tuned": 1.0, "half": 0.5, "best": float(result.metrics["best_alpha"])}[where]
    outcome = path[(path["role"] == "ood") & (path["metric"] == metric) & (path["alpha"] == alpha)]
    if outcome.empty:
        raise InputError(f"{name}: its path has no alpha {alpha:g}; add it with --set sharpness.alphas=…")
    row: dict[str, Any] = {
        "model": name,
        "displacement": math.sqrt(float((layers["moved"].astype(float) ** 2).sum())),
        "outcome": float(outcome["value"].mean()),
        "alpha": alpha,
        f"sharpness:{ALL_BLOCKS}": float(result.metrics.get("sharpness_tuned", math.nan)),
    }
    values = zip(layers["name"], layers["sharpness_tuned"], strict=True)
    return row | {f"sharpness:{layer}": float(value) for layer, value in values}


def draw_scatter(correlations: Correlations) -> "go.Figure":
    """Sharpness against the outcome, a panel a predictor, coloured by displacement."""
    table, models = correlations.table, correlations.models
    order = table["partial"].abs().sort_values(ascending=False, na_position="last").index
    names = table.loc[order, "predictor"].tolist()[:PANELS]
    columns, rows = min(3, len(names)), -(-len(names) // 3)
    tail = f"; the {PANELS} of {len(table)} with the largest partial one" if len(table) > PANELS else ""
    figure = panels(
        f"{correlations.outcome} against sharpness at tuned, {len(models)} models{tail}", "sharpness, nats",
        correlations.outcome, height=120 + 260 * rows, rows=rows, columns=columns, names=names,
        horizontal_spacing=0.07, vertical_spacing=0.14 / rows + 0.06,
    )  # fmt: skip
    hover = (
        "{model}<br>sharpness {x:.3g}<br>outcome {y:.4g}<br>displacement {displacement:.3g}<extra></extra>"
    )
    outline = {"width": 1, "color": theme.NEUTRAL}
    marker = {"color": models["displacement"], "coloraxis": "coloraxis", "size": 9, "line": outline}
    for i, name in enumerate(names):
        panel = (i // columns + 1, i % columns + 1)
        x, look = f"sharpness:{name}", Style("", theme.NEUTRAL)
        points(figure, models, x, "outcome", look, hover, panel=panel, marker=marker, showlegend=False)
    return figure.update_layout(coloraxis_colorbar_title_text="displacement")


def draw_intervals(correlations: Correlations) -> "go.Figure":
    """Raw and partial correlation of every predictor with 95 % intervals."""
    table, title = correlations.table.iloc[::-1], f"Rank correlation of sharpness with {correlations.outcome}"
    figure = theme.figure(title, "Spearman correlation with 95 % interval", "", 180 + 30 * len(table))
    styles = {
        "raw": Style("raw", theme.NEUTRAL, size=10),
        "partial": Style("given displacement", theme.NEW, "diamond", size=10),
    }
    for kind, style in styles.items():
        hover = f"{{y}}: {{x:+.2f}}, p {{{kind}_p:.3g}}, after Holm {{{kind}_holm:.3g}}"
        points(figure, table, kind, "predictor", style, hover, x_interval=(f"{kind}_low", f"{kind}_high"))
    return theme.threshold(figure, x=0).update_xaxes(range=[-1.05, 1.05])


def correlations_page(result: Correlations) -> str:
    """The notes and the figures as one page that opens offline."""
    import html

    from plotly.io import to_html

    figures = "".join(
        to_html(figure, full_html=False, include_plotlyjs=position == 0, config={"displaylogo": False})
        for position, figure in enumerate(result.figures().values())
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in result.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tunescope correlate</title>'
        f"<style>body{{font-family:{theme.FONT};margin:2rem auto;max-width:1200px;padding:0 1rem}}</style>"
        f"</head><body><h1>{html.escape(result.outcome)} over {len(result.models)} models</h1>"
        f"{notes}{figures}</body></html>"
    )
