"""The answers of a task's grafts and of the models that they are compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diagnostics.analyses.skills.evaluator import GraftEvaluator, Key
from diagnostics.analyses.skills.size_selection import SizeChoice
from diagnostics.evaluation.answers import Answers, AnswerScores, temperature

# Interpolations of the whole update, as controls, with their alphas.
INTERPOLATIONS = {f"interpolation {alpha:g}": alpha for alpha in (0.25, 0.5, 0.75)}
HALF_UPDATE = "interpolation 0.5"
# Random regions drawn for the reported size; every other size gets one.
RANDOM = 3


@dataclass(kw_only=True)
class TaskMeasurements:
    """Everything that was measured for one task."""

    task: str
    report: dict[str, Answers]  # of each model to the report rows
    points: dict[str, dict[str, Any]]  # how each model of the curve was made: method, entries and more
    other_sets: dict[Key, dict[str, Answers]]  # of each model to the keep and OOD sets, by role and set
    on_other_tasks: dict[str, Answers] = field(default_factory=dict)  # of the graft, to report rows
    choice: SizeChoice | None = None  # the regions; None where there was nothing to localise
    reason: str = ""  # why there was nothing; else empty
    temperature: float = math.nan  # fitted to tuned on the selection rows
    scores: AnswerScores = field(init=False)  # of all models on the report rows, as of the last `compare`

    def compare(self, draws: int, seed: int, where: str) -> None:
        """Score all models on the report rows."""
        self.scores = AnswerScores(self.report, draws=draws, seed=seed, where=where)

    def mean_rel(self, method: str) -> float:
        """The share of the gain that a control of the chosen size keeps, averaged over its draws."""
        assert self.choice is not None
        control = (method, self.choice.size)
        names = [
            name for name, point in self.points.items() if (point["method"], point["entries"]) == control
        ]
        return float(np.mean([self.scores.rel(name).value for name in names]))


def measure_ends(
    evaluator: GraftEvaluator, tasks: Sequence[str], keys: Sequence[Key]
) -> dict[str, dict[Key, Answers]]:
    """Answers of base, tuned and their interpolations to the sets of `keys`; of both also to selection."""
    selection = [(task, "selection") for task in tasks]
    ends = {"tuned": evaluator.answers([*keys, *selection])}
    if not evaluator.movement.entries and not evaluator.outside:
        return ends | dict.fromkeys(["base", "ones", *INTERPOLATIONS], ends["tuned"])
    ends["ones"] = evaluator.full_graft(keys) if evaluator.outside else ends["tuned"]
    evaluator.two_sided.become("base")
    ends["base"] = evaluator.answers([*keys, *selection])
    return ends | {name: evaluator.interpolated(alpha, keys) for name, alpha in INTERPOLATIONS.items()}


def start_measurements(
    task: str, ends: Mapping[str, Mapping[Key, Answers]], keys: Sequence[Key], evaluator: GraftEvaluator
) -> TaskMeasurements:
    """The measurements of a task before any search, and whether there is anything to search for."""
    total = evaluator.movement.total
    points: dict[str, dict[str, Any]] = {"base": {"method": "base", "entries": 0}}
    for name, alpha in INTERPOLATIONS.items():
        points[name] = {"method": "interpolation", "entries": total, "alpha": alpha}
    points |= {name: {"method": name, "entries": total} for name in ("ones", "tuned")}
    reason = ""
    if not evaluator.movement.total_moved:
        reason = "tuning changed no eligible entry" if evaluator.outside else "tuned equals base"
    others = [key for key in keys if key[0] in ("keep", "ood")]
    measured = TaskMeasurements(
        task=task, points=points, reason=reason,
        report={model: ends[model][task, "report"] for model in points},
        other_sets={key: {model: ends[model][key] for model in points} for key in others},
    )  # fmt: skip
    selection = ends["tuned"][task, "selection"]
    if selection.logs is not None and len(selection.truth):
        measured.temperature = temperature(selection)
    return measured


def measure_regions(
    measured: TaskMeasurements, evaluator: GraftEvaluator, keys: Sequence[Key], seed: int
) -> None:
    """Measure all regions of a task on its report rows, and the chosen one on all sets."""
    choice = measured.choice
    assert choice is not None
    search, report_key = choice.search, (measured.task, "report")
    searched = "movement" if search.mode == "movement" else "learned"
    for size, learned in choice.regions.items():
        regions = {"movement": search.region(None, size)}
        if search.mode != "movement":
            regions["learned"] = learned
        for draw in range(RANDOM if size == choice.size else 1):
            regions[f"random {draw}"] = evaluator.movement.random(learned, seed + draw)
        for name, region in regions.items():
            method, *_ = name.split()
            point = f"{name} of {size}"
            measured.report[point] = evaluator.graft(region, [report_key])[report_key]
            measured.points[point] = {"method": method, "entries": size}
            if method == searched:
                alone, chosen = size in choice.own_search, size == choice.size
                measured.points[point] |= {"kept": choice.kept[size], "alone": alone, "chosen": chosen}
    graft, complement = evaluator.graft(choice.chosen, keys), evaluator.complement(choice.chosen, keys)
    measured.report |= {"graft": graft[report_key], "complement": complement[report_key]}
    left = evaluator.movement.total - choice.size
    measured.points["complement"] = {"method": "complement", "entries": left}
    for key, by_model in measured.other_sets.items():
        by_model |= {"graft": graft[key], "complement": complement[key]}
    measured.on_other_tasks = {task: graft[task, purpose] for task, purpose in keys if purpose == "report"}
