"""Skill localization by grafting: which few entries of the update carry what tuning taught.

A graft is base with tuned's values at the entries of a mask and nowhere else; nothing is retrained. The
smallest mask found whose graft keeps 95 % of what tuning gained is the skill's size. It is *a* sufficient
region: other searches and seeds find others that do as well.
Source: Panigrahi et al. 2023, arXiv:2302.06600, and its released code; the `budget` search, the three splits
and the controls are ours.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diagnostics.analyses.skills.evaluator import SPLITS, Eligible, GraftEvaluator, Key, part, split
from diagnostics.analyses.skills.mask_search import STEP
from diagnostics.analyses.skills.measurements import TaskMeasurements, measure, measure_ends, started
from diagnostics.analyses.skills.notes import about, remarks
from diagnostics.analyses.skills.search import Counter, Mode, TaskSearch, gradients
from diagnostics.analyses.skills.size_selection import CHECKED, SizeChooser
from diagnostics.analyses.skills.tables import Tables
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.row_losses import EncodedTask, encoded
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.errors import InputError
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective

if TYPE_CHECKING:
    import plotly.graph_objects as go

Progress = Callable[[int, int, str], None]
# The paper's budget and what lies between it and where a region is no longer small.
SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

METRICS = {
    "skill_size": "smallest share of the entries whose graft keeps what is asked for; left out if none does",
    "rel": "share of what tuning gained that the graft keeps: 0 is base, 1 tuned; of loss where rows are "
    "texts",
    "rel_low": "lower end of its paired 95 % interval",
    "rel_high": "upper end",
    "agreement": "share of rows that the graft answers as tuned does",
    "necessity": "share of the gain that is lost when tuned gets base's values in the region",
    "share": "share of the entries that the reported region has: the skill size, or the best size tried",
    "region": "entries of that region",
    "entries": "entries that the share is of: eligible tensors that tuning changed",
    "moved": "of these, entries whose value changed",
    "base_metric": "accuracy of base, or its loss in nats per token",
    "tuned_metric": "the same of tuned",
    "graft_metric": "the same of the graft: base with the region's entries from tuned",
    "gain": "what tuning gained: accuracy, or nats per token taken off the loss",
    "gain_error": "standard error of that difference",
    "recovery": "graft's accuracy as a share of tuned's; it flatters where base is good already",
    "movement_rel": "control: the gain kept by as many entries, those that moved furthest",
    "random_rel": "control: the gain kept by as many entries of each tensor, drawn at random",
    "half_update_rel": "control: the gain kept by half of the whole update",
    "whole_rel": "the gain kept by every eligible entry; below 1 where what is not eligible was tuned too",
    "stability": "mean Jaccard index of the regions that searches with other seeds find",
    "bias_or_norm": "share of the region in biases and norms",
    "movement_top": "share of the squared movement in the 1 % of entries that moved furthest",
    "ece_tuned": "calibration error of tuned, 15 bins of equal width",
    "ece_graft": "the same of the graft",
    "ece_half_update": "control: of half of the whole update",
    "ece_tempered": "control: of tuned with one temperature, fitted on the selection rows",
    "ece_less": "share of tuned's calibration error that the graft takes off",
    "temperature": "the temperature fitted",
    "tasks": "tasks; the numbers above are of the first",
    "localised": "tasks with a region that keeps what is asked for",
    "diffuse": "tasks whose skill size is above 1 % of the entries, or that no size tried carries",
    "without_gain": "tasks that tuned is not surely better on than base: nothing to localise",
    "overconfident": "tasks where the graft takes 40 % off tuned's calibration error, and interpolation less",
    "harmful_rest": "task and OOD sets that the graft surely does better on than tuned",
    "interfering": "pairs of tasks that overlap beyond three times chance, or whose region harms the other",
    "purity": "how much better the first task's region recovers its own task than any other",
    "rows_report": "rows that all of this is reported on",
    "gradients": "gradients taken",
    "evaluations": "passes over a set of rows",
    "truncated": "rows cut because they are longer than the model takes",
}


def summary(result: Result) -> str:
    """The verdict on each task."""
    said = " ".join(result.tables["tasks"]["verdict"]) if "tasks" in result.tables else ""
    return said or "nothing to localise"


def draw(result: Result) -> "dict[str, go.Figure]":
    """The pictures of a result; their module is loaded when something is drawn."""
    from diagnostics.analyses.skills import figures

    return figures.draw(result)


@analysis(
    "skills",
    question="Which few of the weights that tuning changed carry what it taught?",
    reading=(
        "Rel is the share of tuning's gain that base keeps when it gets tuned's values in a region and "
        "nowhere else: 0 is base, 1 tuned, above 1 the rest of the update does harm. The skill size is the "
        "smallest region that keeps 0.95. Hold it against the controls: as many entries that moved furthest, "
        "as many at random, and half of the whole update. The region is sufficient, never the only one: the "
        "stability says how much of it other seeds find. A diffuse skill is usual after AdamW and LoRA, and "
        "no fault. A better calibrated graft means little where one temperature, or half the update, does as "
        "well."
    ),
    paper="arXiv:2302.06600",
    cost=(
        "about 700 gradients over 32 rows for each task, and some 60 passes over its other rows; one copy of "
        "the model, its activations and some numbers for each candidate entry. `search=movement` takes no "
        "gradient"
    ),
    draw=draw,
    summary=summary,
    metrics=METRICS,
    device_test=DeviceTest(
        parameters={"search": "movement", "budgets": (0.001, 0.1), "seeds": 1, "draws": 100},
        absolute={"base_metric": 1 / 24, "tuned_metric": 1 / 24, "region": 0, "entries": 0, "moved": 0},
    ),
)
def skill_localization(
    pair: CheckpointPair,
    task: Any,
    keep: Any = None,
    ood: Any = None,
    *,
    budgets: tuple[float | int, ...] | None = None,
    search: Mode = "budget",
    candidates: float | None = None,
    steps: int = 100,
    rate: float = STEP,
    batch_rows: int = 32,
    eligible: Eligible = "blocks",
    kept: float = 0.95,
    splits: tuple[float, ...] = (0.4, 0.2, 0.4),
    seeds: int = 3,
    draws: int = 1000,
    options: RowOptions = RowOptions(),
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Find, for each task, a small region of the update that carries it, and hold it against its controls.

    An adapter is its merged weights. Entries of tensors that are equal in both are not counted; a head that
    base lacks stays tuned's on both sides.

    Args:
        pair: base and tuned.
        task: rows of what was trained: a task, a file, texts, or several by name, each with a region of its
            own.
        keep, ood: rows that grafts are held against tuned on, in the same forms.
        budgets: sizes of regions; up to 1 shares of the entries, above 1 numbers of them. None: 1e-4 to 1e-1.
        search: `budget` (ours): masks of exact size, gradients straight through; `faithful`: the paper's,
            with its three repairs; `movement`: the entries that moved furthest, for models too large for
            gradients.
        candidates: share of the entries that a search may choose among, those that moved furthest. None: 0.1,
            or 80 for each entry of the largest budget if that is fewer; twice as many where others
            score as high.
        steps: gradients of one search; at most, of a faithful one.
        rate: of a budget search, how far its first step moves the steepest score, as a share of the largest.
            A search of 100 steps of 0.02 stays near its start; larger ones go further from it.
        batch_rows: rows of each; a faithful search takes all.
        eligible: `blocks`: weights, biases and norms of the blocks, as the released code; `matrices` of the
            blocks; `everything`, embeddings and heads too.
        kept: share of tuning's gain that a region is to keep (0.95: the paper's).
        splits: shares of the rows to search on, to choose the size on, and to report on.
        seeds: searches that stability is judged by; 1: it is not.
        draws: of the rows, for intervals.
        options: how rows are read and how models run on them.
        seed: of the splits, the batches and the draws.
        progress: called with (gradients taken, about how many in all, what).

    Metrics: see `METRICS`; of the first task, but for counts of tasks.
    Tables: `tasks`, `budget` (task, share, metric, method, …), `region` (task, layer, component, entries,
        share, density), `densest`, `sets`, `calibration`, `reliability`, `stability`; of several tasks
        `overlap`, `rel` and `unions`.
    Masks: the region of each task, for `tunescope graft`.

    Raises:
        InputError: a parameter out of range, too few rows, rows or a model that cannot be scored.
    """
    check(budgets, candidates, steps, rate, batch_rows, kept, splits, seeds, draws)
    named = tasks(task, "task")
    rows = {name: split(one, splits, seed) for name, one in named.items()}
    others = {
        (role, name): one
        for role, given in (("keep", keep), ("ood", ood))
        if given is not None
        for name, one in tasks(given, role).items()
    }
    with TwoSidedModel(pair, **options.of_models) as host:

        def encode(one: Any) -> EncodedTask:
            return encoded(host.editable, one, **options.of_rows)

        whole = {name: encode(one) for name, one in named.items()}
        extra = {key: encode(one) for key, one in others.items()}
        sets: dict[Key, EncodedTask] = dict(extra)
        for name, by_split in rows.items():
            sets |= {(name, purpose): part(whole[name], by_split[purpose]) for purpose in SPLITS}
        bench = GraftEvaluator(host, sets, eligible)
        sizes, notes = sizes_of(budgets, bench)
        per_task = gradients(search, steps, seeds, CHECKED) if bench.movement.total_moved else 0
        counter = Counter(per_task * len(named), progress)
        notes = [*about(pair, bench), *notes]
        keys = [*[(name, "report") for name in named], *extra]
        ends = measure_ends(bench, list(named), keys)
        found: dict[str, TaskMeasurements] = {}
        for name in named:
            one = found[name] = started(name, ends, keys, bench)
            if not one.compare(draws, seed, whole[name].task.ref).gained:
                one.why = one.why or "tuned is not surely better than base on the report rows"
            if one.why:
                continue
            objective = None
            if search != "movement":
                objective = Objective(sets[name, "search"], tokens=options.batch_tokens)
            searcher = TaskSearch(
                bench=bench, task=name, mode=search, sizes=sizes, share=candidates, steps=steps, rate=rate,
                objective=objective, batch=min(batch_rows, math.ceil(len(rows[name]["search"]) / 2)),
                seed=seed, counter=counter,
            )  # fmt: skip
            base, tuned = (ends[side][name, "selection"] for side in ("base", "tuned"))
            one.choice = SizeChooser(bench, searcher, base, tuned, kept).choose(seeds=seeds)
            measure(one, bench, keys, seed)
            one.compare(draws, seed, whole[name].task.ref)
            notes += [*searcher.notes, *remarks(one)]
        tables, metrics = Tables(found=found, bench=bench, draws=draws, seed=seed).made()
        metrics |= {"gradients": counter.done, "evaluations": bench.evaluations}
        metrics["truncated"] = sum(one.truncated for one in (*whole.values(), *extra.values()))
        notes += dict.fromkeys(note for one in (*whole.values(), *extra.values()) for note in one.notes)
        masks = {}
        for name, stem in file_names(list(found)).items():
            choice = found[name].choice
            if choice is not None:
                about_mask = {"task": name, "search": search, "share": choice.size / bench.movement.total}
                masks[stem] = Patch.of(pair, choice.chosen, about_mask)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes), masks=masks)


