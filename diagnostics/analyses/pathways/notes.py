"""Notes of `pathways`."""

import math
from collections.abc import Mapping
from itertools import pairwise

import pandas as pd

from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.statistics import LEAST
from diagnostics.analyses.pathways.tables import PAPER, at_once

Numbers = Mapping[str, float | int]
SIGNS = {"distance": "distance", "consistency": "smoothness", "loss": "training loss"}


def notes(run: RoutingRun, tables: Mapping[str, pd.DataFrame], metrics: Numbers) -> list[str]:
    """All notes, the verdict first."""
    return [
        f"{run.verdict[0].upper()}{run.verdict[1:]}: {run.why}.", *memorisation(run), *turning(run),
        *correlated(run, tables), *definitions(run), *followed(run, metrics),
        *undefined(run, metrics),
    ]  # fmt: skip


def memorisation(run: RoutingRun) -> list[str]:
    """When samples were memorised, and by which rule."""
    if not run.samples.trained:
        return [
            "Without train rows (--train) memorisation is not dated: routes and loss are those of the task "
            "rows, on which the run was not trained."
        ]
    levels = sorted(set(run.epsilon.values()))
    bound = f"{levels[0]:g}" if len(levels) == 1 else f"{levels[0]:g} to {levels[-1]:g} by group"
    rule = f"from then on its loss is at most {bound} nats and within {run.settings.delta:g} of the last one"
    chosen = "" if run.settings.epsilon else " (epsilon is chosen so that 20 to 25 % are memorised)"
    share = f"a share of {run.memorised_share:.2g} is"
    notes = [f"A sample is memorised when {rule}{chosen}; {share} before the last checkpoint."]
    if run.memorised_step is not None:
        step, low, high, _ = run.memorised_step
        text = f"Half of these are memorised by step {step:g} (95 % interval {low:g} to {high:g})."
        if run.since == 0:
            text += (
                " That is the first checkpoint: they were memorised earlier, or nothing is learnt; only a "
                "falling loss would show which."
            )
        notes.append(text)
    return notes


def turning(run: RoutingRun) -> list[str]:
    """The step at which memorisation turns to generalisation, or why none is given."""
    if run.turn is not None:
        turn, held = run.turn, run.held_out_turn
        text = (
            f"Memorisation turns to generalisation around step {turn.value:.4g} (95 % interval "
            f"{turn.low:.4g} to {turn.high:.4g}), where half of the change of the gap between groups is made"
        )
        if held is not None:
            text += f"; the held-out metric does so at step {held.value:.4g} "
            text += f"({held.low:.4g} to {held.high:.4g})"
        return [f"{text}."]
    if run.verdict == "withheld":
        return []
    why = "the verdict does not support one"
    if run.verdict == "reorganising after memorisation":
        why = "routes reorganise, but the held-out metric does not improve significantly"
    return [f"No step at which memorisation turns to generalisation is given: {why}."]


def correlated(run: RoutingRun, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The correlations with the paper's, or why there are none."""
    now = at_once(tables["correlations"])
    since = f" since step {run.steps[run.since]:g}" if run.since else ""
    points = len(run.snapshots) - run.since
    if points < LEAST:
        return [f"Correlations are withheld: they need {LEAST} checkpoints, and there are {points}{since}."]
    values = [
        f"{SIGNS[name]} {now[name]['spearman']:+.2f} (the paper's {low:+.3g} to {high:+.3g})"
        for name, (low, high) in PAPER.items()
        if not math.isnan(now[name]["spearman"])
    ]
    if not values:
        return ["Correlations are withheld: the held-out metric does not change."]
    return [
        f"Rank correlations with the held-out metric over {now['distance']['points']} checkpoints"
        f"{since}: {', '.join(values)}. The paper's seem to rest on 4 to 6 checkpoints of one model. Any two "
        "trends correlate: the table also has the correlations of changes between checkpoints."
    ]


def definitions(run: RoutingRun) -> list[str]:
    """What two checkpoints cannot show, and the paper's open definitions as used here."""
    notes = []
    if len(run.snapshots) < 3:
        notes.append(
            "Two checkpoints show differences and drift only. If experts were renumbered in between, all "
            "routes appear to have moved."
        )
    settings, routes = run.settings, run.snapshots[0].record.routes
    kind = "all router weights" if settings.weights == "full" else "the weights of the chosen experts"
    text = (
        f"Pathways use {kind}, tau {settings.tau:g}, symbols {settings.alphabet}. Verdicts use distances as "
        "a share of the longer pathway, since raw edits grow with length. Consistency is smoothness (higher "
        "is smoother). The paper's C, gp_inconsistency, is higher for more erratic routes. Effective "
        "dimensions use lambda = 0.001 Tr(H) / samples."
    )
    if any(after - before > 1 for before, after in pairwise(routes.layers)):
        text += " Consecutive layers are those with experts; dense layers lie between some."
    return [*notes, text]


def followed(run: RoutingRun, metrics: Numbers) -> list[str]:
    """Groups without pairs, and rows left out or cut."""
    counts = {name: int((run.samples.groups == group).sum()) for group, name in enumerate(run.samples.names)}
    notes = []
    if len(counts) == 1:
        notes.append("All rows are of one group: there is no gap between groups. Give rows a group.")
    alone = [name for name, count in counts.items() if count == 1]
    if alone:
        notes.append(f"{len(alone)} groups, such as {alone[0]}, have a single row and so no distance within.")
    if metrics["unrouted"]:
        notes.append(
            f"{metrics['unrouted']} rows are left out: none of their tokens has a route that counts."
        )
    if metrics["truncated"]:
        notes.append(f"{metrics['truncated']} rows are truncated to what the model takes.")
    if run.snapshots[0].record.routes.via == "modules":
        notes.append("Routes were captured from the model's own modules.")
    return notes


def undefined(run: RoutingRun, metrics: Numbers) -> list[str]:
    """Where smoothness or the paper's consistency is undefined."""
    layers = run.snapshots[0].weights.shape[1]
    if layers < 2:
        return ["One layer has experts: smoothness, which compares consecutive layers, is undefined."]
    if layers < 3:
        return [
            "Two layers have experts: the paper's consistency is left out, as it would be 0 for any routes."
        ]
    if metrics["gp_undefined"]:
        return [
            f"The paper's consistency is undefined for {metrics['gp_undefined']} of "
            f"{len(run.snapshots) * len(run.samples.groups)} samples and checkpoints, with a largest cosine "
            "of at most 0.05; its median is over the others."
        ]
    return []
