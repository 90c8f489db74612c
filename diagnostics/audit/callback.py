"""The measures of a series, recorded while a model trains with transformers' Trainer.

    trainer.add_callback(AuditCallback("audit", task=["held-out.jsonl"], train=["train.jsonl"], every=500))

Nothing of the training changes: its random states, gradients and modes are as they were. `tunescope report`
and the dashboard read the directory at any time.
"""

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from diagnostics.audit.plan import about, check_settings, missing, not_chosen, parameters, usable
from diagnostics.audit.step import run_one, write_report
from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.inputs import open_roles
from diagnostics.core.policy import Policy, default_policy
from diagnostics.core.policy_file import load_policy
from diagnostics.core.registry import find, installed
from diagnostics.execution import environment
from diagnostics.store.audit_store import MEASUREMENTS, Audit, Outcome, Store
from diagnostics.store.files import replacing
from diagnostics.store.keys import digest, key
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.series import RecordedSeries, TooShortError
from probes.checkpoints.steps import step_label
from probes.errors import InputError

STEPS = "steps.json"


class AuditCallback(TrainerCallback):
    """Records what analyses of a series measure, at the start, every so many steps and at the end.

    The model is measured as it lies in memory, on its device, and is copied for it: there must be room for
    two. What needs the weights of an earlier step is not measured; `tunescope series` does it on saved
    checkpoints. A training that is resumed goes on with its recording.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        task: Iterable[str | Path] = (),
        keep: Iterable[str | Path] = (),
        guard: Iterable[str | Path] = (),
        ood: Iterable[str | Path] = (),
        train: Iterable[str | Path] = (),
        every: int | None = None,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        policy: Policy | str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
    ):
        """Check what is asked for, before anything trains.

        Args:
            out: an audit's directory.
            task, keep, guard, ood, train: files of rows by role, as of `diagnostics.audit.audit`.
            every: steps between measurements; without it, whenever the Trainer saves or evaluates.
            only, skip: names of analyses of a series.
            settings, policy, limit, seed: as of `diagnostics.audit.audit`.

        Raises:
            InputError, UnknownNameError: the input is wrong, or no analysis of a series can run on it.
        """
        if every is not None and every < 1:
            raise InputError(f"every is {every}; at least 1 step lies between measurements")
        self.every = every
        self.store = Store(out)
        rules = policy if isinstance(policy, Policy) else load_policy(policy) if policy else default_policy()
        self.policy = rules
        files = {"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}
        self.rows = open_roles(files, limit=limit)
        check_settings(settings or {})
        self.options: dict[str, Any] = {
            "only": list(only),
            "skip": list(skip),
            "settings": settings or {},
            "seed": seed,
        }
        self.reasons = {name: not_chosen(name, only) for name in installed()}
        self.plan: dict[str, dict[str, Any]] = {}
        names, broken = usable(only, skip)
        self.reasons |= broken
        for name in names:
            record = find(name)
            lacks = missing(record, {"pair", "series", *self.rows})
            if "series" not in record.inputs:
                self.reasons[name] = "compares two checkpoints; `tunescope audit BASE TUNED` runs it"
            elif lacks:
                self.reasons[name] = lacks
            else:
                # A model in memory is measured in its own dtype.
                self.plan[name] = parameters(record, settings or {}, {"seed": seed})
                if "dtype" in self.plan[name] and "dtype" not in {
                    *record.unshared,
                    *(settings or {}).get(name, {}),
                }:
                    self.plan[name]["dtype"] = None
                del self.reasons[name]
        if not self.plan:
            lines = [f"{name} {reason}" for name, reason in self.reasons.items()]
            raise InputError(f"nothing to record: {'; '.join(lines)}")
        self.steps: list[float] = []
        self.began: dict[str, Any] = {}

    # --- what transformers calls ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take up an earlier recording, and measure the model as it is now."""
        if state.is_world_process_zero:
            with self.store:
                self._take_up(state.global_step)
            self.record(state.global_step, given["model"], given.get("processing_class"))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure, if it is time."""
        if self.every is not None and state.global_step % self.every == 0:
            self._due(state, given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure what was saved."""
        if self.every is None:
            self._due(state, given)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure what was evaluated."""
        if self.every is None:
            self._due(state, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure the model that the training ends with."""
        self._due(state, given)

    def _due(self, state: Any, given: Mapping[str, Any]) -> None:
        if not state.is_world_process_zero or (self.steps and state.global_step <= self.steps[-1]):
            return
        try:
            self.record(state.global_step, given["model"], given.get("processing_class"))
        except Exception as error:  # a training of days must not end for what watches it
            logging.get_logger(__name__).warning(
                f"tunescope: step {state.global_step} is not recorded ({type(error).__name__}: {error})"
            )

    # --- recording ---

    def record(self, step: int | float, model: Any, tokenizer: Any = None) -> Audit:
        """Measure a model at a step, and conclude of the run so far.

        Args:
            step: above the last one.
            model: of transformers or PEFT; it is not changed.
            tokenizer: written beside the audit for the analyses that read text.

        Raises:
            InputError: an analysis refuses its input at the first step; nothing is recorded then.
        """
        with self.store, undisturbed(model):
            checkpoint = open_checkpoint(model)
            if tokenizer is not None:
                place = self.store.out / "tokenizer"
                if not place.exists():
                    tokenizer.save_pretrained(place)
                checkpoint.directory = place
            steps = [*self.steps, float(step)]
            device = str(next(model.parameters()).device)
            about_now = self._described(checkpoint, step)
            state = self._audit(steps, about_now, device)
            earlier = self.store.earlier()
            if earlier is None:
                self.store.begin(state)
            for name, used in self.plan.items():
                series = RecordedSeries(steps, self.store.out / MEASUREMENTS, checkpoint)
                given = {"series": series.within(self._context(name), series.cache), **self.rows}
                asked = name in self.options["only"]  # too short is every run at first
                leave_out = (TooShortError,) if asked else (TooShortError, NotApplicableError)
                outcome = run_one(
                    self.store, find(name), used, given, device=device, progress=None, leave_out=leave_out
                )
                if outcome.status == "failed" and not self.steps:
                    raise InputError(f"{name}: {outcome.reason}")
                state = replace(state, analyses={**state.analyses, name: outcome})
            self.steps = steps
            with replacing(self.store.out / STEPS) as part:
                known = {"context": self._context(), "steps": steps, "base": self.began}
                part.write_text(json.dumps(known), encoding="utf-8")
            self.store.write(state)
            write_report(self.store, state)
        return state

    def _audit(self, steps: list[float], now: Mapping[str, Any], device: str) -> Audit:
        if not self.began:
            self.began = dict(now)
        waiting = {
            name: Outcome(status="skipped", reason="not measured yet", **about(name)) for name in self.plan
        }
        left_out = {name: Outcome(status="skipped", reason=reason) for name, reason in self.reasons.items()}
        return Audit(
            base=self.began,
            tuned=now,
            data={role: [each.describe() for each in made] for role, made in self.rows.items()},
            environment={**environment.environment(device), "seed": self.options["seed"]},
            options=self.options,
            policy=self.policy,
            analyses=dict(sorted({**left_out, **waiting}.items())),
            notes=(f"recorded while the model trained, at {len(steps)} steps",),
            created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            tunescope=version("tunescope"),
            path=self.store.out,
        )

    def _described(self, checkpoint: Checkpoint, step: int | float) -> dict[str, Any]:
        """What the audit says of the model, without its hash: that would take longer than to measure it."""
        return {
            "ref": f"{checkpoint.ref} at step {step_label(step)}",
            "kind": checkpoint.kind,
            "fingerprint": None,
            "parameters": checkpoint.parameters,
            "dtype": checkpoint.dtype,
            "architecture": checkpoint.architecture,
            "adapter": None if checkpoint.adapter is None else dict(checkpoint.adapter),
        }

    def _context(self, name: str = "") -> str:
        """All that measurements depend on beside the model: of one analysis, or of all."""
        rows = {role: [each.describe() for each in made] for role, made in self.rows.items()}
        names = [name] if name else sorted(self.plan)
        return digest(*(key(find(each), self.plan[each], {}, rows) for each in names))

    def _take_up(self, step: int) -> None:
        """Go on with what was recorded before a step; another recording is left behind."""
        try:
            known = json.loads((self.store.out / STEPS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if step and known.get("context") == self._context():
            self.steps = [each for each in known["steps"] if each < step]
            self.began = known["base"]
        else:
            self.store.clear()


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Leave the random states, the modes of all modules and the gradients as they are."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for parameter, _ in gradients:
                parameter.grad = None  # copies would carry them
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training
