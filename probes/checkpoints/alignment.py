"""The one alignment of two checkpoints: which stored tensors hold the same parameter of their models.

Names decide as far as they go. Where both sides have tensors left over, transformers says what it calls them
when it loads them: old names of norms, prefixes that a release moved, tied heads.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from probes.checkpoints.checkpoint import Checkpoint
from probes.files.layout import Header
from probes.files.sources import same_bytes
from probes.naming import families
from probes.naming.align import align, without_wrappers
from probes.naming.architecture import legacy_name


@dataclass(frozen=True)
class Alignment:
    """Pairs of tensors of two checkpoints.

    Attributes:
        tensors: tuned's tensor of each base tensor that has one of its own.
        prefixes: taken off the names of base and of tuned to align them.
    """

    tensors: Mapping[str, str]
    prefixes: tuple[str, str]


def align_checkpoints(base: Checkpoint, tuned: Checkpoint) -> Alignment:
    """Align the tensors of two checkpoints; transformers is asked only where plain names do not suffice."""
    tensors, prefixes = align(base.headers, tuned.headers)
    if _left(base, tensors.keys()) and _left(tuned, tensors.values()):
        loaded = [_loaded_names(side) for side in (base, tuned)]
        named = [_renamed(side.headers, names) for side, names in zip((base, tuned), loaded, strict=True)]
        by_parameter, taken = align(*named)
        stored = [{new: old for old, new in names.items()} for names in loaded]
        better = {stored[0][ours]: stored[1][theirs] for ours, theirs in by_parameter.items()}
        if _score(better, base, tuned) > _score(tensors, base, tuned):
            tensors, prefixes = better, taken
        tensors = dict(tensors)
        while more := _further_stack(base, tuned, tensors, loaded):
            tensors |= more
        lacking = _left(tuned, tensors.values())
        for theirs, ours in _tied_in_base(base, tuned, lacking, prefixes):
            tensors.setdefault(ours, theirs)  # what ties them together is stored under another of its names
    return Alignment(tensors, prefixes)


def shared_tensors(base: Checkpoint, tuned: Checkpoint, alignment: Alignment) -> dict[str, str]:
    """The base tensor with the same parameter as each tensor of tuned, tied ones included.

    A head that base ties to its embedding, and tuned stores by itself, has the embedding as its counterpart.
    """
    counterparts = {theirs: ours for ours, theirs in alignment.tensors.items()}
    tied = {alias: matrix.tensor for matrix in tuned.matrices.values() for alias in matrix.tied}
    for name in tuned.headers.keys() - counterparts.keys():
        if tied.get(name) in counterparts:
            counterparts[name] = counterparts[tied[name]]
    lacking = [name for name in tuned.headers if name not in counterparts]
    if lacking:
        counterparts |= dict(_tied_in_base(base, tuned, lacking, alignment.prefixes))
    return counterparts


def _tied_in_base(
    base: Checkpoint, tuned: Checkpoint, lacking: Collection[str], prefixes: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Tensors that base does not store because it ties them to one that it does."""
    structure = base.structure
    if structure is None or not structure.tied:
        return
    stored = {new: old for old, new in _loaded_names(base).items()}
    # Everything that is tied together: base stores one of it, by whatever name.
    groups: dict[str, list[str]] = {}
    for name, original in structure.tied.items():
        groups.setdefault(original, [original]).append(name)
    holder = {
        name: next((stored[other] for other in group if other in stored), None)
        for group in groups.values()
        for name in group
    }
    names = _loaded_names(tuned)
    for name in lacking:
        renamed = names[name]
        of_base = (renamed, prefixes[0] + renamed.removeprefix(prefixes[1]))
        tensor = next((holder[other] for other in of_base if holder.get(other)), None)
        if tensor is not None:
            yield name, tensor


