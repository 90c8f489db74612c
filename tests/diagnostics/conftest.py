"""Audits made up whole, to be reported on, without a checkpoint; and workers made up in this process."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from diagnostics.execution import jobs, workers

HOSTILE = (
    """<script>document.title="owned"</script>"><img src=x onerror="document.title='owned'"><b>b</b>&lt;|`"""
)


@pytest.fixture
def simulated_workers(monkeypatch):
    """An engine with workers that runs every job here, after a round trip through pickle.

    Gives the device of each job.
    """
    monkeypatch.setattr(workers, "runs_in_this_process", lambda: False)
    devices = []

    def run_jobs(calls, *, device):
        for call in calls:
            devices.append(device)
            yield jobs.Job(call, 1, device)()

    monkeypatch.setattr(workers.jobs, "run_jobs", run_jobs)
    yield devices
    for timer in workers._TIMERS:
        timer.cancel()
    workers._close()


@pytest.fixture
def hostile_text() -> str:
    """What a tensor, a file or a person might be called by someone who means harm."""
    return HOSTILE


@pytest.fixture
def intruder_tables() -> Callable[..., dict[str, pd.DataFrame]]:
    """Makes up tables as intruder dimensions leaves them.

    Layer 0 is frozen, every k_proj not applicable; the leading `layer` vectors of each o_proj are intruders.
    """
    return made_up_intruders


def made_up_intruders(layers: int = 4, *, suffix: str = "", clean: bool = False) -> dict[str, pd.DataFrame]:
    """The tables of `intruder_tables`; a suffix ends each matrix' name, a clean pair has no intruder."""
    matrices, vectors, spectra, cosines = [], [], [], []
    for layer in range(layers):
        for component in ("q_proj", "k_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{component}.weight{suffix}"
            status = "frozen" if layer == 0 else "not applicable" if component == "k_proj" else "measured"
            count = layer if component == "o_proj" and status == "measured" and not clean else 0
            key = {"matrix": name, "layer": layer, "component": component}
            lowest = math.nan if status != "measured" else 0.1 if count else 0.95
            matrices.append(
                {
                    **key,
                    "rows": 64,
                    "columns": 128,
                    "intruders": count,
                    "examined": 10 if status == "measured" else 0,
                    "floor": 0.36,
                    "status": status,
                    "min_cosine_low": lowest,
                    "update_norm": 0.5 * layer,
                }
            )
            if status != "measured":
                continue
            for rank in range(1, 11):
                new = rank <= count
                vectors.append(
                    {
                        **key,
                        "rank": rank,
                        "singular_value": 20.0 / rank,
                        "cosine_low": 0.1 if new else 0.95,
                        "cosine_high": 0.4 if new else 1.0,
                        "tier": "direct" if new else "subspace",
                        "intruder": new,
                    }
                )
            if count:
                pairs = [(tuned, base) for tuned in range(1, 13) for base in range(1, 13)]
                spectra += [
                    {"matrix": name, "rank": rank, "base": 10.0 / rank, "tuned": 20.0 / rank}
                    for rank in range(1, 21)
                ]
                cosines += [
                    {
                        "matrix": name,
                        "tuned_rank": tuned,
                        "base_rank": base,
                        "cosine": 0.9 if base == tuned - count else 0.05,
                    }
                    for tuned, base in pairs
                ]
    total = sum(row["intruders"] for row in matrices)
    sweep = [
        {"k": k, "epsilon": epsilon, "intruders_low": total if epsilon >= 0.5 else 0, "intruders_high": total}
        for k in (1, 5, 10)
        for epsilon in (0.3, 0.5, 0.7)
    ]
    return {
        "matrices": pd.DataFrame(matrices),
        "vectors": pd.DataFrame(vectors),
        "sweep": pd.DataFrame(sweep),
        "spectra": pd.DataFrame(spectra, columns=["matrix", "rank", "base", "tuned"]),
        "cosines": pd.DataFrame(cosines, columns=["matrix", "tuned_rank", "base_rank", "cosine"]),
    }


@pytest.fixture
def reported(register: Callable[..., Any]) -> Callable[..., Any]:
    """Builds an audit of a made-up analysis `angles`: `reported(metrics=…, tables=…, draw=…, **audit)`."""
    from diagnostics.core.analysis import Result
    from diagnostics.core.policy import parse
    from diagnostics.store.audit_store import Audit, Outcome

    def build(
        *,
        metrics: dict[str, float] | None = None,
        tables: dict[str, pd.DataFrame] | None = None,
        notes: tuple[str, ...] = (),
        masks: dict[str, Any] | None = None,
        draw: Callable[[Result], dict[str, Any]] = lambda result: {},
        rules: dict[str, Any] | None = None,
        outcomes: dict[str, Outcome] | None = None,
        parameters: dict[str, Any] | None = None,
        **audit: Any,
    ) -> Audit:
        def angles(pair, *, k: int = 10, epsilon: float = 0.5):
            return Result(
                metrics=metrics or {"widest": 0.25}, tables=tables or {}, notes=notes, masks=masks or {}
            )

        measure = register(
            "angles",
            angles,
            question="How wide is it?",
            reading="0 is closed, 1 is open.",
            paper="Euclid, arXiv:0001.00001v2",
            summary=lambda result: "It is a quarter open.",
            metrics={name: f"what {name} says" for name in metrics or {"widest": 0.25}},
            draw=draw,
        )
        outcome = Outcome(
            status="ok",
            seconds=1.5,
            peak_rss_mb=321.0,
            device="cpu",
            result=measure(SimpleNamespace(base=None, tuned=None)),
        )
        about = {
            "base": {"ref": "org/base", "kind": "full", "fingerprint": "a1" * 32, "parameters": 1_234_567},
            "tuned": {
                "ref": "runs/tuned",
                "kind": "adapter",
                "fingerprint": "b2" * 32,
                "adapter": {"type": "LORA", "r": 8, "dora": None},
            },
            "created": "2026-02-11T09:41:07Z",
            "tunescope": "0.1.0",
            **audit,
        }
        return Audit(
            policy=parse({"angles": rules or {}}, origin="a made-up policy"),
            analyses={"angles": outcome, **(outcomes or {})},
            **about,
        )

    return build
