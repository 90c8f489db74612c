"""What a detector kept of its rows: their scores, and of the most telling ones the ratio of every token."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dashboard.state.query import Query
from diagnostics.core.analysis import Result
from diagnostics.plotting import theme
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ROWS = {"set", "role", "row", "ratio", "text"}
TOKENS = {"set", "row", "position", "token", "ratio"}
POINTS = 2_000  # rows that the picture of scores shows
OFFERED = 3_000  # rows that can be picked by name; the picture reaches the others
COLORS = {"task": theme.TUNED, "ood": theme.NEW, "keep": theme.BASE, "guard": theme.NEUTRAL}


@dataclass(frozen=True)
class Detector:
    """One result that has scores of rows.

    Attributes:
        name: the analysis.
    """

    name: str
    result: Result

    @cached_property
    def rows(self) -> "pd.DataFrame":
        """The rows that have a score."""
        table = self.result.tables["rows"]
        return table[table["ratio"].notna()]

    @cached_property
    def kept(self) -> set[tuple[str, int]]:
        """The rows whose tokens are kept, as (set, row)."""
        table = self.result.tables["tokens"]
        return {(str(name), int(row)) for name, row in zip(table["set"], table["row"], strict=True)}

    @cached_property
    def scores(self) -> list[str]:
        """The scores of the rows by name, the ratio first."""
        judged = self.result.tables.get("detection")
        known = list(dict.fromkeys(judged["score"])) if judged is not None and "score" in judged else []
        return list(dict.fromkeys(["ratio", *(str(name) for name in known if name in self.rows)]))

    @cached_property
    def heat(self) -> float:
        """The ratio of a token, in nats, that is shown at full strength: few are further from 0."""
        sizes = self.result.tables["tokens"]["ratio"].abs().to_numpy(dtype=float)
        return float(np.quantile(sizes, 0.98)) or 1.0 if len(sizes) else 1.0

    def key(self, row: "pd.Series") -> str:
        """What an address calls a row."""
        return f"{int(row['row'])} {row['set']}"

    def picked(self, query: Query) -> "pd.Series":
        """The row that an address names; else the most foreign OOD row whose tokens are kept."""
        number, _, name = query.one("row").partition(" ")
        if number.isdecimal():
            rows = self.rows
            found = rows[(rows["row"] == int(number)) & (rows["set"].astype(str) == name)]
            if len(found):
                return found.iloc[0]
        return self.foremost

    @cached_property
    def foremost(self) -> "pd.Series":
        """The row that is shown unless another is picked."""
        order = self.offered
        outside = order[order["role"] == "ood"]
        return (outside if len(outside) else order).iloc[0]

    @cached_property
    def offered(self) -> "pd.DataFrame":
        """The rows to be picked by name: those whose tokens are kept, then others; most foreign first."""
        order = self.rows.sort_values("ratio", ascending=False, kind="stable")
        telling = np.array([self.has_tokens(row) for _, row in order[["set", "row"]].iterrows()], dtype=bool)
        import pandas as pd

        return pd.concat([order[telling], order[~telling]]).head(OFFERED)

    def has_tokens(self, row: "pd.Series") -> bool:
        """Whether the ratios of a row's tokens are kept."""
        return (str(row["set"]), int(row["row"])) in self.kept

    def tokens(self, row: "pd.Series") -> "pd.DataFrame":
        """The tokens of a row with their ratios, in order."""
        table = self.result.tables["tokens"]
        own = table[(table["set"] == row["set"]) & (table["row"] == row["row"])]
        return own.sort_values("position", kind="stable")

    def shares_below(self, row: "pd.Series", score: str) -> dict[str, tuple[str, float, int]]:
        """Of each set its role, the share of its other rows that score below a row, and their number."""
        found = {}
        for name, part in self.rows.groupby("set", sort=False):
            others = part[part.index != row.name][score].dropna()
            if len(others):
                share = float((others < row[score]).mean())
                found[str(name)] = (str(part["role"].iloc[0]), share, len(others))
        return found

    def thresholds(self, score: str) -> dict[str, float]:
        """The thresholds of a score over all OOD sets, by what they promise."""
        table = self.result.tables.get("detection")
        names = {
            "threshold_95_id_kept": "95 % of the task rows lie below",
            "threshold_95_ood_caught": "95 % of the OOD rows lie above",
        }
        if table is None or not {"ood", "group", "score", *names} <= set(table.columns):
            return {}
        whole = table[(table["ood"] == "all") & table["group"].isna() & (table["score"] == score)]
        return {text: float(whole[name].iloc[0]) for name, text in names.items()} if len(whole) else {}

    def shown(self, score: str) -> "pd.DataFrame":
        """The rows that the picture shows: evenly over the scores of each set, both ends among them."""
        import pandas as pd

        groups = list(self.rows[self.rows[score].notna()].groupby("set", sort=False))
        room = max(2, POINTS // max(1, len(groups)))
        parts = []
        for _, part in groups:
            order = part.sort_values(score, kind="stable")
            places = np.unique(np.linspace(0, len(order) - 1, min(room, len(order))).round().astype(int))
            parts.append(order.iloc[places])
        return pd.concat(parts)

    def draw(self, row: "pd.Series", score: str) -> "go.Figure":
        """Where a row's score falls among those of every set."""
        import plotly.graph_objects as go

        unit = ", nats" if score == "ratio" else ""
        figure = theme.figure(title="", x=f"{score}{unit}: higher is more foreign", y="")
        rows = self.shown(score)
        names = list(dict.fromkeys(rows["set"]))
        for place, name in enumerate(names):
            part = rows[rows["set"] == name]
            role = str(part["role"].iloc[0])
            # Off the middle by a fixed pattern, so that marks of like scores can be told apart.
            jitter = 0.62 * ((np.arange(len(part)) * 0.618034) % 1 - 0.5)
            figure.add_trace(
                go.Scatter(
                    x=part[score],
                    y=place + jitter,
                    mode="markers",
                    name=f"{role} rows",
                    showlegend=False,
                    marker={"color": COLORS.get(role, theme.NEUTRAL), "size": 6, "opacity": 0.55},
                    customdata=[
                        [theme.verbatim(self.key(each)), theme.verbatim(str(each["text"])[:80])]
                        for _, each in part.iterrows()
                    ],
                    hovertemplate="%{customdata[0]}: %{x:.4g}<br>%{customdata[1]}<extra></extra>",
                )
            )
        at = names.index(row["set"]) if row["set"] in names else 0
        picked = {"color": theme.COLORWAY[3], "width": 3}
        figure.add_trace(
            go.Scatter(
                x=[row[score]],
                y=[at],
                mode="markers",
                name="the row picked",
                showlegend=False,
                hoverinfo="skip",
                marker={"symbol": "diamond-open", "size": 16, "color": picked["color"], "line": picked},
            )
        )
        figure.add_vline(x=row[score], line={"color": theme.COLORWAY[3], "width": 1.5})
        for text, value in self.thresholds(score).items():
            line = {"color": theme.NEUTRAL, "dash": "dash", "width": 1.5}
            figure.add_vline(x=value, line=line)
            top = text.endswith("below")
            figure.add_annotation(
                x=value, xref="x", y=1 if top else 0, yref="paper", text=text, xanchor="left",
                yanchor="top" if top else "bottom",
            )  # fmt: skip
        labels = [f"{theme.verbatim(name)} ({rows[rows['set'] == name]['role'].iloc[0]})" for name in names]
        figure.update_yaxes(
            tickvals=list(range(len(names))), ticktext=labels, showgrid=False, range=[len(names) - 0.4, -0.6]
        )
        return figure.update_layout(
            height=110 + 86 * len(names), title=None, margin={"t": 16}, clickmode="event"
        )


def detector(audit: Audit) -> Detector | None:
    """The detector of an audit: a result that has scores of rows and ratios of tokens."""
    for name, result in audit.results.items():
        rows, tokens = result.tables.get("rows"), result.tables.get("tokens")
        if (
            rows is None
            or tokens is None
            or not set(rows.columns) >= ROWS
            or not set(tokens.columns) >= TOKENS
        ):
            continue
        made = Detector(name, result)
        if len(made.rows):
            return made
    return None
