"""What is measured of a task's grafts and of what they are held against.

Every point is one set of weights: base, tuned, a region of one in the other, or a control.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diagnostics.analyses.skills.evaluator import GraftEvaluator, Key
from diagnostics.analyses.skills.size_selection import SizeChoice
from diagnostics.evaluation.answers import Answers, AnswerScores, temperature

# Of the whole update, as controls.
ALPHAS = (0.25, 0.5, 0.75)
# Regions drawn for the one that is reported; the others are held against one each.
RANDOM = 3


@dataclass(kw_only=True)
class TaskMeasurements:
    """All that was measured for one task.

    Attributes:
        report: what each model says of the report rows: `base`, `tuned`, and points of the curve.
        points: of each point of the curve how it was made: method, entries, alpha and more.
        elsewhere: what models say of the other sets, by role and set.
        crossed: what the graft says of the report rows of the other tasks.
        choice: the regions; None where there was nothing to localise.
        why: why there was nothing; empty else.
        tempered: the temperature fitted to tuned on the selection rows.
    """

    task: str
    report: dict[str, Answers]
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    elsewhere: dict[Key, dict[str, Answers]] = field(default_factory=dict)
    crossed: dict[str, Answers] = field(default_factory=dict)
    choice: SizeChoice | None = None
    why: str = ""
    tempered: float = math.nan
    scores: AnswerScores | None = None

    def compare(self, draws: int, seed: int, where: str) -> AnswerScores:
        """All models on the report rows."""
        self.scores = AnswerScores(self.report, draws=draws, seed=seed, where=where)
        return self.scores

    def rel_of(self, method: str) -> float:
        """The share of the gain that a control of the chosen size keeps, averaged over its draws."""
        assert self.choice is not None
        same = [
            name
            for name, about in self.points.items()
            if about["method"] == method and about["entries"] == self.choice.size
        ]
        return float(np.mean([self.compared.rel(name).value for name in same]))

    @property
    def compared(self) -> AnswerScores:
        """The same, once `compare` was called."""
        assert self.scores is not None
        return self.scores


def interpolation(alpha: float) -> str:
    """What an interpolation is called."""
    return f"interpolation {alpha:g}"


def measure_ends(
    bench: GraftEvaluator, names: Sequence[str], keys: Sequence[Key]
) -> dict[str, dict[Key, Answers]]:
    """What base, tuned and what lies between them say of all that is reported, and of the selection rows."""
    selection = [(name, "selection") for name in names]
    made = {"tuned": bench.said([*keys, *selection])}
    if not bench.movement.entries and not bench.outside:
        return made | dict.fromkeys(["base", "ones", *map(interpolation, ALPHAS)], made["tuned"])
    made["ones"] = bench.ones(keys) if bench.outside else made["tuned"]
    bench.host.become("base")
    made["base"] = bench.said([*keys, *selection])
    return made | {interpolation(alpha): bench.interpolated(alpha, keys) for alpha in ALPHAS}


def started(
    name: str, ends: Mapping[str, Mapping[Key, Answers]], keys: Sequence[Key], bench: GraftEvaluator
) -> TaskMeasurements:
    """One task before any search: its ends, and whether there is anything to search."""
    total = bench.movement.total
    points: dict[str, dict[str, Any]] = {"base": {"method": "base", "entries": 0}}
    for alpha in ALPHAS:
        points[interpolation(alpha)] = {"method": "interpolation", "entries": total, "alpha": alpha}
    points["ones"] = {"method": "ones", "entries": total}
    points["tuned"] = {"method": "tuned", "entries": total}
    why = ""
    if not bench.movement.total_moved:
        why = "tuned equals base" if not bench.outside else "tuning changed no eligible entry"
    one = TaskMeasurements(
        task=name,
        report={model: ends[model][name, "report"] for model in points},
        points=points,
        elsewhere={key: {m: ends[m][key] for m in points} for key in keys if key[0] in ("keep", "ood")},
        why=why,
    )
    chosen_on = ends["tuned"][name, "selection"]
    if chosen_on.logs is not None and len(chosen_on.truth):
        one.tempered = temperature(chosen_on)
    return one


def measure(one: TaskMeasurements, bench: GraftEvaluator, keys: Sequence[Key], seed: int) -> None:
    """Everything about the regions of a task on the report rows, and about the chosen one elsewhere."""
    choice = one.choice
    assert choice is not None
    search, mine = choice.search, (one.task, "report")
    for size, learned in choice.regions.items():
        made = {"movement": search.region(None, size)} | (
            {} if search.mode == "movement" else {"learned": learned}
        )
        for draw in range(RANDOM if size == choice.size else 1):
            made[f"random {draw}"] = bench.movement.random(learned, seed + draw)
        for name, entries in made.items():
            method, *_ = name.split()
            point = f"{name} of {size}"
            one.report[point] = bench.graft(entries, [mine])[mine]
            one.points[point] = {"method": method, "entries": size}
            if method == ("movement" if search.mode == "movement" else "learned"):
                one.points[point] |= {
                    "kept": choice.kept[size], "alone": size in choice.alone, "chosen": size == choice.size,
                }  # fmt: skip
    graft, complement = bench.graft(choice.chosen, keys), bench.complement(choice.chosen, keys)
    one.report |= {"graft": graft[mine], "complement": complement[mine]}
    one.points["complement"] = {"method": "complement", "entries": bench.movement.total - choice.size}
    for key in one.elsewhere:
        one.elsewhere[key] |= {"graft": graft[key], "complement": complement[key]}
    one.crossed = {name: graft[name, purpose] for name, purpose in keys if purpose == "report"}
