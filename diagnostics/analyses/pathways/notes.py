"""Grokking pathways in words: what the numbers rest on, and what a reader must know beside them."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.statistics import LEAST
from diagnostics.analyses.pathways.tables import PAPER, at_once

if TYPE_CHECKING:
    import pandas as pd

Numbers = Mapping[str, float | int]
SIGNS = {"distance": "distance", "consistency": "smoothness", "loss": "training loss"}


def notes(run: RoutingRun, tables: "Mapping[str, pd.DataFrame]", metrics: Numbers) -> list[str]:
    """All of it, the most telling first."""
    return [
        f"{run.verdict[0].upper()}{run.verdict[1:]}: {run.why}.",
        *memorisation(run),
        *turning(run),
        *correlated(run, tables),
        *two(run),
        definitions(run),
        *followed(run, metrics),
        *undefined(run, metrics),
    ]


def memorisation(run: RoutingRun) -> list[str]:
    """When samples were memorised, and by which rule."""
    if not run.samples.trained:
        return [
            "No rows of training were given (--train): the routes and the loss are those of the task rows, "
            "which a run is not trained on, and no memorisation is dated."
        ]
    levels = sorted(set(run.epsilon.values()))
    told = f"{levels[0]:g}" if len(levels) == 1 else f"{levels[0]:g} to {levels[-1]:g} by group"
    rule = f"loss at most {told} nats and within {run.ask.delta:g} of its last from then on"
    chosen = "" if run.ask.epsilon is not None else ", chosen so that 20 to 25 % are memorised before the end"
    said = [f"Memorised is a sample with {rule}{chosen}; here a share of {run.memorised_share:.2g} is."]
    if run.memorised_step is not None:
        half = run.memorised_step
        text = f"Half of these are memorised by step {half.value:g} "
        text += f"(95 % interval {half.low:g} to {half.high:g})."
        if run.since == 0:
            text += (
                " That is the first checkpoint: they were memorised before it, or nothing is learnt; a drop "
                "of the loss would tell."
            )
        said.append(text)
    return said


def turning(run: RoutingRun) -> list[str]:
    """The step at which memorisation turns to generalisation, or why none is given."""
    if run.turn is not None:
        turn, held = run.turn, run.held_out_turn
        text = (
            f"Memorisation turns to generalisation around step {turn.value:.4g} (95 % interval "
            f"{turn.low:.4g} to {turn.high:.4g}), where the gap between groups has made half of its way"
        )
        if held is not None:
            text += f"; the held-out metric has by step {held.value:.4g} ({held.low:.4g} to {held.high:.4g})"
        return [f"{text}."]
    if run.verdict == "reorganising after memorisation":
        return [
            "No step at which memorisation turns to generalisation is given: routes reorganise, and the "
            "held-out metric does not surely get better."
        ]
    if run.verdict == "withheld":
        return []
    return [
        "No step at which memorisation turns to generalisation is given: the verdict does not support one."
    ]


def correlated(run: RoutingRun, tables: "Mapping[str, pd.DataFrame]") -> list[str]:
    """The correlations beside the paper's, or why there are none."""
    now = at_once(tables["correlations"])
    since = f"since step {run.steps[run.since]:g}" if run.since else "in all"
    if run.too_few:
        points = len(run.looks) - run.since
        return [f"Correlations are withheld: {points} checkpoints {since}, and they take {LEAST}."]
    told = [
        f"{SIGNS[name]} {now[name]['spearman']:+.2f} (the paper's {low:+.3g} to {high:+.3g})"
        for name, (low, high) in PAPER.items()
        if not math.isnan(now[name]["spearman"])
    ]
    if not told:
        return ["Correlations are withheld: the held-out metric does not change."]
    return [
        f"Rank correlations with the held-out metric over {now['distance']['points']} checkpoints "
        f"{since}: {', '.join(told)}. The paper's seem to rest on 4 to 6 checkpoints of one model. Any two "
        "trends correlate: the table has the changes between checkpoints beside the levels."
    ]


def two(run: RoutingRun) -> list[str]:
    """What is said of two checkpoints alone."""
    if len(run.looks) > 2:
        return []
    return [
        "Two checkpoints: differences with their intervals, and how far each sample's pathway moved. Experts "
        "that were renumbered between them look as if all routes moved."
    ]


def definitions(run: RoutingRun) -> str:
    """Which reading of the paper the numbers are of."""
    ask, routes = run.ask, run.looks[0].record.routes
    kind = "all that the router weighs" if ask.weights == "full" else "the weights of the chosen experts"
    layers = routes.layers
    apart = any(two - one > 1 for one, two in pairwise(layers))
    text = (
        f"Pathways are of {kind}, tau {ask.tau:g}, symbols {ask.alphabet}; verdicts use the distance as a "
        "share of the longer pathway, for raw edits follow its length. Consistency is smoothness: higher is "
        "smoother. The paper's C, gp_inconsistency, is as written higher where routes are more erratic. "
        "Effective dimensions are at lambda = 0.001 Tr(H) / samples."
    )
    if apart:
        text += " Consecutive layers are consecutive layers with experts; others lie between some."
    return text


def followed(run: RoutingRun, metrics: Numbers) -> list[str]:
    """How many samples, and what was left out."""
    counts = {name: int((run.samples.groups == group).sum()) for group, name in enumerate(run.samples.names)}
    said = []
    if len(counts) == 1:
        said.append(
            "All rows are of one group, so that nothing is said of a gap between groups; give rows a group."
        )
    alone = [name for name, count in counts.items() if count == 1]
    if alone:
        said.append(f"{len(alone)} groups, such as {alone[0]}, have one row, which has no pair within.")
    if metrics["unrouted"]:
        said.append(f"{metrics['unrouted']} rows have no token whose route counts and are left out.")
    if metrics["truncated"]:
        said.append(f"{metrics['truncated']} rows are cut because they are longer than the model takes.")
    if run.looks[0].record.routes.via == "modules":
        said.append("Routes were captured from the model's own modules.")
    return said


def undefined(run: RoutingRun, metrics: Numbers) -> list[str]:
    """Where the paper's consistency, or ours, is not defined."""
    layers = run.looks[0].weights.shape[1]
    if layers < 2:
        return ["One layer has experts: nothing is said of smoothness, which compares consecutive ones."]
    if layers < 3:
        return [
            "Two layers have experts: the paper's consistency would be 0 whatever the routes, and is left "
            "out."
        ]
    if metrics["gp_undefined"]:
        return [
            f"The paper's consistency is not defined for {metrics['gp_undefined']} of "
            f"{len(run.looks) * len(run.samples.groups)} samples and checkpoints, whose largest cosine is at "
            f"most 0.05; the median is of the others."
        ]
    return []