def check(
    budgets: Sequence[float | int] | None,
    candidates: float | None,
    steps: int,
    rate: float,
    batch_rows: int,
    kept: float,
    splits: Sequence[float],
    seeds: int,
    draws: int,
) -> None:
    """Refuse parameters that make no sense.

    Raises:
        InputError: the message says what would.
    """
    for budget in budgets or ():
        if not 0 < budget < math.inf or (budget > 1 and budget != round(budget)):
            raise InputError(
                f"budgets holds {budget:g}; up to 1 it is a share of the entries, above 1 a number of them, "
                "never 0"
            )
    if budgets is not None and not budgets:
        raise InputError("budgets is empty; give sizes of regions, or leave it out")
    if candidates is not None and not 0 < candidates <= 1:
        raise InputError(f"candidates is {candidates:g}; it is a share of the entries, in (0, 1]")
    if len(splits) != len(SPLITS) or min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        given = ", ".join(f"{share:g}" for share in splits)
        raise InputError(f"splits is {given}; three shares that sum to 1: search, selection, report")
    for name, value, least in (("steps", steps, 1), ("batch_rows", batch_rows, 1), ("seeds", seeds, 1)):
        if value < least:
            raise InputError(f"{name} is {value}; at least {least}")
    if not 0 < rate < math.inf:
        raise InputError(f"rate is {rate:g}; it is a share of the largest score, above 0")
    if not 0 < kept <= 1:
        raise InputError(f"kept is {kept:g}; it is a share of what tuning gained, in (0, 1]")
    if draws < 100:
        raise InputError(f"draws is {draws}; at least 100 for a 95 % interval")


