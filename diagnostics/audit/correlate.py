"""Several models tuned from one base, out of their audits: does sharpness go with quality on OOD rows?

Question and warning are those of `diagnostics.numerics.rank_correlation`: every correlation raw and given
displacement, none below 12 models. An outcome is read at tuned, at the middle of the path, or at each best α.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diagnostics.numerics.rank_correlation import LEAST, correlations
from diagnostics.plotting import theme
from diagnostics.plotting.charts import Style, panels, points
from diagnostics.store.audit_store import Audit, load
from diagnostics.store.files import replacing, write_table
from probes.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Where = Literal["tuned", "half", "best"]
Metric = Literal["loss", "accuracy"]
WHOLE = "all blocks"
# Parameters of `sharpness` that its values do not depend on.
FREE = {"layer_alphas", "alphas", "curvature", "batch_tokens", "sharpen", "trust_remote_code"}


@dataclass(frozen=True, kw_only=True)
class Correlations:
    """Correlations over tuned models of one base.

    Attributes:
        models: a row an audit: model, displacement, the outcome, and sharpness at tuned of all blocks and of
            every layer, `sharpness:NAME`.
        table: of `diagnostics.numerics.rank_correlation.correlations`.
        outcome: what is to be predicted, in words.
    """

    models: "pd.DataFrame"
    table: "pd.DataFrame"
    outcome: str
    notes: tuple[str, ...] = field(default=())

    def figures(self) -> "dict[str, go.Figure]":
        """Sharpness against the outcome, a panel a predictor, and the correlations with their intervals."""
        return draw(self)

    def write(self, out: Path) -> None:
        """Write both tables as parquet and the figures as one page that opens offline.

        Raises:
            OSError: it cannot be written.
        """
        out.mkdir(parents=True, exist_ok=True)
        write_table(out / "models.parquet", self.models)
        write_table(out / "correlations.parquet", self.table)
        with replacing(out / "correlations.html") as part:
            part.write_text(page(self), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """As JSON keeps it."""
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
    """Correlate sharpness at tuned, of all blocks and of each layer, with how models do on OOD rows.

    Args:
        audits: with `sharpness` and OOD rows each, of one base on the same rows; 12 or more to correlate.
        metric: of the OOD rows, their sets averaged.
        where: the place on the path: tuned, its middle (WiSE-FT's default), or each model's best α.
        permutations, seed: as of `correlations`.

    Raises:
        InputError: fewer than two audits, one without what is needed, or audits that do not compare; the
            message names it.
    """
    import pandas as pd

    opened = [one if isinstance(one, Audit) else load(one) for one in audits]
    names = [str(one.path or one.tuned["ref"]) for one in opened]
    if len(opened) < 2:
        raise InputError(f"{len(opened)} audit given; a correlation is over several, one a tuned model")
    alike(opened, names)
    rows = [one_model(each, name, metric, where) for each, name in zip(opened, names, strict=True)]
    models = pd.DataFrame(rows)
    place = {"tuned": "at tuned", "half": "half-way", "best": "at each model's best alpha"}[where]
    found = correlations(
        models,
        outcome="outcome",
        predictors=[str(column) for column in models if str(column).startswith("sharpness:")],
        permutations=permutations,
        seed=seed,
    )
    found["predictor"] = found["predictor"].str.removeprefix("sharpness:")
    notes = [
        "Learning rate and length of tuning move sharpness and quality alike: read the partial column, given "
        "how far each model moved. No correlation makes a sharper model a worse one."
    ]
    if len(models) < LEAST:
        notes.insert(0, f"{len(models)} models: a correlation is told from {LEAST} on.")
    return Correlations(models=models, table=found, outcome=f"OOD {metric} {place}", notes=tuple(notes))


def alike(audits: Sequence[Audit], names: Sequence[str]) -> None:
    """Refuse audits whose sharpness does not compare.

    Raises:
        InputError: another base, other rows or other parameters; the message names the first that differs.
    """
    for one, name in zip(audits, names, strict=True):
        result = one.results.get("sharpness")
        if result is None:
            raise InputError(
                f"{name}: has no result of sharpness; run `tunescope audit` with --task F and --ood F"
            )
        if not any(row == "ood" for row in result.tables["path"]["role"]):
            raise InputError(f"{name}: its sharpness was measured without OOD rows; run it with --ood NAME=F")
    what: Mapping[str, Any] = {
        "bases": lambda one: one.base.get("fingerprint") or one.base["ref"],
        "task rows": lambda one: [each["fingerprint"] for each in one.data.get("task", [])],
        "OOD rows": lambda one: sorted(each["fingerprint"] for each in one.data.get("ood", [])),
        "parameters of sharpness": lambda one: {
            key: value for key, value in one.results["sharpness"].parameters.items() if key not in FREE
        },
    }
    for words, of in what.items():
        for one, name in zip(audits, names, strict=True):
            if of(one) != of(audits[0]):
                text = f"{name}: has other {words} than {names[0]}; sharpness compares only at equal ones"
                raise InputError(text)


def one_model(audit: Audit, name: str, metric: Metric, where: Where) -> dict[str, Any]:
    """An audit as a row of the table of models."""
    result = audit.results["sharpness"]
    layers, path = result.tables["layers"], result.tables["path"]
    alpha = {"tuned": 1.0, "half": 0.5, "best": float(result.metrics["best_alpha"])}[where]
    here = path[(path["role"] == "ood") & (path["metric"] == metric) & (path["alpha"] == alpha)]
    if here.empty:
        raise InputError(f"{name}: its path has no alpha {alpha:g}; add it with --set sharpness.alphas=…")
    row: dict[str, Any] = {
        "model": name,
        "displacement": math.sqrt(float((layers["moved"].astype(float) ** 2).sum())),
        "outcome": float(here["value"].mean()),
        "alpha": alpha,
        f"sharpness:{WHOLE}": float(result.metrics.get("sharpness_tuned", math.nan)),
    }
    return row | {
        f"sharpness:{layer}": float(value)
        for layer, value in zip(layers["name"], layers["sharpness_tuned"], strict=True)
    }


# Panels of the scatter: more would not be read.
MOST = 9
KINDS = {
    "raw": Style("raw", theme.NEUTRAL, size=10),
    "partial": Style("given displacement", theme.NEW, "diamond", size=10),
}


def draw(correlations: Correlations) -> "dict[str, go.Figure]":
    """Both figures; without a correlation only the scatter."""
    figures = {"scatter": draw_scatter(correlations)}
    if correlations.table["raw"].notna().any():
        figures["correlations"] = draw_intervals(correlations)
    return figures


def draw_scatter(correlations: Correlations) -> "go.Figure":
    """Sharpness against the outcome, a panel a predictor, coloured by displacement."""
    table, models = correlations.table, correlations.models
    order = table["partial"].abs().sort_values(ascending=False, na_position="last").index
    names = table.loc[order, "predictor"].tolist()[:MOST]
    columns, rows = min(3, len(names)), -(-len(names) // 3)
    tail = f"; the {MOST} of {len(table)} with the largest partial one" if len(table) > MOST else ""
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
    for kind, style in KINDS.items():
        hover = f"{{y}}: {{x:+.2f}}, p {{{kind}_p:.3g}}, after Holm {{{kind}_holm:.3g}}"
        points(figure, table, kind, "predictor", style, hover, x_interval=(f"{kind}_low", f"{kind}_high"))
    return theme.threshold(figure, x=0).update_xaxes(range=[-1.05, 1.05])


def page(made: Correlations) -> str:
    """Both pictures and the notes as one page that opens offline."""
    import html

    from plotly.io import to_html

    figures = "".join(
        to_html(figure, full_html=False, include_plotlyjs=place == 0, config={"displaylogo": False})
        for place, figure in enumerate(draw(made).values())
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in made.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tunescope correlate</title>'
        f"<style>body{{font-family:{theme.FONT};margin:2rem auto;max-width:1200px;padding:0 1rem}}</style>"
        f"</head><body><h1>{html.escape(made.outcome)} over {len(made.models)} models</h1>"
        f"{notes}{figures}</body></html>"
    )