def parameters_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The parameter that each tensor becomes, or becomes part of, when transformers loads the file."""
    structure = checkpoint.structure
    if structure is None:
        return {name: legacy_name(without_wrappers(name)) for name in checkpoint.headers}
    plain = {name: without_wrappers(name) for name in checkpoint.headers}
    loaded = structure.loaded(plain.values())
    return {name: loaded[bare][1] for name, bare in plain.items()}


def used_tensors(checkpoint: Checkpoint) -> list[str]:
    """The floating tensors that a checkpoint's model computes with: no buffers, nothing left unread."""
    floating = [name for name, header in checkpoint.headers.items() if header.dtype.is_floating_point]
    structure = checkpoint.structure
    if structure is not None:
        parameters = parameters_of(checkpoint)
        used = [name for name in floating if parameters[name] in structure.parameters]
        if 2 * len(used) > len(floating):
            return used
    # Not of an architecture that transformers knows, or of another than the config says.
    return [
        name
        for name in floating
        if not re.search(families.BUFFERS, name)
        and not (name.endswith(".bias") and len(checkpoint.headers[name].shape) > 1)
    ]


def is_head(name: str, checkpoint: Checkpoint | None = None) -> bool:
    """Whether a tensor belongs to what predicts the labels of a task, or the next token.

    By its name, or, with a checkpoint, because transformers keeps it outside the body of the model.
    """
    module = name.rpartition(".")[0] or name
    if re.search(families.BLOCK, name):
        return False
    if any(re.search(pattern, module) for pattern in (families.HEAD, families.UNEMBEDDING)):
        return True
    structure = None if checkpoint is None else checkpoint.structure
    if structure is None or checkpoint is None or not structure.body:
        return False
    parameter = parameters_of(checkpoint)[name]
    return parameter in structure.parameters and not parameter.startswith(structure.body)


def is_tied(checkpoint: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether a checkpoint ties what another stores under a name to a tensor that both have."""
    structure = checkpoint.structure
    return structure is not None and parameters_of(other)[name] in structure.tied


def tied_copies(checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    """Those of some tensors that hold again what transformers ties them to."""
    structure = checkpoint.structure if names else None
    if structure is None:
        return set()
    loaded = _loaded_names(checkpoint)
    stored = {new: old for old, new in loaded.items()}
    originals = {name: stored.get(structure.tied.get(loaded[name], "")) for name in names}
    return {
        name
        for name, original in originals.items()
        if original and same_bytes(checkpoint.tensor(name), checkpoint.tensor(original))
    }


def _loaded_names(checkpoint: Checkpoint) -> dict[str, str]:
    """What transformers calls each tensor when it loads the file; a name that two would get is kept."""
    structure = checkpoint.structure
    plain = {name: without_wrappers(name) for name in checkpoint.headers}
    if structure is None:
        names = {name: legacy_name(bare) for name, bare in plain.items()}
    else:
        loaded = structure.loaded(plain.values())
        names = {name: loaded[bare][0] for name, bare in plain.items()}
    counts = Counter(names.values())
    unique = {name: new if counts[new] == 1 else name for name, new in names.items()}
    return unique if len(set(unique.values())) == len(unique) else {name: name for name in names}


def _renamed(headers: Mapping[str, Header], names: Mapping[str, str]) -> dict[str, Header]:
    return {names[name]: replace(header, name=names[name]) for name, header in headers.items()}


def _further_stack(
    base: Checkpoint, tuned: Checkpoint, tensors: Mapping[str, str], names: list[dict[str, str]]
) -> dict[str, str]:
    """A further stack of blocks under other prefixes, such as a vision tower; {} if none is left."""
    left = [_left(base, tensors.keys()), _left(tuned, tensors.values())]
    if not all(left):
        return {}
    named = [_renamed(headers, of_side) for headers, of_side in zip(left, names, strict=True)]
    stored = [{of_side[name]: name for name in headers} for headers, of_side in zip(left, names, strict=True)]
    more, _ = align(*named)
    blocks = [name for name, other in more.items() if re.search(families.BLOCK, name)]
    alike = sum(named[0][name].shape == named[1][more[name]].shape for name in blocks)
    # Heads of two tasks may have layers of one name and one shape.
    return {stored[0][ours]: stored[1][theirs] for ours, theirs in more.items()} if alike else {}


def _left(side: Checkpoint, aligned: Collection[str]) -> dict[str, Header]:
    """Floating tensors of a side that have no counterpart."""
    names = set(aligned)
    return {
        name: header
        for name, header in side.headers.items()
        if name not in names and header.dtype.is_floating_point
    }


def _score(tensors: Mapping[str, str], base: Checkpoint, tuned: Checkpoint) -> tuple[int, int]:
    alike = sum(base.headers[ours].shape == tuned.headers[theirs].shape for ours, theirs in tensors.items())
    return alike, len(tensors)
