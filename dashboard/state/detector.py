"""What a detector recorded: a score for each row of text, and for some rows the ratio of every token."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dashboard.state.query import Query
from diagnostics.core.analysis import Result
from diagnostics.store.audit_store import Audit

if TYPE_CHECKING:
    import pandas as pd

ROWS = {"set", "role", "row", "ratio", "text"}
TOKENS = {"set", "row", "position", "token", "ratio"}
OFFERED = 3_000  # rows in the list; a click on the figure reaches the others


@dataclass(frozen=True)
class Detector:
    """The result of an analysis that scores rows of text."""

    analysis: str
    result: Result

    @cached_property
    def rows(self) -> "pd.DataFrame":
        """The rows that have a score."""
        table = self.result.tables["rows"]
        return table[table["ratio"].notna()]

    @cached_property
    def scores(self) -> list[str]:
        """The names of the scores, the ratio first."""
        detection = self.result.tables.get("detection")
        names = detection["score"].unique() if detection is not None and "score" in detection else ()
        return list(dict.fromkeys(["ratio", *(str(name) for name in names if name in self.rows)]))

    @cached_property
    def full_strength(self) -> float:
        """The ratio of a token, in nats, that gets the full colour: the 98th percentile of all sizes."""
        sizes = self.result.tables["tokens"]["ratio"].abs().to_numpy(dtype=float)
        return float(np.quantile(sizes, 0.98)) or 1.0 if len(sizes) else 1.0

    @cached_property
    def offered(self) -> "pd.DataFrame":
        """The rows in the list: those with recorded tokens (`has_tokens`) first, then by falling ratio."""
        import pandas as pd

        recorded, keys = (
            pd.MultiIndex.from_arrays([table["set"].astype(str), table["row"].astype(int)])
            for table in (self.result.tables["tokens"], self.rows)
        )
        rows = self.rows.assign(has_tokens=keys.isin(recorded))
        return rows.sort_values(["has_tokens", "ratio"], ascending=False, kind="stable").head(OFFERED)

    @cached_property
    def first_row(self) -> "pd.Series":
        """The row shown until another is selected: the OOD row with the highest ratio."""
        outside = self.offered[self.offered["role"] == "ood"]
        return (outside if len(outside) else self.offered).iloc[0]

    def key(self, row: "pd.Series") -> str:
        """The name of a row in an address."""
        return f"{int(row['row'])} {row['set']}"

    def selected(self, query: Query) -> "pd.Series":
        """The row that an address names, or the first row."""
        number, _, name = query.value("row").partition(" ")
        if number.isdecimal():
            rows = self.rows[(self.rows["row"] == int(number)) & (self.rows["set"].astype(str) == name)]
            if len(rows):
                return rows.iloc[0]
        return self.first_row

    def tokens(self, row: "pd.Series") -> "pd.DataFrame":
        """The tokens of a row with their ratios, in order; empty if they were not recorded."""
        table = self.result.tables["tokens"]
        tokens = table[(table["set"] == row["set"]) & (table["row"] == row["row"])]
        return tokens.sort_values("position", kind="stable")

    def shares_below(self, row: "pd.Series", score: str) -> dict[str, tuple[str, float]]:
        """For each set: its role, and the share of its other rows that score below a row."""
        shares = {}
        for name, part in self.rows.groupby("set", sort=False):
            others = part[part.index != row.name][score].dropna()
            if len(others):
                shares[str(name)] = (str(part["role"].iloc[0]), float((others < row[score]).mean()))
        return shares

    def thresholds(self, score: str) -> dict[str, float]:
        """The thresholds of a score over all OOD sets, by their meaning."""
        table = self.result.tables.get("detection")
        names = {
            "threshold_95_id_kept": "95% of the task rows lie below",
            "threshold_95_ood_caught": "95% of the OOD rows lie above",
        }
        if table is None or not {"ood", "group", "score", *names} <= set(table.columns):
            return {}
        pooled = table[(table["ood"] == "all") & table["group"].isna() & (table["score"] == score)]
        return {text: float(pooled[name].iloc[0]) for name, text in names.items()} if len(pooled) else {}


def detector(audit: Audit) -> Detector | None:
    """The first result of an audit that has scores of rows and ratios of tokens."""
    for name, result in audit.results.items():
        rows, tokens = result.tables.get("rows"), result.tables.get("tokens")
        if rows is None or tokens is None:
            continue
        complete = set(rows.columns) >= ROWS and set(tokens.columns) >= TOKENS
        if complete and rows["ratio"].notna().any():
            return Detector(name, result)
    return None