def sizes_of(budgets: Sequence[float | int] | None, bench: GraftEvaluator) -> tuple[list[int], list[str]]:
    """The sizes of the regions, rising, and what became of those that are too large.

    Raises:
        InputError: a budget above the number of entries.
    """
    total, moved = bench.movement.total, bench.movement.total_moved
    wanted = []
    for budget in SHARES if budgets is None else budgets:
        size = max(1, round(budget * total)) if budget <= 1 else int(budget)
        if size > total and moved:
            raise InputError(
                f"budgets holds {budget:g}, and tuning changed tensors of {total:,} eligible entries in all"
            )
        wanted.append(size)
    cut = [size for size in wanted if size > moved]
    notes = []
    if cut and moved and budgets is not None:
        notes.append(
            f"Only {moved:,} of {total:,} eligible entries have another value in tuned: budgets of "
            f"{', '.join(f'{size:,}' for size in cut)} are truncated to that."
        )
    return sorted({min(size, moved) for size in wanted}), notes


def file_names(tasks: Sequence[str]) -> dict[str, str]:
    """A name for the mask of each task that a file can have."""
    made: dict[str, str] = {}
    for task in tasks:
        name = stem = re.sub(r"[^\w-]+", "-", task).strip("-") or "task"
        count = 2
        while name in made.values():
            name, count = f"{stem}-{count}", count + 1
        made[task] = name
    return made
