"""Correlations over several audits: does sharpness go with quality on OOD rows?

The audits are of models tuned from one base. Question and warnings are those of
`diagnostics.numerics.rank_correlation`: each correlation is given raw and partial, given displacement, and
none below 12 models. The outcome is read at tuned, half-way, or at the best alpha of each model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.numerics.rank_correlation import LEAST, correlations
from diagnostics.plotting import theme
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
        table: of `diagnostics.numerics.rank_correlation.correlations`.
        outcome: the predicted quantity in words.
    """

    models: "pd.DataFrame"
    table: "pd.DataFrame"
    outcome: str
    notes: tuple[str, ...] = field(default=())

    def figures(self) -> "dict[str, go.Figure]":
        """Sharpness against the outcome; where there are correlations, these with their intervals too."""
        figures = {"scatter": scatter(self)}
        if self.table["raw"].notna().any():
            figures["correlations"] = intervals(self)
        return figures

    def write(self, out: Path) -> None:
        """Write both tables as parquet, and the figures as one page that opens offline.

        Raises:
            OSError: it cannot be written.
        """
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "models.parquet", self.models)
        write_table(out / "correlations.parquet", self.table)
        with replacing(out / "correlations.html") as part:
            part.write_text(correlations_page(self), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {
            "models": len(self.models),
            "outcome": self.outcome,
            "correlations": rows,
            "notes": list(self.notes),
        }


def correlate(
    audits: Sequence[str | Path | Audit],
    *,
    metric: Metric = "loss",
    where: Where = "half",
    permutations: int = 10_000,
    seed: int = 0,
) -> Correlations:
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
    table = correlations(
        models,
        outcome="outcome",
        predictors=[str(column) for column in models if str(column).startswith("sharpness:")],
        permutations=permutations,
        seed=seed,
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
    """Refuse audits whose sharpness cannot be compared.

    Raises:
        InputError: another base, other rows or other parameters; the message names the first that differs.
    """
    for audit in audits:
        result = audit.results.get("sharpness")
        if result is None:
            raise InputError(
                f"{audit_name(audit)}: has no result of sharpness; run `tunescope audit` with --task F and "
                "--ood F"
            )
        if not (result.tables["path"]["role"] == "ood").any():
            raise InputError(
                f"{audit_name(audit)}: its sharpness was measured without OOD rows; run it with --ood NAME=F"
            )
    for what, expected in comparison_facts(audits[0]).items():
        for audit in audits[1:]:
            if comparison_facts(audit)[what] != expected:
                raise InputError(
                    f"{audit_name(audit)}: has other {what} than {audit_name(audits[0])}; sharpness compares "
                    "only at equal ones"
                )


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
    return row | {
        f"sharpness:{layer}": float(value)
        for layer, value in zip(layers["name"], layers["sharpness_tuned"], strict=True)
    }


# --- figures ---


def scatter(result: Correlations) -> "go.Figure":
    """Sharpness against the outcome, one panel a predictor, coloured by displacement."""
    from plotly.subplots import make_subplots

    order = result.table["partial"].abs().sort_values(ascending=False, na_position="last").index
    chosen = result.table.loc[order, "predictor"].tolist()[:PANELS]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=[theme.verbatim(name) for name in chosen],
        horizontal_spacing=0.07, vertical_spacing=0.14 / rows + 0.06,
    )  # fmt: skip
    models = result.models
    for panel, name in enumerate(chosen):
        figure.add_scatter(
            x=models[f"sharpness:{name}"], y=models["outcome"], mode="markers", showlegend=False,
            row=panel // columns + 1, col=panel % columns + 1, customdata=models[["model", "displacement"]],
            marker={"color": models["displacement"], "coloraxis": "coloraxis", "size": 9,
                "line": {"width": 1, "color": theme.NEUTRAL}},
            hovertemplate="%{customdata[0]}<br>sharpness %{x:.3g}<br>outcome %{y:.4g}<br>"
            "displacement %{customdata[1]:.3g}<extra></extra>",
        )  # fmt: skip
    more = f"; the {PANELS} with the largest partial correlation" if len(result.table) > PANELS else ""
    return figure.update_layout(
        template=theme.template(), height=120 + 260 * rows,
        title=f"{result.outcome} against sharpness at tuned (x, nats), {len(models)} models{more}",
        coloraxis={"colorbar": {"title": "moved"}, "colorscale": theme.scale(theme.LIGHT.sequential)},
    )  # fmt: skip


def intervals(result: Correlations) -> "go.Figure":
    """Raw and partial correlation of each predictor with its 95 % interval."""
    figure = theme.figure(
        title=f"Rank correlation of sharpness with {result.outcome}",
        x="Spearman correlation", y="",
    )  # fmt: skip
    table = result.table.iloc[::-1]
    for kind, color, symbol in (("raw", theme.NEUTRAL, "circle"), ("partial", theme.NEW, "diamond")):
        figure.add_scatter(
            x=table[kind], y=table["predictor"], mode="markers",
            name="raw" if kind == "raw" else "given displacement",
            marker={"color": color, "symbol": symbol, "size": 10},
            error_x={
                "type": "data", "symmetric": False, "array": table[f"{kind}_high"] - table[kind],
                "arrayminus": table[kind] - table[f"{kind}_low"], "thickness": 1,
            },
            customdata=table[[f"{kind}_p", f"{kind}_holm"]],
            hovertemplate="%{y}: %{x:+.2f}, p %{customdata[0]:.3g}, after Holm %{customdata[1]:.3g}",
        )  # fmt: skip
    theme.threshold(figure, "", x=0)
    return figure.update_layout(height=180 + 30 * len(table)).update_xaxes(range=[-1.05, 1.05])


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
