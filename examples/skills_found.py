"""The results of the miniature of skill localization for one seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from majority import TASKS

from diagnostics.analyses.skills.region import Region, jaccard, overlap
from diagnostics.core.analysis import Result

FEW, MORE = 299, 999  # entries of a region: 0.3 and 1 % of all
SHARES = {FEW: "0.3 %", MORE: "1 %"}
HOW = ("sgd", "adamw")
SEARCHES = ("budget", "faithful")
LIKE, UNLIKE = ((0, 2), (2, 0)), ((0, 1), (1, 0), (1, 2), (2, 1))


@dataclass(frozen=True)
class Planted:
    """Skills whose entries are known, and what is found of them.

    Attributes:
        region: the entries of skill 0.
        result: its localization, at half to one and a half times their number.
        regions: the entries of skills 0 and 1 in one model; a third of them are of both.
        joint_result: their localization.
    """

    region: Region
    result: Result
    regions: tuple[Region, Region]
    joint_result: Result

    @property
    def size(self) -> int:
        """Number of entries planted for the one skill."""
        return sum(len(index) for index in self.region.values())

    def precision_recall(self) -> tuple[float, float]:
        """Precision and recall of the region of the one skill; NaN if there is none."""
        if not self.result.masks:
            return math.nan, math.nan
        region = self.result.masks["0"].index
        return overlap(self.region, region), overlap(region, self.region)

    def precisions(self) -> tuple[float, float]:
        """Share of each of the two regions that was planted for its skill; NaN without a region."""
        masks = self.joint_result.masks
        first, second = (
            overlap(self.regions[index], masks[name].index) if name in masks else math.nan
            for index, name in enumerate(("0", "1"))
        )
        return first, second

    def overlaps(self) -> tuple[float, float]:
        """Overlap of the two planted regions, and of the two found (mean of both directions)."""
        first, second = self.regions
        planted = mean((overlap(first, second), overlap(second, first)))
        masks = self.joint_result.masks
        regions = [masks[name].index for name in ("0", "1") if name in masks]
        if len(regions) < 2:
            return planted, math.nan
        return planted, mean((overlap(*regions), overlap(*reversed(regions))))


@dataclass(frozen=True)
class Outcome:
    """The results of the pairs of one seed.

    Attributes:
        base_accuracy: accuracy of the base where it answers rightly, by skill.
        learnt: accuracy on what was tuned on, by way of tuning.
        biases: accuracy of base with all of tuned's biases, by way of tuning.
        random: accuracy of base with so many entries of the SGD-tuned model, drawn at random from all.
        alone: of one skill, by way of tuning, search and entries.
        together: of three skills, by way of tuning.
    """

    seed: int
    base_accuracy: tuple[float, ...]
    learnt: Mapping[str, float]
    biases: Mapping[str, float]
    random: Mapping[int, float]
    alone: Mapping[tuple[str, str, int], Result]
    together: Mapping[str, Result]
    planted: Planted

    def metric(self, method: str, how: str = "sgd", search: str = "budget", entries: int = FEW) -> float:
        """Accuracy of a point of the curve on the report rows; NaN where there was nothing to localise."""
        table = self.alone[how, search, entries].tables["budget"]
        selected = table["method"] == method
        if method in ("learned", "movement", "random"):
            selected &= table["entries"] == entries
        return float(table.loc[selected, "metric"].mean())

    def ece(self, model: str, how: str = "sgd", search: str = "budget", entries: int = MORE) -> float:
        """Calibration error of a model."""
        table = self.alone[how, search, entries].tables["calibration"]
        return float(table[table["model"] == model]["ece"].mean())

    def accuracy(
        self, model: str, how: str = "sgd", search: str = "budget", entries: int = MORE, role: str = "task"
    ) -> float:
        """Accuracy of a model on the report rows, or out of distribution (`ood`)."""
        table = self.alone[how, search, entries].tables["sets"]
        return float(table[(table["role"] == role) & (table["model"] == model)]["metric"].mean())

    def overlap(self, how: str, pairs: tuple[tuple[int, int], ...]) -> float:
        """Mean overlap of the regions of pairs of skills."""
        table = self.together[how].tables.get("overlap")
        if table is None:
            return math.nan
        by = table.set_index(["task", "other"])["overlap"]
        return mean(float(by.get((str(i), str(j)), math.nan)) for i, j in pairs)

    def rel(self, how: str, region: int, task: int) -> float:
        """Share of the gain on one skill that the region of another keeps."""
        table = self.together[how].tables.get("rel")
        if table is None:
            return math.nan
        return float(table.set_index(["region", "task"])["rel"].get((str(region), str(task)), math.nan))

    def unions(self, how: str) -> list[float]:
        """Share of the gain on each skill that the union of all regions keeps; NaN unless each has one."""
        table = self.together[how].tables.get("unions")
        if table is None:
            return [math.nan] * TASKS
        rel = table[table["union"].str.count(r"\+") == TASKS - 1].set_index("task")["rel"]
        return [float(rel.get(str(task), math.nan)) for task in range(TASKS)]

    def localised(self, how: str) -> str:
        """Verdict on whether 0.3 % of the entries carry the skill."""
        metrics = self.alone[how, "budget", FEW].metrics
        if metrics["without_gain"]:
            return "nothing to localise"
        return "localised" if metrics["localised"] else "diffuse"

    def shared(self, entries: int) -> float:
        """Jaccard index of the regions of the two searches."""
        masks_by_search = [self.alone["sgd", search, entries].masks for search in SEARCHES]
        return (
            jaccard(*(masks["task0"].index for masks in masks_by_search))
            if all(masks_by_search)
            else math.nan
        )
