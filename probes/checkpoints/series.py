"""The checkpoints of one run in step order, and what is measured on each, kept as soon as it is known."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from probes.checkpoints.checkpoint import Checkpoint
from probes.checkpoints.opening import open_checkpoint
from probes.errors import InputError
from probes.files.locate import MODEL_FILES, adapter_files
from probes.files.untrusted import confined, read_json

# What is measured on one checkpoint: arrays and numbers by name.
Measurement: TypeAlias = dict[str, np.ndarray]
Progress: TypeAlias = Callable[[int, int, str], None]
Calls: TypeAlias = Iterable[Callable[[], Mapping[str, Any]]]
Each: TypeAlias = Callable[[Calls], Iterable[Mapping[str, Any]]]

# How trainers and hub revisions write a step: checkpoint-500, global_step500, step1000-tokens4B, iter_20k.
STEP = re.compile(r"(?:step|checkpoint|ckpt|iter(?:ation)?)s?[-_=]?(\d+)([kKmM](?![a-zA-Z]))?")
THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000}


def one_by_one(calls: Calls) -> Iterator[Mapping[str, Any]]:
    """What calls return, each made here when it is asked for."""
    return (call() for call in calls)


class TooShortError(InputError):
    """A series has fewer checkpoints than a conclusion needs; what was measured on them is kept."""


class CheckpointSeries:
    """Checkpoints that are opened but not read, the first being the base.

    Attributes:
        checkpoints: in order; adapters among them are adapters of the first, or of its base.
        steps: rising; 0, 1, 2 … where nothing tells them.
        labels: the steps as they were given or found, else the references.
        stepped: whether the steps are those of the run, not mere places.
    """

    def __init__(
        self,
        refs: Sequence[Any],
        *,
        steps: Sequence[Any] = (),
        cache: Path | None = None,
        complete: bool = False,
    ):
        """Open every checkpoint, so that a misspelt last one is found before anything runs.

        Args:
            refs: as of `expand`, or whatever `open_checkpoint` takes.
            steps: one for each, rising; without them those in trainer_state.json or in the names, by which
                the checkpoints are put in order.
            cache: a directory that keeps measurements; without it they live as long as the series.
            complete: no checkpoint will follow, as none does a pair.

        Raises:
            InputError: no checkpoint, one that does not open, not as many steps, or steps that do not rise.
        """
        found = expand(refs)
        if not found:
            raise InputError("a series needs checkpoints; none is given")
        if len(steps) and len(steps) != len(found):
            raise InputError(f"--steps: {len(steps)} steps for {len(found)} checkpoints, the first included")
        given = tuple(steps)
        if given:
            in_order(given)  # told before files are opened
        base = open_checkpoint(found[0])
        of = base.base or base  # a series may begin with an adapter
        opened = [base, *(open_checkpoint(ref, base=of) for ref in found[1:])]
        told = None if given else steps_of(opened)
        if told is not None:  # a shell puts checkpoint-1000 before checkpoint-200
            order = np.argsort(told, kind="stable")
            opened, told = [opened[place] for place in order], tuple(told[place] for place in order)
        self.checkpoints = tuple(opened)
        self._take_steps(given or told)
        self.cache = cache
        self.complete = complete
        self._context = ""
        self._held: dict[str, Measurement] = {}

    def _take_steps(self, labels: Sequence[Any] | None) -> None:
        known = in_order(labels) if labels else None
        self.stepped = known is not None
        places = tuple(float(place) for place in range(len(self.checkpoints)))
        self.steps: tuple[float, ...] = places if known is None else known
        names = labels or [each.ref for each in self.checkpoints]
        self.labels: tuple[str, ...] = tuple(map(_written, names))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<CheckpointSeries of {len(self)}: {self.labels[0]} to {self.labels[-1]}>"

    @property
    def base(self) -> Checkpoint:
        """The first checkpoint."""
        return self.checkpoints[0]

    @cached_property
    def stamps(self) -> tuple[str, ...]:
        """A stamp of each checkpoint, in order: `Checkpoint.stamp`."""
        return tuple(checkpoint.stamp() for checkpoint in self.checkpoints)

    def within(self, context: str, cache: Path | None) -> "CheckpointSeries":
        """The same series, whose measurements are kept in a directory under what else they depend on."""
        made = object.__new__(type(self))
        made.__dict__ = {**self.__dict__, "_context": context, "cache": cache, "_held": {}}
        return made

    def measured(
        self,
        name: str,
        parameters: Mapping[str, Any],
        measure: Callable[[Checkpoint], Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        least: tuple[int, str] = (1, ""),
        each: Each = one_by_one,
    ) -> list[Measurement]:
        """What `measure` gives of every checkpoint, in order; one is in memory at a time.

        Args:
            name: of the measurement.
            parameters: all that it depends on beside the checkpoint, as JSON keeps it.
            measure: from a checkpoint to arrays and numbers by name, none of them of objects.
            progress: called with (checkpoints done, all, the label of the next).
            least: as of `at_least`, how many a conclusion takes and for what.
            each: gives what calls return, in their order; those of what is not known yet.

        Raises:
            TooShortError: there are fewer; they are measured all the same where that is kept for a series
                that others may follow.
        """
        if self.complete or not self.cache:
            self.at_least(*least)
        keys = [f"{name}.{_key(self._context, name, parameters, stamp)}" for stamp in self.stamps]
        new = {key: checkpoint for key, checkpoint in zip(keys, self.checkpoints, strict=True)
               if not self._known(key)}  # fmt: skip
        made = iter(each(partial(measure, checkpoint) for checkpoint in new.values()))
        for place, key in enumerate(keys):
            if progress:
                progress(place, len(self), self.labels[place])
            if key in new and key not in self._held:
                self._keep(key, next(made))
        self.at_least(*least)
        return [self._held[key] for key in keys]

    def at_least(self, count: int, why: str) -> None:
        """Refuse a series that is too short for a conclusion.

        Raises:
            TooShortError: it has fewer checkpoints; the text says why so many are needed.
        """
        if len(self) < count:
            many = "checkpoint" if len(self) == 1 else "checkpoints"
            raise TooShortError(f"a series of {len(self)} {many}: {why} needs at least {count}; give more")

    def _known(self, key: str) -> bool:
        if key not in self._held and self.cache:
            known = read_measurement(self.cache / f"{key}.npz")
            if known is not None:
                self._held[key] = known
        return key in self._held

    def _keep(self, key: str, measured: Mapping[str, Any]) -> None:
        self._held[key] = {name: np.asarray(value) for name, value in measured.items()}
        if self.cache:
            write_measurement(self.cache / f"{key}.npz", self._held[key])


class RecordedSeries(CheckpointSeries):
    """A run that is still going on: what was measured at earlier steps, and the model as it is now.

    Attributes:
        checkpoints: the present model alone, if there is one; the weights of earlier steps are gone.
    """

    def __init__(self, steps: Sequence[int | float], cache: Path, now: Any = None):
        """Take up a recording.

        Args:
            steps: all, the present one last.
            cache: the directory that keeps what was measured.
            now: the model at the last step; None once everything has been measured.
        """
        self.checkpoints = () if now is None else (open_checkpoint(now),)
        self.steps = in_order(steps) or ()
        self.labels = tuple(f"{step:g}" for step in steps)
        self.stepped = True
        self.cache = cache
        self._context = ""
        self._held = {}

    def measured(
        self,
        name: str,
        parameters: Mapping[str, Any],
        measure: Callable[[Checkpoint], Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        least: tuple[int, str] = (1, ""),
        each: Each = one_by_one,
    ) -> list[Measurement]:
        """As of a series of files; what an earlier step lacks cannot be measured any more.

        However few there are, the present step is measured: others will follow it.

        Raises:
            InputError: an earlier step was not measured with these parameters.
            TooShortError: there are fewer than `least`.
        """
        assert self.cache is not None
        found = []
        for place, step in enumerate(self.steps):
            if progress:
                progress(place, len(self), self.labels[place])
            key = f"{name}.{_key(self._context, name, parameters, f'step {step:g}')}"
            if place == len(self) - 1 and self.checkpoints:
                if not self._known(key):
                    self._keep(key, *each([partial(measure, self.checkpoints[0])]))
                found.append(self._held[key])
                continue
            known = read_measurement(self.cache / f"{key}.npz")
            if known is None:
                raise InputError(f"{self.cache}: holds no {name} of step {step:g} with these parameters")
            found.append(known)
        self.at_least(*least)
        return found


def series_of(given: Any, *, steps: Sequence[Any] = ()) -> CheckpointSeries:
    """A series, whatever form it was given in: one already, or references in order.

    Raises:
        InputError: as `CheckpointSeries`, or one reference where several are meant.
    """
    if isinstance(given, CheckpointSeries):
        return given
    many = [given] if isinstance(given, str | Path) else list(given)
    return CheckpointSeries(many, steps=steps)


def expand(refs: Sequence[Any]) -> list[Any]:
    """One reference for each checkpoint.

    A pattern (`run/checkpoint-*`), a directory that holds only checkpoint-N, and a pattern of revisions of a
    hub repository (`org/name@step*`) stand for several, in step order.

    Raises:
        InputError: a pattern that nothing matches, or a hub that cannot be asked.
    """
    found: list[Any] = []
    for ref in refs:
        if not isinstance(ref, str | Path):
            found.append(ref)
            continue
        text = str(ref)
        path = Path(text).expanduser()
        if path.exists():
            found += checkpoints_in(path) or [ref]
        elif not has_magic(text):
            found.append(ref)
        elif "@" in text and not text.startswith((".", "/", "~")):
            found += revisions(text)
        else:
            matched = [match for match in glob(str(path)) if _holds_weights(Path(match))]
            if not matched:
                raise InputError(f"{text}: no checkpoint matches this pattern")
            found += sorted(matched, key=natural)
    return found


def checkpoints_in(run: Path) -> list[str]:
    """The checkpoint-N in the directory of a run that is no checkpoint itself, in step order."""
    if not run.is_dir() or _holds_weights(run):
        return []
    return [str(place) for place in sorted(run.glob("checkpoint-*"), key=natural) if place.is_dir()]


def revisions(ref: str) -> list[str]:
    """The branches and tags of a hub repository that match `org/name@pattern`, in step order.

    Raises:
        InputError: the hub cannot be asked, or nothing matches.
    """
    from huggingface_hub import HfApi

    name, _, pattern = ref.partition("@")
    try:
        told = HfApi().list_repo_refs(name)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{ref}: the revisions of {name} cannot be listed ({type(error).__name__}: {reason}); name "
            f"each as {name}@REVISION"
        ) from error
    known = [each.name for each in (*told.branches, *told.tags)]
    matched = sorted({each for each in known if fnmatchcase(each, pattern)}, key=natural)
    if not matched:
        raise InputError(f"{ref}: none of the {len(known)} revisions of {name} matches {pattern!r}")
    return [f"{name}@{each}" for each in matched]


def natural(text: Any) -> list[tuple[int, int | str]]:
    """A key that sorts numbers inside names by their value."""
    parts = re.split(r"(\d{1,18})", str(text))
    return [(0, int(part)) if place % 2 else (1, part) for place, part in enumerate(parts) if part]


def steps_of(checkpoints: Sequence[Checkpoint]) -> tuple[float, ...] | None:
    """The steps of the run that checkpoints are known to be of; None unless all but the first tell theirs.

    A first one that tells none is the base, at step 0.
    """
    told = [step_of(checkpoint) for checkpoint in checkpoints]
    if told[0] is None:
        told[0] = 0.0
    if len(told) == 1 or any(step is None for step in told):
        return None
    return tuple(step for step in told if step is not None)


def step_of(checkpoint: Checkpoint) -> float | None:
    """The step of a checkpoint: of its trainer_state.json, of its revision, or of the end of its path."""
    directory = checkpoint.directory
    if directory is not None and (directory / "trainer_state.json").is_file():
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            return float(read_json(confined(directory / "trainer_state.json", directory))["global_step"])
    _, _, revision = checkpoint.ref.partition("@")
    name = revision or Path(checkpoint.ref).name
    matched = STEP.search(name)
    if matched is None:
        return None
    return float(int(matched[1]) * THOUSANDS[(matched[2] or "").lower()])


def in_order(labels: Sequence[Any]) -> tuple[float, ...] | None:
    """The labels as steps, if all of them are finite numbers.

    Raises:
        InputError: they are, and do not rise.
    """
    try:
        steps = tuple(float(label) for label in labels)
    except (TypeError, ValueError):
        return None
    if not steps or not np.isfinite(steps).all():
        return None
    for place in range(1, len(steps)):
        if steps[place] <= steps[place - 1]:
            late, early = (_written(labels[at]) for at in (place, place - 1))
            raise InputError(
                f"step {late} comes after step {early}: give the checkpoints in step order, or say with "
                "--steps what their steps are"
            )
    return steps


def read_measurement(path: Path) -> Measurement | None:
    """A measurement that was kept; None if there is none, or if the file is damaged."""
    try:
        # numpy leaves a file open that it is given by name and finds damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except Exception:  # whatever is wrong with it, it is measured again
        return None


def write_measurement(path: Path, made: Measurement) -> None:
    """Keep a measurement, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **made)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _holds_weights(path: Path) -> bool:
    """Whether a path is a checkpoint, as far as its names tell."""
    if path.is_file():
        return True
    return (
        any((path / name).is_file() for name in MODEL_FILES)
        or adapter_files(path) is not None
        or any(path.glob("*.safetensors"))
    )


def _written(step: Any) -> str:
    return f"{step:g}" if isinstance(step, float) else str(step)


def _key(*parts: Any) -> str:
    """A short hash of what a measurement depends on."""
    text = json.dumps(
        [dict(part) if isinstance(part, Mapping) else part for part in parts], sort_keys=True, default=str
    )
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
