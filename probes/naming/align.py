"""Alignment of two checkpoints by the names of their tensors, with or without wrappers."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from itertools import product
from typing import Any, Literal

from probes.files.layout import Header

# Parts that torch.compile, DDP, FSDP and PEFT insert into the names of modules that they wrap.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"^(?:module\.|base_model\.model\.(?=model\.|transformer\.|bert\.))+")


def without_wrappers(name: str) -> str:
    """A name without the parts that training wrappers insert."""
    return _OUTER.sub("", _WRAPPERS.sub("", name))


def natural_key(name: Any) -> list[tuple[int, str]]:
    """Sort key that orders the numbers in names by value: block 9 before block 10."""
    parts = re.split(r"(\d{1,18})", str(name))
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def align(base: Mapping[str, Header], tuned: Mapping[str, Header]) -> tuple[dict[str, str], tuple[str, str]]:
    """Tuned name of each base tensor that has one, and the prefixes that were taken off to find it.

    Names match unchanged, without wrappers, or after taking one prefix off a side, because a bare model saves
    `layers.0…` and a model with a head `model.layers.0…`. A prefix is taken off only if more tensors of equal
    shape then share their name; if two prefixes do equally well (encoder or decoder?), neither is.
    """
    best: dict[str, str] = {}
    taken, score, tie = ("", ""), (0, 0), False
    for prefixes in sorted(product(_prefixes(base), _prefixes(tuned)), key=lambda pair: sum(map(len, pair))):
        left, right = _shortened(base, prefixes[0]), _shortened(tuned, prefixes[1])
        if left is None or right is None:
            continue
        common = {name: right[short] for short, name in left.items() if short in right}
        alike = sum(base[b].shape == tuned[t].shape for b, t in common.items())
        if (alike, len(common)) > score:
            best, taken, score, tie = common, prefixes, (alike, len(common)), False
        elif (alike, len(common)) == score and any(taken) and common != best:
            tie = True
    return ({}, ("", "")) if tie else (best, taken)


def _prefixes(names: Collection[str]) -> list[str]:
    """Possible prefixes of the stack of blocks: "", "model.", "model.language_model."."""
    prefixes = {""}
    for name in names:
        parts = without_wrappers(name).split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), 1)
        # Not the name of the stack itself, which is the one before the number.
        prefixes.update(".".join(parts[:length]) + "." for length in range(1, min(first, 4)))
    return sorted(prefixes)


def _shortened(names: Collection[str], prefix: str) -> dict[str, str] | None:
    """Short name -> name; None if two names become one."""
    short = {without_wrappers(name).removeprefix(prefix): name for name in names}
    return short if len(short) == len(names) else None


def renamed(
    missing: Mapping[str, Header],
    extra: Mapping[str, Header],
    head: Callable[[Literal["base", "tuned"], str], bytes],
    same: Callable[[str, str], bool],
) -> dict[str, str]:
    """Likely new names of tensors of base alone among those of tuned alone: a hint, never acted upon.

    `head` gives the first bytes of a tensor, `same` whether a missing and an extra one hold the same bytes.
    """
    offered = _by_kind(extra)
    hints = {}
    for kind, names in _by_kind(missing).items():
        candidates = offered.get(kind, [])
        heads = defaultdict(list)
        for name in candidates:
            heads[head("tuned", name)].append(name)
        for name in names:
            equal = [other for other in heads.get(head("base", name), []) if same(name, other)]
            if len(equal) == 1:
                hints[name] = f"renamed to {equal[0]}? it holds the same bytes"
            elif len(candidates) == len(names) == 1:
                hints[name] = f"renamed to {candidates[0]}? no other of this shape is new"
    return hints


def _by_kind(headers: Mapping[str, Header]) -> dict[tuple[object, ...], list[str]]:
    kinds: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for header in headers.values():
        kinds[header.shape, header.dtype].append(header.name)
    return kinds
