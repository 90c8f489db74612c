"""The tables and metrics of essential sparsity."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analyses.sparsity.dropping_point import ROUNDING, DroppingPoint, estimate_dropping_point
from diagnostics.analyses.sparsity.evaluator import MAGNITUDE, RANDOM, SIDES, MaskEvaluator, Metric, Regime
from diagnostics.analyses.sparsity.grid import BY_ROW, COMPARED_SPARSITY, SparsitySettings, higher_is_better
from diagnostics.numerics import row_bootstrap
from diagnostics.numerics.estimates import Z95
from probes.checkpoints.pair import Side

# Where the layers of a side without a dropping point above 0 are shown.
DEFAULT_SPARSITY = 0.5
DEPLOYED = "2:4"
# Columns of `points` that need a decided dropping point.
WITHHELD = (
    "dropping_point", "until", "rho", "robust_at", "robust_until", "robust_point", "low", "high",
    "whole_model_share",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SparsityMeasurements:
    """The metrics at all points, their bootstrap draws, and the dropping points."""

    evaluator: MaskEvaluator
    settings: SparsitySettings
    roles: Mapping[str, Metric]  # metric by role
    patterns: Sequence[str]
    values: Mapping[str, np.ndarray]  # metric at every point, by role
    drawn: Mapping[str, np.ndarray]  # the same on bootstrap draws of the rows
    losses: np.ndarray | None  # task loss at every point in nats a token; None for choices and labels
    drops: Mapping[tuple[str, Side, Regime], DroppingPoint]  # dropping points by role, model and regime

    @classmethod
    def of(
        cls,
        evaluator: MaskEvaluator,
        settings: SparsitySettings,
        roles: Mapping[str, Metric],
        patterns: Sequence[str],
    ) -> "SparsityMeasurements":
        """Estimate the dropping point of every curve."""
        generator = np.random.default_rng(settings.seed)
        values, drawn = {}, {}
        for role, metric in roles.items():
            rows = evaluator.rows(role, metric)
            values[role] = row_bootstrap.mean_loss(rows)
            drawn[role] = row_bootstrap.mean_drawn(rows, settings.draws, generator)
        by_token = all(e.unit == "token" for (role, _), e in evaluator.sets.items() if role == "task")
        drops: dict[tuple[str, Side, Regime], DroppingPoint] = {}
        for role, metric in roles.items():
            count = evaluator.count(role)
            shapes = {e.task.shape for (set_role, _), e in evaluator.sets.items() if set_role == role}
            for model, regime in evaluator.curves:
                indices = evaluator.curve(model, MAGNITUDE, regime)
                drops[role, model, regime] = estimate_dropping_point(
                    np.array([evaluator.points[index].sparsity for index in indices]),
                    higher_is_better(values[role], metric)[indices],
                    higher_is_better(drawn[role], metric)[:, indices],
                    tolerance=settings.tolerance, relative=metric == "loss", step=settings.grid[1],
                    rows=count,
                    # That no row differs does not prove that none would.
                    least=Z95 / count if metric == "accuracy" and shapes <= set(BY_ROW) else 0.0,
                )  # fmt: skip
        return cls(
            evaluator=evaluator, settings=settings, roles=roles, patterns=patterns, values=values,
            drawn=drawn, drops=drops, losses=evaluator.values("task", "loss") if by_token else None,
        )  # fmt: skip

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Every table."""
        masks = self.evaluator.masks
        layers = [masks.layers(model, self.layer_sparsity(model)[0]) for model in SIDES]
        return {
            "points": self._points(), "curve": self._curve(), "patterns": self._patterns(),
            "layers": pd.concat(layers, ignore_index=True),
            "overlap": masks.overlaps(sorted({COMPARED_SPARSITY, *self.settings.grid} - {0.0})),
        }  # fmt: skip

    def share_of_model(self, model: Side) -> float:
        """Share of a side's parameters in the scope; shared storage counts once."""
        checkpoint = getattr(self.evaluator.two_sided.pair, model)
        return min(1.0, self.evaluator.masks.entries / checkpoint.parameters)

    def index_of(self, model: Side, pattern: str, sparsity: float | None = None) -> int | None:
        """Index of a zero-shot point of a pattern, at a sparsity; None if it was not measured."""
        for index in self.evaluator.curve(model, pattern, "zero_shot"):
            if sparsity is None or abs(self.evaluator.points[index].sparsity - sparsity) < ROUNDING:
                return index
        return None

    def _points(self) -> "pd.DataFrame":
        """One row a curve; NaN where the rows cannot tell."""
        rows = []
        for (role, model, regime), drop in self.drops.items():
            metric = self.roles[role]
            dense = self.evaluator.dense(model, regime)
            deployed = self.index_of(model, DEPLOYED) if regime == "zero_shot" else None
            assert dense is not None
            row = {
                "role": role, "model": model, "regime": regime, "metric": metric,
                "rule": self.settings.rule(metric), "value": self.values[role][dense],
                "dropping_point": drop.paper.at, "until": drop.paper.until, "rho": drop.paper.rho,
                "crossings": drop.paper.crossings, "robust_at": drop.at, "robust_until": drop.until,
                "robust_point": drop.point, "low": drop.low, "high": drop.high,
                "reached": drop.reached, "decided": drop.decided, "verdict": drop.verdict,
                "hinge": drop.hinge.at, "slope_before": drop.hinge.before,
                "slope_after": drop.hinge.after, "dbic": drop.hinge.dbic, "fitted_to": drop.hinge.until,
                "whole_model_share": drop.paper.at * self.share_of_model(model),
                "value_2_4": math.nan if deployed is None else self.values[role][deployed],
                "allowed": drop.allowed, "half_width": drop.half_width, "rows": self.evaluator.count(role),
                "rows_needed": drop.rows_needed,
            }  # fmt: skip
            if not drop.decided:
                row |= dict.fromkeys(WITHHELD, math.nan)
            rows.append(row)
        return pd.DataFrame(rows)

    def _curve(self) -> "pd.DataFrame":
        """One row a point and role; `drop` is from the same side without a mask, above 0 is worse."""
        points, rows = self.evaluator.points, []
        dense = np.array([self.evaluator.dense(point.model, point.regime) for point in points])
        for role, metric in self.roles.items():
            low, high = np.quantile(self.drawn[role], [0.025, 0.975], axis=0)
            value = higher_is_better(self.values[role], metric)
            drawn = higher_is_better(self.drawn[role], metric)
            drop_low, drop_high = np.quantile(drawn[:, dense] - drawn, [0.025, 0.975], axis=0)
            rows += [
                {
                    "model": point.model, "pattern": point.pattern, "sparsity": point.sparsity,
                    "role": role, "metric": metric, "value": self.values[role][index],
                    "low": low[index], "high": high[index], "regime": point.regime,
                    "realised": point.realised, "drop": value[dense[index]] - value[index],
                    "drop_low": drop_low[index], "drop_high": drop_high[index],
                }
                for index, point in enumerate(points)
            ]  # fmt: skip
        order = {pattern: rank for rank, pattern in enumerate((MAGNITUDE, RANDOM, *self.patterns))}
        table = pd.DataFrame(rows)
        table = table.assign(order=table["pattern"].map(order)).sort_values(
            ["role", "regime", "model", "order", "sparsity"], ascending=[False, False, True, True, True]
        )
        return table.drop(columns="order").reset_index(drop=True)

    def _patterns(self) -> "pd.DataFrame":
        """N:M patterns, with magnitude and random masks of the same sparsity."""
        rows, points = [], self.evaluator.points
        for model in SIDES:
            dense = self.index_of(model, MAGNITUDE, 0.0)
            assert dense is not None
            n_of_m = [self.index_of(model, pattern) for pattern in self.patterns]
            sparsities = sorted({points[index].sparsity for index in n_of_m if index is not None})
            indices = [
                *(self.index_of(model, kind, s) for s in sparsities for kind in (MAGNITUDE, RANDOM)), *n_of_m,
            ]  # fmt: skip
            for index in (index for index in indices if index is not None):
                point = points[index]
                kept = self.evaluator.masks.kept(model, point.pattern, point.sparsity)
                for role, metric in self.roles.items():
                    value = higher_is_better(self.values[role], metric)
                    drawn = higher_is_better(self.drawn[role], metric)
                    low, high = np.quantile(drawn[:, dense] - drawn[:, index], [0.025, 0.975])
                    ratio = math.nan
                    if role == "task" and self.losses is not None:
                        ratio = math.exp(min(self.losses[index] - self.losses[dense], 700.0))
                    rows.append(
                        {
                            "model": model, "pattern": point.pattern, "sparsity": point.sparsity,
                            "role": role, "metric": metric, "value": self.values[role][index],
                            "drop": value[dense] - value[index], "drop_low": low, "drop_high": high,
                            "perplexity_ratio": ratio, "kept_l1": kept.kept_l1, "kept_l2": kept.kept_l2,
                            "regime": point.regime,
                        }
                    )  # fmt: skip
        columns = ["model", "pattern", "sparsity", "role", "metric", "value", "drop", "drop_low", "drop_high",
                   "perplexity_ratio", "kept_l1", "kept_l2", "regime"]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def layer_sparsity(self, model: Side) -> tuple[float, bool]:
        """The sparsity at which layers are shown, and whether it is the dropping point."""
        drop = self.drops["task", model, "zero_shot"]
        at_dropping_point = drop.decided and drop.paper.at > 0
        return (drop.paper.at, True) if at_dropping_point else (DEFAULT_SPARSITY, False)

    def metrics(self, tables: "Mapping[str, pd.DataFrame]") -> dict[str, float | int]:
        """The metrics, without those that the rows cannot tell."""
        values: dict[str, Any] = {}
        for model in SIDES:
            drop = self.drops["task", model, "zero_shot"]
            values |= {f"hinge_{model}": drop.hinge.at, f"dbic_{model}": drop.hinge.dbic}
            if drop.decided:
                values |= {
                    f"dropping_point_{model}": drop.paper.at, f"reached_{model}": int(drop.reached),
                    f"robust_point_{model}": drop.point, f"robust_point_{model}_low": drop.low,
                    f"robust_point_{model}_high": drop.high,
                    f"whole_model_share_{model}": drop.paper.at * self.share_of_model(model),
                }  # fmt: skip
            keep = self.drops.get(("keep", model, "zero_shot"))
            if keep is not None and keep.decided:
                values[f"dropping_point_keep_{model}"] = keep.paper.at
            layers = tables["layers"][tables["layers"]["model"] == model]
            if self.layer_sparsity(model)[1]:
                values[f"fullest_{model}"] = layers["sparsity"].max()
            values[f"zeros_{model}"] = (layers["zero"] * layers["entries"]).sum() / layers["entries"].sum()
            values |= self._deployed(model, tables["patterns"])
        values |= self._shift() | self._finetuned()
        overlap = tables["overlap"]
        compared = overlap[(overlap["sparsity"] - COMPARED_SPARSITY).abs() < ROUNDING].iloc[0]
        values |= {f"{name}_at_0_3": compared[name] for name in ("kappa", "revived", "delta_low")}
        task = [drop for (role, _, _), drop in self.drops.items() if role == "task"]
        values |= {
            "scope_share": self.share_of_model("tuned"), "evaluations": self.evaluator.evaluations,
            "rows_needed": max(drop.rows_needed for drop in task), "unscored": self.evaluator.unscored,
            "truncated": sum(encoded.truncated for encoded in self.evaluator.sets.values()),
            **{f"rows_{role}": self.evaluator.count(role) for role in self.roles},
        }  # fmt: skip
        plain = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        return {name: value for name, value in plain.items() if not math.isnan(value)}

    def _deployed(self, model: Side, patterns: "pd.DataFrame") -> dict[str, Any]:
        """The task metric of a side without a mask and at 2:4."""
        dense = self.index_of(model, MAGNITUDE, 0.0)
        assert dense is not None
        values = {f"value_{model}": self.values["task"][dense]}
        for row in patterns.query("model == @model and pattern == @DEPLOYED and role == 'task'").to_dict(
            "records"
        ):
            values |= {f"{name}_2_4_{model}": row[name] for name in ("value", "drop", "perplexity_ratio")}
        return values

    def _shift(self) -> dict[str, float]:
        """How far tuning moved the robust point; empty where neither side falls or the rows are too few."""
        base, tuned = (self.drops["task", model, "zero_shot"] for model in SIDES)
        if not (base.decided and tuned.decided) or not (base.reached or tuned.reached):
            return {}
        low, high = np.quantile(tuned.points - base.points, [0.025, 0.975])
        return {"shift": tuned.point - base.point, "shift_low": float(low), "shift_high": float(high)}

    def _finetuned(self) -> dict[str, float]:
        """The dropping point of base with masked fine-tuning."""
        drop = self.drops.get(("task", "base", "masked_finetune"))
        if drop is None or not drop.decided:
            return {}
        return {
            "finetuned_point": drop.paper.at, "finetuned_reached": int(drop.reached),
            "finetuned_robust_point": drop.point, "finetuned_robust_point_low": drop.low,
            "finetuned_robust_point_high": drop.high,
        }  # fmt: skip
