"""Skill localization in miniature: which few entries of the update make a tiny GPT-2 use what it knows?

`majority.py` says what it is taught. It is tuned on few items, with wrong labels among them, until it knows
these by heart; the region that carries the skill is found on others. Then on three skills at once, and on
skills that were planted: only entries that are known were trained.
Source of the claims: Panigrahi et al. 2023, arXiv:2302.06600; the setting is ours, a thousand times smaller,
and so small a model needs 0.3 to 1 % of its entries where the paper's needs 0.01 %.

    python examples/skills_miniature.py --seeds 0 1 2 --out kept

Some that held elsewhere need not hold here, and are shown without counting: see `hoped`. About 8 minutes a
seed on one core. `--quick` runs everything once in seconds and claims nothing.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from majority import (
    TASKS,
    WORDS,
    Items,
    World,
    accuracy,
    disturb,
    entries_of,
    located,
    make_model,
    plant,
    pretrain,
    steep,
    tune,
    with_biases,
    with_entries,
)
from rich.console import Console
from skills_found import FEW, HOW, LIKE, MORE, SEARCHES, SHARES, UNLIKE, Outcome, Planted
from skills_shown import show
from symbols import Claim, claims_table, make_tokenizer, save, write_rows
from transformers import GPT2LMHeadModel

from diagnostics import skill_localization
from diagnostics.analyses.skills.region import Region, union
from probes import CheckpointPair

HOPED = "What held elsewhere and need not hold here"
# Few search rows, because searches take the time; few draws, because no claim is about an interval.
MEASURED: dict[str, Any] = {"splits": (0.25, 0.15, 0.6), "draws": 200}


@dataclass(frozen=True)
class Budget:
    """Sizes of training, search and measurement.

    Attributes:
        pretraining: steps of the base.
        tuning: steps of SGD, and of AdamW.
        together: the same on three skills at once.
        lesson: items of a skill that are tuned on.
        items: others, to search, choose and report on.
        shifted: items of another source.
        steps: of a search.
        planting: steps that a planted skill is trained.
        planted: its entries.
    """

    pretraining: int = 1500
    tuning: tuple[int, int] = (2500, 400)
    together: tuple[int, int] = (2500, 1200)
    lesson: int = 288
    items: int = 2400
    shifted: int = 1000
    steps: int = 100
    planting: int = 400
    planted: int = 100


QUICK = Budget(
    pretraining=60,
    tuning=(60, 60),
    together=(60, 60),
    lesson=64,
    items=200,
    shifted=50,
    steps=2,
    planting=20,
)


def measure(seed: int, budget: Budget, out: Path) -> Outcome:
    """Train base and tuned models, write them and their rows into `out`, and measure the pairs."""
    generator = torch.Generator().manual_seed(seed)
    world, tokenizer = World.drawn(generator), make_tokenizer(WORDS)
    base = make_model(seed)
    pretrain(base, world, budget.pretraining, generator)
    base_accuracy = tuple(
        accuracy(base, world.items(task, 1000, generator, kind="Q", noise=0)) for task in range(TASKS)
    )
    lessons = [world.items(task, budget.lesson, generator) for task in range(TASKS)]
    others = [world.items(task, budget.items, generator) for task in range(TASKS)]
    rows = {
        str(task): write_rows(items.rows(), out / f"task{task}.jsonl") for task, items in enumerate(others)
    }
    shifted = write_rows(world.items(0, budget.shifted, generator, shifted=True).rows(), out / "ood.jsonl")
    base_directory = save(base, tokenizer, out / "base")
    # By the method's own 0.02 a search of 100 steps stays near its start: on models so small it is not done.
    measured: dict[str, Any] = {**MEASURED, "steps": budget.steps, "rate": 0.2, "seed": seed}
    learnt, biases, alone, together = {}, {}, {}, {}
    random: dict[int, float] = {}
    for how, steps, longer in zip(HOW, budget.tuning, budget.together, strict=True):
        model = copy.deepcopy(base)
        tune(model, lessons[:1], how, steps, seed)
        learnt[how] = accuracy(model, lessons[0])
        biases[how] = accuracy(with_biases(base, model), others[0])
        for entries in (FEW, MORE) if how == "sgd" else ():
            drawn = located(base, torch.randperm(entries_of(base), generator=generator)[:entries])
            random[entries] = accuracy(with_entries(base, model, drawn), others[0])
        pair = CheckpointPair(base_directory, save(model, tokenizer, out / how))
        for search in SEARCHES if how == "sgd" else SEARCHES[:1]:
            for entries in (FEW, MORE):
                # Stability is shown of one search; it takes two more.
                seeds = 3 if (how, search, entries) == ("sgd", "budget", FEW) else 1
                alone[how, search, entries] = skill_localization(
                    pair, rows["0"], ood=shifted, budgets=(entries,), search=search, seeds=seeds, **measured
                )
        model = copy.deepcopy(base)
        tune(model, lessons, how, longer, seed)
        pair = CheckpointPair(base_directory, save(model, tokenizer, out / f"{how}-together"))
        # With fewer rows a step more of a region is where its search began, which all skills have in common.
        together[how] = skill_localization(pair, rows, budgets=(MORE,), batch_rows=128, seeds=1, **measured)
    planted = measure_planted(base, world, budget, out, generator, measured)
    return Outcome(seed, base_accuracy, learnt, biases, random, alone, together, planted)


def measure_planted(
    base: GPT2LMHeadModel,
    world: World,
    budget: Budget,
    out: Path,
    generator: torch.Generator,
    measured: Mapping[str, Any],
) -> Planted:
    """Plant one skill, and two at once, and localize them."""
    tokenizer = make_tokenizer(WORDS)
    lessons, others = (
        [world.items(task, many, generator, noise=0) for task in (0, 1)] for many in (2000, budget.items)
    )
    rows = [write_rows(items.rows(), out / f"planted{task}.jsonl") for task, items in enumerate(others)]

    def pair(name: str, skills: list[tuple[Items, Region]]) -> CheckpointPair:
        model = copy.deepcopy(base)
        plant(model, skills, budget.planting, generator)
        disturb(model, base, union(entries for _, entries in skills), generator)
        return CheckpointPair(out / "base", save(model, tokenizer, out / name))

    count = budget.planted
    steepest = steep(base, lessons)
    steepest = steepest[torch.randperm(len(steepest), generator=generator)]
    region, first = (located(base, steepest[:count]) for _ in range(2))
    # The last third of the first is the first third of the second.
    second = located(base, steepest[count - count // 3 : 2 * count - count // 3])
    alone = skill_localization(
        pair("planted", [(lessons[0], region)]),
        {"0": rows[0]},
        budgets=tuple(round(count * share) for share in (0.5, 1.0, 1.5)),
        seeds=1,
        **measured,
    )
    both = skill_localization(
        pair("planted-both", [(lessons[0], first), (lessons[1], second)]),
        {"0": rows[0], "1": rows[1]},
        budgets=(count,),
        seeds=1,
        **measured,
    )
    return Planted(region, alone, (first, second), both)


def claims(outcome: Outcome) -> list[Claim]:
    """The claims about one seed."""
    claims = []

    def claim(text: str, holds: bool, numbers: str) -> None:
        claims.append(Claim(outcome.seed, text, bool(holds), numbers))

    tuned = outcome.metric("tuned")
    for search in SEARCHES:
        learned = outcome.metric("learned", search=search)
        claim(
            f"SGD, 0.3 %, {search}: 0.95 of tuned's accuracy or more",
            learned >= 0.95 * tuned,
            f"{learned:.3f} of {tuned:.3f}",
        )
        # By 1 % those that moved furthest do nearly as well, in the reference too: shown, not claimed.
        moved = outcome.metric("movement", search=search)
        claim(
            f"SGD, 0.3 %, {search}: 0.10 or more above top movement",
            learned - moved >= 0.1,
            f"{learned:.3f} and {moved:.3f}",
        )
        calm, sure = outcome.ece("graft", search=search), outcome.ece("tuned")
        claim(
            f"SGD, 1 %, {search}: at most 0.6 of tuned's calibration error",
            calm <= 0.6 * sure,
            f"{calm:.3f} of {sure:.3f}",
        )
    claims.append(above_random(outcome, MORE))
    graft, tuned = (outcome.accuracy(model, search="faithful", role="ood") for model in ("graft", "tuned"))
    claim(
        "SGD, 1 %, faithful: out of distribution 0.03 or more above tuned",
        graft >= tuned + 0.03,
        f"{graft:.3f} and {tuned:.3f}",
    )
    learned, diffuse = outcome.metric("learned"), outcome.metric("learned", "adamw")
    claim(
        "0.3 %, budget: SGD's region is 0.10 or more above AdamW's",
        learned - diffuse >= 0.1,
        f"{learned:.3f} and {diffuse:.3f}",
    )
    for how in HOW:
        like, unlike = (outcome.overlap(how, pairs) for pairs in (LIKE, UNLIKE))
        claim(
            f"three skills, {how}: regions of the like pair overlap more than those of unlike pairs",
            like > unlike,
            f"{like:.2f} and {unlike:.2f}",
        )
    apart = min(outcome.rel("adamw", i, i) - outcome.rel("adamw", i, j) for i, j in UNLIKE)
    claim(
        "three skills, adamw: a region keeps 0.3 more of its own skill than of an unlike one",
        apart >= 0.3,
        f"{apart:.2f} at least",
    )
    return claims + planted_claims(outcome)


def above_random(outcome: Outcome, entries: int) -> Claim:
    """Entries that moved furthest carry more than random ones."""
    moved, random = outcome.metric("movement", entries=entries), outcome.random[entries]
    return Claim(
        outcome.seed,
        f"SGD, {SHARES[entries]}: top movement is 0.15 or more above random entries",
        bool(moved - random >= 0.15),
        f"{moved:.3f} and {random:.3f}",
    )


def hoped(outcome: Outcome) -> list[Claim]:
    """Results of the reference that need not hold here: shown, without effect on the exit code.

    In the reference top movement did part of the work with 0.3 % of the entries. Here that depends on the
    base, and the claim is about 1 %. There the regions of an AdamW-tuned model kept all of their skill and
    nothing of unlike ones. Here they are less pure: the base leans to the rarer answer for every prompt, and
    any change of the answer to an unlike prompt is right more often. Regions of two planted skills overlap as
    planted where their prompts share nothing, as in the tests of the analysis; the prompts of this base do,
    and entries planted for one skill serve the other. The other moved entries may also undo both skills: then
    there is nothing to localise, and the value is NaN.
    """
    planted, located = outcome.planted.overlaps()
    own_rel = min(outcome.rel("adamw", task, task) for task in range(TASKS))
    other = max(outcome.rel("adamw", *pair) for pair in UNLIKE)
    return [
        above_random(outcome, FEW),
        Claim(
            outcome.seed,
            "three skills, adamw: a region keeps 0.9 or more of its own skill",
            bool(own_rel >= 0.9),
            f"{own_rel:.2f} at least",
        ),
        Claim(
            outcome.seed,
            "three skills, adamw: and 0.1 or less of an unlike one",
            bool(other <= 0.1),
            f"{other:.2f} at most",
        ),
        Claim(
            outcome.seed,
            "two planted skills: their regions overlap as planted, to 0.15",
            bool(abs(planted - located) <= 0.15),
            f"{located:.2f}, planted {planted:.2f}",
        ),
    ]


def planted_claims(outcome: Outcome) -> list[Claim]:
    """The claims about the planted skills."""
    planted = outcome.planted
    metrics, size = planted.result.metrics, planted.size
    recovery, region = metrics.get("recovery", math.nan), metrics.get("region", math.nan)
    rel, (precision, recall) = metrics.get("rel", math.nan), planted.precision_recall()
    return [
        Claim(
            outcome.seed,
            "planted: 0.95 of tuned's accuracy and of its gain, in 1.5 times the planted entries or fewer",
            bool(recovery >= 0.95 and rel >= 0.95 and region <= 1.5 * size),
            f"{recovery:.2f} and {rel:.2f} in {region:g} of {size}; precision {precision:.2f}, "
            f"recall {recall:.2f}",
        ),
    ]


def main() -> int:
    """Measure and print; exit code 1 if a claim fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder to keep checkpoints, rows and claims in")
    parser.add_argument("--quick", action="store_true", help="everything once, too short to claim anything")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small, more threads only wait for each other
    transformers.logging.disable_progress_bar()
    budget, console, outcomes = QUICK if arguments.quick else Budget(), Console(width=180), []
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        for seed in arguments.seeds:
            console.print(f"seed {seed} …")
            directory = out / f"seed{seed}"
            directory.mkdir(parents=True, exist_ok=True)
            outcomes.append(measure(seed, budget, directory))
        show(outcomes, console)
        if arguments.quick:
            return 0
        held = [claim for outcome in outcomes for claim in claims(outcome)]
        (out / "claims.json").write_text(json.dumps([asdict(claim) for claim in held], indent=1))
    console.print(
        claims_table(held), claims_table([claim for outcome in outcomes for claim in hoped(outcome)], HOPED)
    )
    return 0 if all(claim.holds for claim in held) else 1


if __name__ == "__main__":
    sys.exit(main())
