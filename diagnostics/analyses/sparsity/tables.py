"""The tables and numbers of essential sparsity, out of what was measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.analyses.sparsity.dropping_point import ROUNDING, DroppingPoint, dropping
from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, RANDOM, SIDES, MaskEvaluator, Metric, Regime
from diagnostics.analyses.sparsity.grid import BY_ROW, COMPARED, SparsitySettings, higher
from diagnostics.numerics import row_bootstrap
from diagnostics.numerics.estimates import Z95
from probes.checkpoints.pair import Side

if TYPE_CHECKING:
    import pandas as pd

# Where layers are shown of a side without a dropping point above 0.
HALF = 0.5
DEPLOYED = "2:4"


@dataclass(frozen=True, kw_only=True)
class SparsityMeasurements:
    """Everything that was measured, with its noise.

    Attributes:
        roles: metric by role.
        values: metric at every point, by role.
        drawn: the same with rows drawn anew.
        losses: task loss at every point in nats a token; None where rows have choices or labels.
        drops: where each curve drops, by role, model and regime.
    """

    bench: MaskEvaluator
    ask: SparsitySettings
    roles: Mapping[str, Metric]
    patterns: Sequence[str]
    values: Mapping[str, np.ndarray]
    drawn: Mapping[str, np.ndarray]
    losses: np.ndarray | None
    drops: Mapping[tuple[str, Side, Regime], DroppingPoint]

    @classmethod
    def of(
        cls, bench: MaskEvaluator, ask: SparsitySettings, roles: Mapping[str, Metric], patterns: Sequence[str]
    ) -> "SparsityMeasurements":
        """Estimate where every curve drops."""
        generator = np.random.default_rng(ask.seed)
        values, drawn = {}, {}
        for role, metric in roles.items():
            rows = bench.rows(role, metric)
            values[role] = row_bootstrap.mean_loss(rows)
            drawn[role] = row_bootstrap.mean_drawn(rows, ask.draws, generator)
        tokens = all(each.unit == "token" for (role, _), each in bench.sets.items() if role == "task")
        drops: dict[tuple[str, Side, Regime], DroppingPoint] = {}
        for role, metric in roles.items():
            count = bench.count(role)
            shapes = {each.task.shape for (own, _), each in bench.sets.items() if own == role}
            for model, regime in bench.curves:
                places = bench.curve(model, MAGNITUDE, regime)
                drops[role, model, regime] = dropping(
                    np.array([bench.points[place].sparsity for place in places]),
                    higher(values[role], metric)[places],
                    higher(drawn[role], metric)[:, places],
                    tolerance=ask.allowed,
                    relative=metric == "loss",
                    step=ask.grid[1],
                    rows=count,
                    # That no row differs is no proof that none would.
                    least=Z95 / count if metric == "accuracy" and shapes <= set(BY_ROW) else 0.0,
                )
        return cls(
            bench=bench, ask=ask, roles=roles, patterns=patterns, values=values, drawn=drawn, drops=drops,
            losses=bench.values("task", "loss") if tokens else None,
        )  # fmt: skip

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Every table."""
        masks = self.bench.masks
        return {
            "points": self.points(),
            "curve": self.curve(),
            "patterns": self.by_pattern(),
            "layers": self.layers(),
            "overlap": masks.overlaps(sorted({COMPARED, *self.ask.grid} - {0.0})),
        }

    def share_of_model(self, model: Side) -> float:
        """Share of a side's parameters that the scope is; what shares its storage counts once."""
        checkpoint = getattr(self.bench.host.pair, model)
        return min(1.0, self.bench.masks.entries / checkpoint.parameters)

    def at(self, model: Side, pattern: str, sparsity: float | None = None) -> int | None:
        """Which point is a zero-shot one of a pattern, at a sparsity; None if it was not measured."""
        for place in self.bench.curve(model, pattern, "zero_shot"):
            if sparsity is None or abs(self.bench.points[place].sparsity - sparsity) < ROUNDING:
                return place
        return None

    # --- tables ---

    def points(self) -> "pd.DataFrame":
        """A row for every curve: where it drops; NaN where these rows cannot tell."""
        import pandas as pd

        rows = []
        for (role, model, regime), drop in self.drops.items():
            metric = self.roles[role]
            known = drop.decided
            dense, deployed = (self.at(model, MAGNITUDE, 0.0), self.at(model, DEPLOYED))
            if regime != "zero_shot":
                dense, deployed = self.bench.dense(model, regime), None
            assert dense is not None
            rows.append(
                {
                    "role": role, "model": model, "regime": regime, "metric": metric,
                    "rule": self.ask.rule(metric), "value": self.values[role][dense],
                    "dropping_point": drop.paper.at if known else math.nan,
                    "until": drop.paper.until if known else math.nan,
                    "rho": drop.paper.rho if known else math.nan, "crossings": drop.paper.crossings,
                    "robust_at": drop.at if known else math.nan,
                    "robust_until": drop.until if known else math.nan,
                    "robust_point": drop.point if known else math.nan,
                    "low": drop.low if known else math.nan, "high": drop.high if known else math.nan,
                    "reached": drop.reached, "decided": known, "verdict": drop.verdict,
                    "hinge": drop.hinge.at, "slope_before": drop.hinge.before,
                    "slope_after": drop.hinge.after, "dbic": drop.hinge.dbic, "fitted_to": drop.hinge.until,
                    "whole_model_share": drop.paper.at * self.share_of_model(model) if known else math.nan,
                    "value_2_4": math.nan if deployed is None else self.values[role][deployed],
                    "allowed": drop.allowed, "half_width": drop.half_width, "rows": self.bench.count(role),
                    "rows_needed": drop.rows_needed,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def curve(self) -> "pd.DataFrame":
        """A row for every point and role; `drop` is from the same side without a mask, above 0 is worse."""
        import pandas as pd

        rows = []
        for role, metric in self.roles.items():
            low, high = np.quantile(self.drawn[role], [0.025, 0.975], axis=0)
            value, drawn = higher(self.values[role], metric), higher(self.drawn[role], metric)
            own = np.array([self.bench.dense(point.model, point.regime) for point in self.bench.points])
            drop_low, drop_high = np.quantile(drawn[:, own] - drawn, [0.025, 0.975], axis=0)
            for place, point in enumerate(self.bench.points):
                rows.append(
                    {
                        "model": point.model, "pattern": point.pattern, "sparsity": point.sparsity,
                        "role": role, "metric": metric, "value": self.values[role][place],
                        "low": low[place], "high": high[place], "regime": point.regime,
                        "realised": point.realised, "drop": value[own[place]] - value[place],
                        "drop_low": drop_low[place], "drop_high": drop_high[place],
                    }
                )  # fmt: skip
        order = {pattern: place for place, pattern in enumerate((MAGNITUDE, RANDOM, *self.patterns))}
        table = pd.DataFrame(rows)
        table["order"] = table["pattern"].map(order)
        by = ["role", "regime", "model", "order", "sparsity"]
        return table.sort_values(by, ascending=[False, False, True, True, True], ignore_index=True).drop(
            columns="order"
        )

    def by_pattern(self) -> "pd.DataFrame":
        """N:M patterns beside the free and the random mask of the same sparsity, with what each costs."""
        import pandas as pd

        rows = []
        for model in SIDES:
            dense = self.at(model, MAGNITUDE, 0.0)
            assert dense is not None
            shown = [
                (pattern, place)
                for pattern in self.patterns
                if (place := self.at(model, pattern)) is not None
            ]
            levels = sorted({self.bench.points[place].sparsity for _, place in shown})
            free = [
                (pattern, place)
                for sparsity in levels
                for pattern in (MAGNITUDE, RANDOM)
                if (place := self.at(model, pattern, sparsity)) is not None
            ]
            for pattern, place in (*free, *shown):
                point = self.bench.points[place]
                kept = self.bench.masks.kept(model, pattern, point.sparsity)
                for role, metric in self.roles.items():
                    value, drawn = self.values[role], higher(self.drawn[role], metric)
                    low, high = np.quantile(drawn[:, dense] - drawn[:, place], [0.025, 0.975])
                    ratio = math.nan
                    if role == "task" and self.losses is not None:
                        ratio = math.exp(min(self.losses[place] - self.losses[dense], 700.0))
                    rows.append(
                        {
                            "model": model, "pattern": pattern, "sparsity": point.sparsity, "role": role,
                            "metric": metric, "value": value[place],
                            "drop": higher(value, metric)[dense] - higher(value, metric)[place],
                            "drop_low": low, "drop_high": high, "perplexity_ratio": ratio,
                            "kept_l1": kept.kept_l1, "kept_l2": kept.kept_l2, "regime": point.regime,
                        }
                    )  # fmt: skip
        columns = ["model", "pattern", "sparsity", "role", "metric", "value", "drop", "drop_low", "drop_high",
                   "perplexity_ratio", "kept_l1", "kept_l2", "regime"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def shown_at(self, model: Side) -> tuple[float, bool]:
        """The sparsity at which layers are shown, and whether it is the dropping point."""
        drop = self.drops["task", model, "zero_shot"]
        own = drop.decided and drop.paper.at > 0
        return (drop.paper.at, True) if own else (HALF, False)

    def layers(self) -> "pd.DataFrame":
        """Each matrix of both sides at the side's dropping point."""
        import pandas as pd

        return pd.concat(
            [self.bench.masks.layers(model, self.shown_at(model)[0]) for model in SIDES], ignore_index=True
        )

    # --- numbers ---

    def metrics(self, tables: "Mapping[str, pd.DataFrame]") -> dict[str, float | int]:
        """The numbers that a policy may judge; what these rows cannot tell is left out."""
        found: dict[str, Any] = {}
        for model in SIDES:
            drop = self.drops["task", model, "zero_shot"]
            found |= {f"hinge_{model}": drop.hinge.at, f"dbic_{model}": drop.hinge.dbic}
            if drop.decided:
                found |= {
                    f"dropping_point_{model}": drop.paper.at, f"reached_{model}": int(drop.reached),
                    f"robust_point_{model}": drop.point, f"robust_point_{model}_low": drop.low,
                    f"robust_point_{model}_high": drop.high,
                    f"whole_model_share_{model}": drop.paper.at * self.share_of_model(model),
                }  # fmt: skip
            keep = self.drops.get(("keep", model, "zero_shot"))
            if keep is not None and keep.decided:
                found[f"dropping_point_keep_{model}"] = keep.paper.at
            layers = tables["layers"][tables["layers"]["model"] == model]
            if self.shown_at(model)[1]:
                found[f"fullest_{model}"] = layers["sparsity"].max()
            found[f"zeros_{model}"] = float(
                (layers["zero"] * layers["entries"]).sum() / layers["entries"].sum()
            )
            found |= self.deployed(model, tables["patterns"])
        found |= self.shift() | self.tuned_behind_the_mask() | self.likeness(tables["overlap"])
        task = [drop for (role, _, _), drop in self.drops.items() if role == "task"]
        found |= {
            "scope_share": self.share_of_model("tuned"),
            "evaluations": self.bench.evaluations,
            "rows_needed": max(drop.rows_needed for drop in task),
            "unscored": self.bench.unscored,
            "truncated": sum(each.truncated for each in self.bench.sets.values()),
            **{f"rows_{role}": self.bench.count(role) for role in self.roles},
        }
        return {
            name: value if isinstance(value, int) else float(value)
            for name, value in found.items()
            if not math.isnan(value)
        }

    def deployed(self, model: Side, patterns: "pd.DataFrame") -> dict[str, Any]:
        """What a side is without a mask and at 2:4."""
        dense = self.at(model, MAGNITUDE, 0.0)
        assert dense is not None
        found = {f"value_{model}": self.values["task"][dense]}
        at = patterns[
            (patterns["model"] == model) & (patterns["pattern"] == DEPLOYED) & (patterns["role"] == "task")
        ]
        for row in at.to_dict("records"):
            found |= {
                f"value_2_4_{model}": row["value"], f"drop_2_4_{model}": row["drop"],
                f"perplexity_ratio_2_4_{model}": row["perplexity_ratio"],
            }  # fmt: skip
        return found

    def shift(self) -> dict[str, float]:
        """How far tuning moved the robust point; nothing where neither side falls or rows do not suffice."""
        base, tuned = (self.drops["task", model, "zero_shot"] for model in SIDES)
        if not (base.decided and tuned.decided) or not (base.reached or tuned.reached):
            return {}
        low, high = np.quantile(tuned.points - base.points, [0.025, 0.975])
        return {"shift": tuned.point - base.point, "shift_low": float(low), "shift_high": float(high)}

    def tuned_behind_the_mask(self) -> dict[str, float]:
        """Where base drops when what is left is tuned."""
        drop = self.drops.get(("task", "base", "masked_finetune"))
        if drop is None or not drop.decided:
            return {}
        return {
            "finetuned_point": drop.paper.at, "finetuned_reached": int(drop.reached),
            "finetuned_robust_point": drop.point, "finetuned_robust_point_low": drop.low,
            "finetuned_robust_point_high": drop.high,
        }  # fmt: skip

    def likeness(self, overlap: "pd.DataFrame") -> dict[str, float]:
        """How alike the masks are."""
        at = overlap[(overlap["sparsity"] - COMPARED).abs() < ROUNDING].iloc[0]
        return {f"{name}_at_0_3": float(at[name]) for name in ("kappa", "revived", "delta_low")}
