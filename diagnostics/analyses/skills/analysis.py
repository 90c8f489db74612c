"""Skill localization by grafting: the few entries of the update that carry the skill.

A graft is base with tuned's values at the entries of a mask, without retraining. The skill size is the
smallest mask found with a graft that keeps 95 % of the gain of tuning. That region is sufficient, not unique:
other searches and seeds find others.
Source: Panigrahi et al. 2023, arXiv:2302.06600, and its released code; the `budget` search, the three splits
and the controls are ours.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from diagnostics.analyses.skills.evaluator import SPLITS, Eligible, GraftEvaluator, select_rows, split_rows
from diagnostics.analyses.skills.figures import draw
from diagnostics.analyses.skills.mask_search import STEP
from diagnostics.analyses.skills.measurements import measure_ends, measure_regions, start_measurements
from diagnostics.analyses.skills.notes import pair_notes, task_notes
from diagnostics.analyses.skills.search import GradientProgress, Mode, TaskSearch, gradient_count
from diagnostics.analyses.skills.size_selection import CHECKED, SizeChooser
from diagnostics.analyses.skills.tables import tables_and_metrics
from diagnostics.core.analysis import DeviceTest, Result, analysis
from diagnostics.core.inputs import tasks
from diagnostics.core.row_options import RowOptions
from diagnostics.evaluation.one_function import refuse_two_functions
from diagnostics.evaluation.row_losses import EncodedTask, encoded
from diagnostics.evaluation.tokenizers import refuse_other_splits
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.errors import InputError
from probes.models.two_sided import TwoSidedModel
from probes.passes.objective import Objective
from probes.progress import Progress
from probes.text.rows import Task

# From the paper's budget up to where a region is no longer small.
SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

METRICS = {
    "skill_size": "smallest share of the entries with a graft that keeps enough; left out if none does",
    "rel": "share of the gain of tuning that the graft keeps: 0 is base, 1 tuned; of loss for texts",
    "rel_low": "lower end of its paired 95 % interval",
    "rel_high": "upper end",
    "agreement": "share of rows with the same answer from graft and tuned",
    "necessity": "share of the gain that tuned loses with base's values in the region",
    "share": "share of the entries in the reported region: the skill size, or the best size tried",
    "region": "entries of that region",
    "entries": "entries of the eligible tensors with any entry that tuning changed; shares are of these",
    "moved": "entries that tuning changed, by more than a dtype rounds",
    "base_metric": "accuracy of base, or its loss in nats per token",
    "tuned_metric": "the same of tuned",
    "graft_metric": "the same of the graft: base with the region's entries from tuned",
    "gain": "gain of tuning: accuracy, or nats per token of lower loss",
    "gain_error": "standard error of that difference",
    "recovery": "graft's accuracy as a share of tuned's; high where base is good already",
    "movement_rel": "control: the gain kept by as many entries, those that moved furthest",
    "random_rel": "control: the gain kept by as many random entries of each tensor",
    "half_update_rel": "control: the gain kept by half of the update",
    "whole_rel": "the gain kept by all eligible entries; below 1 where other tensors were tuned too",
    "stability": "mean Jaccard index of the regions that searches with other seeds find",
    "bias_or_norm": "share of the region in biases and norms",
    "movement_top": "share of the squared movement in the 1 % of entries that moved furthest",
    "ece_tuned": "calibration error of tuned, 15 bins of equal width",
    "ece_graft": "the same of the graft",
    "ece_half_update": "control: of half of the update",
    "ece_tempered": "control: of tuned with one temperature, fitted on the selection rows",
    "ece_less": "share of tuned's calibration error that the graft removes",
    "temperature": "the temperature fitted",
    "tasks": "tasks; the numbers above are of the first",
    "localised": "tasks with a region that keeps enough",
    "diffuse": "tasks with a skill size above 1 % of the entries, or without a size that keeps enough",
    "without_gain": "tasks on which tuned is not surely better than base: nothing to localise",
    "overconfident": "tasks where the graft removes 40 % of tuned's calibration error, interpolation less",
    "harmful_rest": "task and OOD sets on which the graft is surely better than tuned",
    "interfering": "task pairs that overlap beyond three times chance, or with a region that harms the other",
    "purity": "how much better the first task's region recovers its task than any other",
    "rows_report": "report rows",
    "gradients": "gradients taken",
    "evaluations": "passes over a set of rows",
    "truncated": "rows cut because they are longer than the model takes",
}


def summary(result: Result) -> str:
    """The verdict on each task."""
    verdicts = result.tables["tasks"]["verdict"] if "tasks" in result.tables else ()
    return " ".join(verdicts) or "nothing to localise"


@analysis(
    "skills",
    question="Which few of the weights that tuning changed carry what it taught?",
    reading=(
        "Rel is the share of tuning's gain that base gets from tuned's values in a region alone: 0 is base, "
        "1 is tuned; above 1, the rest of the update does harm. The skill size is the smallest region that "
        "keeps 0.95. Compare it with the controls: as many entries that moved furthest, as many random ones, "
        "and half of the update. The region is sufficient, not unique: the stability is how much of it other "
        "seeds find. A diffuse skill is usual after AdamW and LoRA, and no fault. A better calibrated graft "
        "means little where one temperature, or half of the update, calibrates as well."
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
    """Find a small region of the update that carries each task, and compare it with its controls.

    An adapter is its merged weights. Tensors that are equal in both are not counted; base is measured with
    tuned's head where it lacks one.

    Args:
        pair: base and tuned.
        task: rows of what was trained: a task, a file, texts, or several by name, each with its own region.
        keep, ood: rows on which grafts are compared with tuned, in the same forms.
        budgets: sizes of regions; up to 1 shares of the entries, above 1 numbers of them. None: 1e-4 to 1e-1.
        search: `budget` (ours): masks of exact size, straight-through gradients; `faithful`: the paper's,
            with its three repairs; `movement`: the entries that moved furthest, for models too large for
            gradients.
        candidates: share of the entries that a search may select from, those that moved furthest. None: 0.1,
            or 80 for each entry of the largest budget if that is fewer; doubled where others score as high.
        steps: gradients of one search; at most, of a faithful one.
        rate: first step of a budget search, as a share of the largest score. A search of 100 steps of 0.02
            stays near its start.
        batch_rows: rows of each gradient; a faithful search takes all.
        eligible: `blocks`: weights, biases and norms of the blocks, as in the released code; `matrices` of
            the blocks; `everything`, embeddings and heads too.
        kept: share of the gain that a region is to keep (0.95: the paper's).
        splits: shares of the rows to search on, to choose the size on, and to report on.
        seeds: searches for the stability; 1: not measured.
        draws: bootstrap draws of the rows, for intervals.
        options: how rows are read and how models run on them.
        seed: of the splits, the batches and the draws.
        progress: called with (gradients taken, about how many in all, what).

    Metrics: see `METRICS`; of the first task, except counts of tasks.

    Tables:
        `tasks`: one row a task: task, verdict, and each metric of a task (columns as in `METRICS`).
        `budget`: one row a size and method: task, share (fraction of entries), metric (accuracy, or loss in
            nats per token), method, alpha, entries (count), low, high (of metric), rel (fraction of the
            gain), rel_low, rel_high, recovery (fraction), agreement (fraction of rows), rel_selection (rel on
            the selection rows), alone (from a search for this size), chosen.
        `region`: one row a layer and component: task, layer, component, size (entries there), entries (of the
            region), share (fraction of the region), density (1 is chance).
        `densest`: one row a matrix row or column: task, matrix, layer, component, axis, place (index),
            entries (count), density (fraction).
        `sets`: one row a set and model: task, role, set, model, kind (accuracy or loss), metric, low, high,
            over_tuned (score minus tuned's), over_tuned_low, over_tuned_high, agreement (fraction), ece.
        `calibration`: one row a model: task, model, temperature, accuracy, ece, ece_low, ece_high, ece_mass,
            brier.
        `reliability`: one row a bin and model: task, model, bin, rows (count), confidence (mean probability),
            accuracy.
        `stability`: one row a pair of seeds: task, seed, other, jaccard.
        `overlap`: one row a pair of tasks: task, other, overlap (fraction of other), chance, density,
            jaccard.
        `rel`: one row a region and task: region, task, rel (fraction of the gain), low, high.
        `unions`: one row a union and task: union, entries (count), task, member, metric, rel, low, high.
    `overlap`, `rel` and `unions` are there for several tasks.

    Masks: the region of each task, for `tunescope graft`.

    Raises:
        NotApplicableError: base and tuned have configurations that give two functions.
        InputError: a parameter out of range, too few rows, rows or a model that cannot be scored.

    Example:
        >>> from diagnostics import skill_localization
        >>> from diagnostics.audit.demo import BUNDLED
        >>> from probes import CheckpointPair
        >>> from probes.text.rows import read_task
        >>> pair, task = CheckpointPair(BUNDLED / "base", BUNDLED / "full"), BUNDLED / "task.jsonl"
        >>> result = skill_localization(
        ...     pair, read_task(task, limit=96), search="movement", budgets=(0.01,), draws=100
        ... )
        >>> sorted(result.masks)
        ['task']
    """
    refuse_two_functions(pair)
    check_parameters(budgets, candidates, steps, rate, batch_rows, kept, splits, seeds, draws)
    by_task = tasks(task, "task")
    rows = {name: split_rows(task_rows, splits, seed) for name, task_rows in by_task.items()}
    others = {
        (role, name): set_rows
        for role, source in (("keep", keep), ("ood", ood))
        if source is not None
        for name, set_rows in tasks(source, role).items()
    }
    refuse_other_splits(pair, (*by_task.values(), *others.values()), options)
    with TwoSidedModel(pair, **options.of_models) as two_sided:

        def encode(unencoded: Task) -> EncodedTask:
            return encoded(two_sided.editable, unencoded, **options.of_rows)

        encoded_tasks = {name: encode(task_rows) for name, task_rows in by_task.items()}
        encoded_others = {key: encode(other) for key, other in others.items()}
        sets = dict(encoded_others)
        for name, by_split in rows.items():
            sets |= {
                (name, purpose): select_rows(encoded_tasks[name], by_split[purpose]) for purpose in SPLITS
            }
        evaluator = GraftEvaluator(two_sided, sets, eligible)
        sizes, size_notes = region_sizes(budgets, evaluator)
        notes = [*pair_notes(pair, evaluator), *size_notes]
        per_task = gradient_count(search, steps, seeds, CHECKED) if evaluator.movement.total_moved else 0
        gradients = GradientProgress(per_task * len(by_task), progress)
        keys = [*[(name, "report") for name in by_task], *encoded_others]
        ends = measure_ends(evaluator, list(by_task), keys)
        measurements = {name: start_measurements(name, ends, keys, evaluator) for name in by_task}
        for name, measured in measurements.items():
            ref = encoded_tasks[name].task.ref
            measured.compare(draws, seed, ref)
            if not measured.scores.gained:
                measured.reason = measured.reason or "tuned is not surely better than base on the report rows"
            if measured.reason:
                continue
            rows_to_search = sets[name, "search"]
            objective = None
            if search != "movement":
                objective = Objective(rows_to_search, tokens=options.batch_tokens)
            searcher = TaskSearch(
                evaluator=evaluator, task=name, mode=search, sizes=sizes, share=candidates, steps=steps,
                rate=rate, objective=objective, seed=seed, gradients=gradients,
                batch=min(batch_rows, math.ceil(len(rows[name]["search"]) / 2)),
            )  # fmt: skip
            base, tuned = (ends[side][name, "selection"] for side in ("base", "tuned"))
            chooser = SizeChooser(evaluator, searcher, base, tuned, kept)
            measured.choice = chooser.choose(seeds=seeds)
            measure_regions(measured, evaluator, keys, seed)
            measured.compare(draws, seed, ref)
            notes += [*searcher.notes, *task_notes(measured)]
        tables, metrics = tables_and_metrics(measurements, evaluator, draws=draws, seed=seed)
        all_encoded = (*encoded_tasks.values(), *encoded_others.values())
        metrics |= {
            "gradients": gradients.done,
            "evaluations": evaluator.evaluations,
            "truncated": sum(encoded_set.truncated for encoded_set in all_encoded),
        }
        notes += dict.fromkeys(note for encoded_set in all_encoded for note in encoded_set.notes)
        masks = {}
        for name, mask_name in mask_names(list(measurements)).items():
            choice = measurements[name].choice
            if choice is not None:
                about = {"task": name, "search": search, "share": choice.size / evaluator.movement.total}
                masks[mask_name] = Patch.of(pair, choice.chosen, about)
    return Result(metrics=metrics, tables=tables, notes=tuple(notes), masks=masks)


def check_parameters(
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
    """Refuse parameters out of range."""
    for budget in budgets or ():
        if not 0 < budget < math.inf or (budget > 1 and budget != round(budget)):
            raise InputError(
                f"budgets holds {budget:g}; give a share of the entries in (0, 1], or a whole number above 1"
            )
    if budgets is not None and not budgets:
        raise InputError("budgets is empty; give sizes of regions, or leave it out")
    if candidates is not None and not 0 < candidates <= 1:
        raise InputError(f"candidates is {candidates:g}; it is a share of the entries, in (0, 1]")
    if len(splits) != len(SPLITS) or min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        shares = ", ".join(f"{share:g}" for share in splits)
        raise InputError(f"splits is {shares}; give three shares that sum to 1: search, selection, report")
    for name, value in (("steps", steps), ("batch_rows", batch_rows), ("seeds", seeds)):
        if value < 1:
            raise InputError(f"{name} is {value}; at least 1")
    if not 0 < rate < math.inf:
        raise InputError(f"rate is {rate:g}; it is a share of the largest score, above 0")
    if not 0 < kept <= 1:
        raise InputError(f"kept is {kept:g}; it is a share of the gain of tuning, in (0, 1]")
    if draws < 100:
        raise InputError(f"draws is {draws}; at least 100 for a 95 % interval")


def region_sizes(budgets: Sequence[float | int] | None, bench: GraftEvaluator) -> tuple[list[int], list[str]]:
    """The ascending sizes of the regions, and a note on budgets that are truncated."""
    total, moved = bench.movement.total, bench.movement.total_moved
    wanted = []
    for budget in SHARES if budgets is None else budgets:
        size = max(1, round(budget * total)) if budget <= 1 else int(budget)
        if size > total and moved:
            raise InputError(
                f"budgets holds {budget:g}, but the changed tensors have {total:,} eligible entries"
            )
        wanted.append(size)
    cut = [size for size in wanted if size > moved]
    notes = []
    if cut and moved and budgets is not None:
        notes.append(
            f"Only {moved:,} of {total:,} eligible entries have another value in tuned; budgets of "
            f"{', '.join(f'{size:,}' for size in cut)} are truncated to that number."
        )
    return sorted({min(size, moved) for size in wanted}), notes


def mask_names(tasks: Sequence[str]) -> dict[str, str]:
    """A distinct name for the mask of each task, fit for a file."""
    names: dict[str, str] = {}
    for task in tasks:
        name = stem = re.sub(r"[^\w-]+", "-", task).strip("-") or "task"
        count = 2
        while name in names.values():
            name, count = f"{stem}-{count}", count + 1
        names[task] = name
    return names
