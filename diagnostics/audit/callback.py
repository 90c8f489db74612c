"""Recording the analyses of a series while a model trains with transformers' Trainer."""

import json
import logging
import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from diagnostics.audit.plan import (
    Settings,
    make_plan,
    name_list,
    registry_facts,
    resolve_policy,
    usable_analyses,
)
from diagnostics.audit.step import new_audit, run_analysis, write_report
from diagnostics.core.analysis import NotApplicableError
from diagnostics.core.inputs import Files, open_roles
from diagnostics.core.policy import Policy
from diagnostics.core.registry import find
from diagnostics.store.audit_store import MEASUREMENTS, Audit, Outcome, Store
from diagnostics.store.files import replacing
from diagnostics.store.keys import digest, key, one_line
from diagnostics.store.occupied import refuse_occupied, stranger
from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.series import RecordedSeries, TooShortError
from probes.checkpoints.steps import step_label
from probes.errors import InputError

log = logging.getLogger(__name__)
STEPS = "steps.json"


class AuditCallback(TrainerCallback):
    """Runs the analyses of a series at the start of a training, every so many steps, and at its end.

    >>> callback = AuditCallback("audit", only="sparsification", every=500)
    >>> from transformers import Trainer
    >>> Trainer(model, callbacks=[callback]).train()  # doctest: +SKIP

    The training is not changed: random states, gradients and modes are restored. The model is measured in
    memory, on its device, and copied for it: there must be room for two. What needs the weights of an earlier
    step is not measured; `tunescope series` does that on saved checkpoints. A resumed training continues its
    recording. `tunescope report` and the dashboard can read the directory at any time.
    """

    def __init__(
        self, out: str | Path, *,
        task: Files = (), keep: Files = (), guard: Files = (), ood: Files = (), train: Files = (),
        every: int | None = None, only: str | Collection[str] = (), skip: str | Collection[str] = (),
        settings: Settings | None = None, policy: Policy | str | Path | None = None,
        limit: int | None = None, seed: int = 0, replace: bool = False,
    ):  # fmt: skip
        """Check the arguments before anything trains.

        Args:
            out: directory of the audit.
            task, keep, guard, ood, train: files of rows by role, as of `diagnostics.audit.audit`.
            every: steps between measurements; by default whenever the Trainer saves or evaluates.
            only, skip: names of analyses of a series.
            settings, policy, limit, seed, replace: as of `diagnostics.audit.audit`. An earlier recording in
                `out` is continued by a training that resumes, and replaced by one that begins.

        Raises:
            InputError, UnknownNameError: the input is wrong, or no analysis of a series can run on it.
        """
        if every is not None and every < 1:
            raise InputError(f"every is {every}; at least 1 step lies between measurements")
        only, skip, settings = name_list(only), name_list(skip), settings or {}
        self.every = every
        self.store = Store(out)
        if not replace:
            recorded = (self.store.out / STEPS).exists() or not (self.store.out / "audit.json").exists()
            what = stranger(self.store.out) or (None if recorded else "an audit of two checkpoints")
            refuse_occupied(self.store.out, what)
        self.policy = resolve_policy(policy)
        files = {"task": task, "keep": keep, "guard": guard, "ood": ood, "train": train}
        self.rows = open_roles(files, limit=limit)
        self.options: dict[str, Any] = {"only": only, "skip": skip, "settings": settings, "seed": seed}
        usable, _ = usable_analyses(only, skip)
        of_pairs = [name for name in usable if "series" not in find(name).inputs]
        refusal = "compares two checkpoints; `tunescope audit BASE TUNED` runs it"
        self.plan = make_plan(
            {"pair", "series", *self.rows},
            only=only,
            skip=skip,
            settings=settings,
            shared={"seed": seed, "dtype": None},  # a model in memory is measured in its own dtype
            left_out=dict.fromkeys(of_pairs, refusal),
        )
        if not self.plan.parameters:
            reasons = {**self.plan.left_out, **self.plan.lacking}
            lines = [f"{name} {reason}" for name, reason in sorted(reasons.items())]
            raise InputError(f"nothing to record: {'; '.join(lines)}")
        self.steps: list[float] = []
        self.base: dict[str, Any] = {}
        # Why an analysis does not apply to the model, and the steps at which one failed, by name.
        self.inapplicable: dict[str, str] = {}
        self.failures: dict[str, list[float]] = {}

    # --- what transformers calls ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Continue an earlier recording, and measure the model as it is now."""
        if state.is_world_process_zero:
            with self.store:
                self._resume(state.global_step)
            self.record(state.global_step, trainer["model"], trainer.get("processing_class"))

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Measure, if a measurement is due."""
        if self.every is not None and state.global_step % self.every == 0:
            self._record_if_due(state, trainer)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Measure what was saved or evaluated."""
        if self.every is None:
            self._record_if_due(state, trainer)

    on_evaluate = on_save

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Measure the model that the training ends with."""
        self._record_if_due(state, trainer)

    def _record_if_due(self, state: Any, trainer: Mapping[str, Any]) -> None:
        if not state.is_world_process_zero or (self.steps and state.global_step <= self.steps[-1]):
            return
        try:
            self.record(state.global_step, trainer["model"], trainer.get("processing_class"))
        except Exception as error:  # a long training must not end because its recording fails
            reason = f"{type(error).__name__}: {error}"
            log.warning("tunescope: step %s is not recorded (%s)", state.global_step, reason)

    # --- recording ---

    def record(self, step: int | float, model: Any, tokenizer: Any = None) -> Audit:
        """Measure a model at a step, and audit the run so far.

        Args:
            step: above the last one.
            model: of transformers or PEFT; it is not changed.
            tokenizer: saved in the directory for the analyses that read text.

        Raises:
            InputError: the input of an analysis is wrong at the first step; nothing is recorded.
            RuntimeError: an analysis crashed at the first step; the traceback is in audit.log.
        """
        with self.store, undisturbed(model):
            checkpoint = open_checkpoint(model)
            if tokenizer is not None:
                directory = self.store.out / "tokenizer"
                if not directory.exists():
                    tokenizer.save_pretrained(directory)
                checkpoint.directory = directory
            steps = [*self.steps, float(step)]
            device = str(next(model.parameters()).device)
            state = self._audit(steps, self._describe(checkpoint, step), device)
            if self.store.earlier() is None:
                self._keep_steps(self.steps)
                self.store.begin(state)
            for name in self.plan.parameters:
                if name in self.inapplicable:
                    outcome = Outcome(
                        status="skipped", reason=self.inapplicable[name], **registry_facts(name)
                    )
                else:
                    outcome = self._measure(name, steps, checkpoint, device)
                state = replace(state, analyses={**state.analyses, name: outcome})
            self.steps = steps
            state = replace(state, notes=(*state.notes, *self._gaps()))
            self._keep_steps(steps)
            self.store.write(state)
            write_report(self.store, state)
        return state

    def _keep_steps(self, steps: list[float]) -> None:
        recording = {
            "context": self._context(), "steps": steps, "base": self.base,
            "inapplicable": self.inapplicable, "failures": self.failures,
        }  # fmt: skip
        with replacing(self.store.out / STEPS) as part:
            part.write_text(json.dumps(recording), encoding="utf-8")

    def _measure(self, name: str, steps: list[float], checkpoint: Checkpoint, device: str) -> Outcome:
        """Run one analysis on the steps at which it was measured, and on the model as it is now."""
        failures = self.failures.get(name, [])
        measured = [step for step in steps if step not in failures]
        series = RecordedSeries(measured, self.store.out / MEASUREMENTS, checkpoint)
        inputs = {"series": series.within(self._context(name), series.cache), **self.rows}
        record = find(name)
        record = replace(record, function=self._noting(name)(record.function))
        outcome = run_analysis(
            self.store, record, self.plan.parameters[name], inputs, device=device, progress=None,
            # Every run is too short at first.
            skip_on=(TooShortError,) if name in self.options["only"] else (TooShortError, NotApplicableError),
        )  # fmt: skip
        if outcome.status == "failed":
            if not self.steps:
                error = InputError if outcome.fault == "input" else RuntimeError
                raise error(f"{name}: {outcome.reason}")
            log.warning("tunescope: step %s: %s failed (%s)", step_label(steps[-1]), name, outcome.reason)
            self.failures[name] = [*failures, steps[-1]]
        return outcome

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Keep the reason why an analysis does not apply: it is not asked again at the next steps."""
        try:
            yield
        except NotApplicableError as error:
            self.inapplicable[name] = one_line(error)
            raise

    def _gaps(self) -> Iterator[str]:
        """Notes on the steps at which an analysis failed."""
        for name, steps in self.failures.items():
            yield f"{name} failed at step {', '.join(map(step_label, steps))}, which it leaves out"

    def _audit(self, steps: list[float], tuned: Mapping[str, Any], device: str) -> Audit:
        if not self.base:
            self.base = dict(tuned)
        return new_audit(
            self.store, device, self.options, base=self.base, tuned=tuned, data=self._rows_record(),
            policy=self.policy, notes=(f"recorded while the model trained, at {len(steps)} steps",),
            analyses=self.plan.outcomes(Outcome(status="skipped", reason="not measured yet")),
        )  # fmt: skip

    def _describe(self, checkpoint: Checkpoint, step: int | float) -> dict[str, Any]:
        """The facts on the model, without a hash, which would take longer than the measurement."""
        return {
            "ref": f"{checkpoint.ref} at step {step_label(step)}", "kind": checkpoint.kind,
            "fingerprint": None, "parameters": checkpoint.parameters, "dtype": checkpoint.dtype,
            "architecture": checkpoint.architecture,
            "adapter": None if checkpoint.adapter is None else dict(checkpoint.adapter),
        }  # fmt: skip

    def _context(self, name: str = "") -> str:
        """Hash of everything but the model that measurements depend on: of one analysis, or of all."""
        rows, parameters = self._rows_record(), self.plan.parameters
        names = [name] if name else sorted(parameters)
        return digest(*(key(find(name), parameters[name], {}, rows) for name in names))

    def _rows_record(self) -> dict[str, Any]:
        return {role: [named.describe() for named in tasks] for role, tasks in self.rows.items()}

    def _resume(self, step: int) -> None:
        """Continue the recording in the directory, up to a step; one of other measurements is removed."""
        try:
            recording = json.loads((self.store.out / STEPS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            recording = {}
        if step and recording.get("context") == self._context():
            self.steps = [earlier for earlier in recording["steps"] if earlier < step]
            self.base = recording["base"]
            self.inapplicable = recording.get("inapplicable", {})
            self.failures = recording.get("failures", {})
        else:
            self.store.clear()


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Restore random states, gradients and the modes of all modules afterwards."""
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for parameter, _ in gradients:
                parameter.grad = None  # copies would carry them
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training
