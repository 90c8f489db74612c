"""Made-up runs of a mixture of experts: routes that come to be shared in groups, and routes that drift."""

import numpy as np

from diagnostics.analyses.pathways.record import Record, Samples
from diagnostics.analyses.pathways.run import RoutingRun
from diagnostics.analyses.pathways.snapshot import PathwaySettings
from probes.experts.routes import Routes

STEPS = (0.0, 50.0, 100.0, 200.0, 300.0, 400.0, 600.0, 800.0, 1000.0, 1200.0)
# How far samples have come to share their group's routes, step by step: memorised at 100, then on.
SHARED = (0.0, 0.0, 0.0, 0.05, 0.1, 0.2, 0.45, 0.7, 0.9, 1.0)
LAYERS, EXPERTS, WIDTH = 4, 8, 16


def samples_of(groups=4, group_size=20, trained=True):
    """Samples of groups g0, g1 … in order."""
    return Samples(
        names=tuple(f"g{group}" for group in range(groups)),
        groups=np.repeat(np.arange(groups), group_size),
        rows=tuple(f"rows.jsonl:{row + 1}" for row in range(groups * group_size)),
        trained=trained,
    )


def ask(**settings):
    about = {
        "weights": "full", "tau": 0.7, "alphabet": "tagged", "metric": "accuracy", "epsilon": None,
        "delta": 0.05, "permutations": 200, "draws": 200, "seed": 0,
    }  # fmt: skip
    return PathwaySettings(**{**about, **settings})


def records_of(samples, *, shared=SHARED, common=None, seed=0, held=200, learns=True):
    """Records of a run.

    Args:
        shared: how much of its routing each sample shares with its group at each step.
        common: how much it shares with all samples.
        learns: whether the held-out rows follow `shared`; else they stay at chance.
    """
    generator = np.random.default_rng(seed)
    count, kinds = len(samples.groups), len(samples.names)
    of_sample = generator.dirichlet(np.full(EXPERTS, 0.5), (count, LAYERS))
    of_group = generator.dirichlet(np.full(EXPERTS, 0.5), (kinds, LAYERS))[samples.groups]
    of_all = generator.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    routers = generator.normal(size=(LAYERS, EXPERTS, WIDTH)).astype(np.float32)
    draws = generator.random(held)
    records = []
    for step, share in enumerate(shared):
        rest = 0.0 if common is None else common[step]
        full = share * of_group + rest * of_all + (1 - share - rest) * of_sample
        loss = (2.0, 0.9, 0.02)[min(step, 2)] + 0.01 * generator.random(count)
        right = (draws < 0.5 + 0.5 * share * learns).astype(float)
        records.append(
            Record(
                routes=Routes(
                    full=full.astype(np.float32), top=full.astype(np.float32), tokens=np.full(count, 9),
                    layers=(1, 2, 3, 5), top_k=2,
                ),
                routers=routers + step / 10, nats=loss, units=np.ones(count),
                held_nats=1 - right, held_units=np.ones(held), held_right=right,
            )
        )  # fmt: skip
    return records


def run_of(samples=None, steps=STEPS, records=None, asked=None, **how):
    samples = samples or samples_of()
    records = records or records_of(samples, **how)
    return RoutingRun(steps, [f"{step:g}" for step in steps], records, samples, asked or ask(), workers=1)
