"""The checkpoints of one run in step order, and a store that keeps each measurement at once."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from glob import glob, has_magic
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from probes.checkpoints.checkpoint import Checkpoint, summary_table
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.save import atomic_file
from probes.checkpoints.steps import Step, exact, in_order, step_in, step_label
from probes.errors import IncompleteError, InputError, library_error
from probes.files.locate import ADAPTER_FILES, MODEL_FILES
from probes.files.untrusted import confined, read_json
from probes.naming.align import natural_key
from probes.progress import Progress

logger = logging.getLogger(__name__)
# The measurement of one checkpoint: arrays and numbers by name.
Measurement: TypeAlias = dict[str, np.ndarray]
Calls: TypeAlias = Iterable[Callable[[], Mapping[str, Any]]]
RunCalls: TypeAlias = Callable[[Calls], Iterable[Mapping[str, Any]]]


def one_by_one(calls: Calls) -> Iterator[Mapping[str, Any]]:
    """The results of calls, each made in this process when it is asked for."""
    return (call() for call in calls)


class TooShortError(InputError):
    """A series has fewer checkpoints than a conclusion needs; their measurements are kept."""


class CheckpointSeries:
    """Checkpoints that are opened but not read, the first being the base.

    Attributes:
        checkpoints: in order; adapters among them are adapters of the first, or of its base.
        steps: rising; 0, 1, 2 … where no step is known. A step that a float would round is an int.
        labels: the steps as they were given or read, else the references.
        left_out: checkpoints without all of their weights, which may still be written, and what they lack.
        stepped: whether the steps are those of the run, not positions.

    >>> from diagnostics.audit.demo import BUNDLED
    >>> CheckpointSeries([BUNDLED / "base", BUNDLED / "full"], steps=[0, 230])
    <CheckpointSeries of 2: 0 to 230>
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
            steps: one for each, rising; by default those in trainer_state.json or in the names, by which
                the checkpoints after the first are put in order.
            cache: a directory that keeps measurements; without it they live as long as the series.
            complete: no checkpoint will follow, as for a pair.

        Raises:
            InputError: no checkpoint, one that does not open, not as many steps, or steps that do not rise.
                One that is still being written is left out, unless it is the first, or none follows it.
        """
        expanded = expand(refs)
        if not expanded:
            raise InputError("a series needs checkpoints; none is given")
        count = len(expanded)
        if len(steps) not in (0, count):
            raise InputError(f"--steps: {len(steps)} steps for {count} checkpoints, the first included")
        labels: Sequence[Any] | None = tuple(steps)
        if labels:
            in_order(labels)  # before files are opened
        if not labels and _written_by_a_shell(expanded):  # which puts checkpoint-1000 before checkpoint-200
            expanded = sorted(expanded, key=natural_key)
        base = open_checkpoint(expanded[0])
        adapted = base.base or base  # a series may begin with an adapter
        opened: dict[int, Checkpoint] = {0: base}
        self.left_out: dict[str, str] = {}
        for index, ref in enumerate(expanded[1:], 1):
            try:
                opened[index] = open_checkpoint(ref, base=adapted)
            except IncompleteError as error:
                if len(opened) == 1 and index == count - 1:
                    raise  # nothing is left to compare
                self.left_out[str(ref)] = str(error)
                logger.warning("%s is left out of the series: %s", ref, error)
        checkpoints = list(opened.values())
        if labels:
            labels = [labels[index] for index in opened]
        else:
            labels = steps_of(checkpoints)
            if labels is not None:
                order = [0, *sorted(range(1, len(labels)), key=labels.__getitem__)]
                checkpoints, labels = [checkpoints[i] for i in order], [labels[i] for i in order]
        self.checkpoints = tuple(checkpoints)
        run_steps = in_order(labels) if labels else None
        self.stepped = run_steps is not None
        self.steps: tuple[Step, ...] = run_steps or tuple(map(float, range(len(checkpoints))))
        self.labels = tuple(map(step_label, labels or [checkpoint.ref for checkpoint in checkpoints]))
        self.cache = cache
        self.complete = complete
        self._context = ""
        self._held: dict[str, Measurement] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<CheckpointSeries of {len(self)}: {self.labels[0]} to {self.labels[-1]}>"

    def _repr_html_(self) -> str:
        # A series that is still recorded has the weights of its last step alone.
        labels = self.labels[len(self) - len(self.checkpoints) :]
        shown = {labels[i]: self.checkpoints[i].summary for i in ((0, -1) if labels else ())}
        title = f"{len(self)} checkpoints: {', '.join(self.labels[:8])}{', …' if len(self) > 8 else ''}"
        return f"<p>{escape(title)}</p>{summary_table(shown)}"

    @property
    def base(self) -> Checkpoint:
        """The first checkpoint."""
        return self.checkpoints[0]

    @cached_property
    def stamps(self) -> tuple[str, ...]:
        """`Checkpoint.stamp` of each checkpoint, in order."""
        return tuple(checkpoint.stamp() for checkpoint in self.checkpoints)

    @property
    def _sources(self) -> Sequence[str]:
        """What tells the measurements of one checkpoint from those of the others."""
        return self.stamps

    def within(self, context: str, cache: Path | None) -> "CheckpointSeries":
        """The same series; its measurements depend on `context` too and are kept in a directory."""
        series = object.__new__(type(self))
        series.__dict__ = {**self.__dict__, "_context": context, "cache": cache, "_held": {}}
        return series

    def measured(
        self,
        name: str,
        parameters: Mapping[str, Any],
        measure: Callable[[Checkpoint], Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        least: tuple[int, str] = (1, ""),
        run_calls: RunCalls = one_by_one,
    ) -> list[Measurement]:
        """The measurement of every checkpoint, in order; one checkpoint is in memory at a time.

        Args:
            name: of the measurement.
            parameters: all that it depends on besides the checkpoint, as JSON keeps it.
            measure: from a checkpoint to arrays and numbers by name, none of them of objects.
            least: as of `at_least`: how many checkpoints a conclusion takes, and for what.
            run_calls: runs the calls for the measurements that are not kept yet; gives results in order.

        Raises:
            TooShortError: there are fewer; they are measured all the same where measurements are kept and
                more checkpoints may follow.
            InputError: a checkpoint whose weights are gone was not measured with these parameters.
        """
        if self.complete or not self.cache:
            self.at_least(*least)
        keys = [f"{name}.{_key(self._context, name, parameters, source)}" for source in self._sources]
        new = {}
        gone = len(self) - len(self.checkpoints)
        for index, key in enumerate(keys):
            if not self._is_kept(key):
                if index < gone:
                    step = self.labels[index]
                    raise InputError(f"{self.cache}: holds no {name} of step {step} with these parameters")
                new[key] = self.checkpoints[index - gone]
        results = iter(run_calls(partial(measure, checkpoint) for checkpoint in new.values()))
        for index, key in enumerate(keys):
            if progress:
                progress(index, len(self), self.labels[index])
            if key in new and key not in self._held:
                self._keep(key, next(results))
        self.at_least(*least)
        return [self._held[key] for key in keys]

    def at_least(self, count: int, why: str) -> None:
        """Raise TooShortError if the series has fewer checkpoints than a conclusion needs."""
        if len(self) < count:
            noun = "checkpoint" if len(self) == 1 else "checkpoints"
            raise TooShortError(f"a series of {len(self)} {noun}: {why} needs at least {count}; give more")

    def _is_kept(self, key: str) -> bool:
        if key not in self._held and self.cache:
            measurement = read_measurement(self.cache / f"{key}.npz")
            if measurement is not None:
                self._held[key] = measurement
        return key in self._held

    def _keep(self, key: str, result: Mapping[str, Any]) -> None:
        self._held[key] = {name: np.asarray(value) for name, value in result.items()}
        if self.cache:
            write_measurement(self.cache / f"{key}.npz", self._held[key])


class RecordedSeries(CheckpointSeries):
    """A run that is still training: the measurements of earlier steps, and the model as it is now.

    Attributes:
        checkpoints: the present model alone, if there is one; the weights of earlier steps are gone.
    """

    def __init__(self, steps: Sequence[int | float], cache: Path, now: Any = None):
        """Take up a recording of all `steps`; `now` is the model at the last, unless that is measured too."""
        self.checkpoints = () if now is None else (open_checkpoint(now),)
        self.left_out = {}
        self.steps = in_order(steps) or ()
        self.labels = tuple(map(step_label, self.steps))
        self.stepped, self.complete = True, False
        self.cache = cache
        self._context = ""
        self._held = {}

    @property
    def _sources(self) -> Sequence[str]:
        return [f"step {label}" for label in self.labels]  # labels are exact: two steps never share a key


def series_of(series: Any, *, steps: Sequence[Any] = ()) -> CheckpointSeries:
    """A series from a series, a reference or references in order; raises as `CheckpointSeries`."""
    if isinstance(series, CheckpointSeries):
        return series
    refs = [series] if isinstance(series, str | Path) else list(series)
    return CheckpointSeries(refs, steps=steps)


def expand(refs: Sequence[Any]) -> list[Any]:
    """One reference for each checkpoint.

    A pattern (`run/checkpoint-*`), a directory that holds only checkpoint-N, and a pattern of revisions of a
    hub repository (`org/name@step*`) stand for several, in step order.

    Raises:
        InputError: a pattern that nothing matches, or a hub that cannot be asked.
    """
    expanded: list[Any] = []
    for ref in refs:
        if not isinstance(ref, str | Path):
            expanded.append(ref)
            continue
        text = str(ref)
        path = Path(text).expanduser()
        if path.exists():
            expanded += checkpoints_in(path) or [ref]
        elif not has_magic(text):
            expanded.append(ref)
        elif "@" in text and not text.startswith((".", "/", "~")):
            expanded += revisions(text)
        else:
            matched = [match for match in glob(str(path)) if _is_checkpoint(Path(match))]
            if not matched:
                raise InputError(f"{text}: no checkpoint matches this pattern")
            expanded += sorted(matched, key=natural_key)
    return expanded


def checkpoints_in(run: Path) -> list[str]:
    """The checkpoint-N in the directory of a run that is no checkpoint itself, in step order."""
    if not run.is_dir() or _holds_weights(run):
        return []
    return [str(path) for path in sorted(run.glob("checkpoint-*"), key=natural_key) if path.is_dir()]


def revisions(ref: str) -> list[str]:
    """The branches and tags of a hub repository that match `org/name@pattern`, in step order."""
    from huggingface_hub import HfApi

    repository, _, pattern = ref.partition("@")
    try:
        listing = HfApi().list_repo_refs(repository)
    except Exception as error:
        problem = f"the revisions of {repository} cannot be listed ({library_error(error)})"
        raise InputError(f"{ref}: {problem}; name each as {repository}@REVISION") from error
    names = [reference.name for reference in (*listing.branches, *listing.tags)]
    matched = sorted({name for name in names if fnmatchcase(name, pattern)}, key=natural_key)
    if not matched:
        raise InputError(f"{ref}: none of the {len(names)} revisions of {repository} matches {pattern!r}")
    return [f"{repository}@{name}" for name in matched]


def steps_of(checkpoints: Sequence[Checkpoint]) -> list[Step] | None:
    """The steps of a base and the checkpoints of its run; None unless all but the base have one.

    A base's own step is that of the run it came from: it counts only if that is the same run.
    """
    base, *others = checkpoints
    steps = [step for step in map(step_of, others) if step is not None]
    if len(steps) < len(others) or not others:
        return None
    first = step_of(base) if all(_siblings(base.ref, other.ref) for other in others) else None
    return [first if first is not None and first < min(steps) else 0.0, *steps]


def _siblings(ref: str, other: str) -> bool:
    """Whether two references lie in one directory, or are revisions of one repository."""
    if "@" in ref:
        return ref.partition("@")[0] == other.partition("@")[0]
    return Path(ref).absolute().parent == Path(other).absolute().parent


def _written_by_a_shell(refs: Sequence[Any]) -> bool:
    """Whether a shell may have made references of `run/checkpoint-*`: of one run, in alphabetical order."""
    if not all(isinstance(ref, str | Path) for ref in refs):
        return False
    names = list(map(str, refs))
    stepped = all(step_in(Path(name).name) is not None for name in names)
    return stepped and names == sorted(names) and all(_siblings(names[0], name) for name in names)


def step_of(checkpoint: Checkpoint) -> Step | None:
    """The step of a checkpoint: in its trainer_state.json, its revision, or the end of its path."""
    directory = checkpoint.directory
    if directory is not None and (directory / "trainer_state.json").is_file():
        with suppress(ValueError, TypeError, KeyError, OverflowError):
            return exact(read_json(confined(directory / "trainer_state.json", directory))["global_step"])
    _, _, revision = checkpoint.ref.partition("@")
    return step_in(revision or Path(checkpoint.ref).name)


def read_measurement(path: Path) -> Measurement | None:
    """A measurement that was kept; None if there is none, or if the file is damaged."""
    try:
        # numpy leaves a file open that it is given by name and finds damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except Exception:  # whatever is wrong with it, it is measured again
        return None


def write_measurement(path: Path, measurement: Measurement) -> None:
    """Keep a measurement, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **measurement)


def _holds_weights(path: Path) -> bool:
    """Whether a path is a checkpoint, as far as its names tell."""
    names = (*MODEL_FILES, *ADAPTER_FILES)
    return path.is_file() or any((path / name).is_file() for name in names) or any(path.glob("*.safetensors"))


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint, or becomes one once its weights are written."""
    begun = ("config.json", "adapter_config.json", "trainer_state.json")
    return _holds_weights(path) or any((path / name).is_file() for name in begun)


def _key(*parts: Any) -> str:
    """A short hash of what a measurement depends on."""
    plain = [dict(part) if isinstance(part, Mapping) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
