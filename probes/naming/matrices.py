"""From a checkpoint's tensor names and shapes to (out, in) matrices with layer and component.

Architectures differ as data, in `probes.naming.families`. Shapes decide wherever they can, else config.json.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from probes.errors import InputError
from probes.files.layout import Header, Matrix, Part
from probes.naming import families
from probes.naming.families import FUSED, IN_BLOCK, Fused


def matrices(
    headers: Mapping[str, Header], config: Mapping[str, Any], *, untied: Collection[str] = ()
) -> dict[str, Matrix]:
    """Every two-dimensional weight of a checkpoint by its name, in the order of the headers.

    Convolutions are given as (out, rest). A fused tensor that only an absent config.json could divide is one
    matrix, and names the keys in `Matrix.missing`. Where the config ties the unembedding to the embedding and
    the file holds both, only the embedding is given, and names the other in `Matrix.tied`.

    Args:
        config: the checkpoint's config.json; may be empty.
        untied: tensors that are no copies, whatever the config says.

    Raises:
        InputError: the config's number of heads does not divide a fused tensor.
    """
    roles = _locations([name for name, header in headers.items() if is_weight(header)])
    file = _File(headers, roles, config)
    named = {matrix.name: matrix for name in roles for matrix in file.parts(name)}
    return file.without_copies(named, untied)


def is_weight(header: Header) -> bool:
    """Whether a tensor holds matrices: floating, two-dimensional or more, and no bias, scale or buffer."""
    shape = header.shape
    matrix_like = len(shape) == 2 or (len(shape) > 2 and sum(length > 1 for length in shape) > 1)
    # Without entries a shape may tell of any number of experts.
    real = 0 not in shape and header.dtype.is_floating_point
    return real and matrix_like and not re.search(families.NOT_WEIGHTS, header.name)


class _Location(NamedTuple):
    """A tensor's location: its block, its module's parent, and its entry in the tables."""

    layer: int | None
    parent: str
    path: str  # its entry in IN_BLOCK or FUSED; empty outside the blocks and for what neither knows
    role: str  # the component without `cross_` or `shared_`
    prefix: str
    part: Part


def _locations(names: Iterable[str]) -> dict[str, _Location]:
    blocks = {name: re.search(families.BLOCK, name) for name in names}
    indices = {
        name: (name[: block.start()], tuple(int(number) for number in re.findall(r"\.(\d+)", block[1])))
        for name, block in blocks.items()
        if block
    }
    # The first block of stage 1 follows the last of stage 0; other tensors of a stage are in no block.
    stages: dict[str, list[tuple[int, ...]]] = {}
    for stack, index in sorted(set(indices.values())):
        if len(index) > 1:
            stages.setdefault(stack, []).append(index)
    locations = {}
    for name, block in blocks.items():
        stack, index = indices.get(name, ("", ()))
        if block is None or (stack in stages and index not in stages[stack]):
            locations[name] = _outside(name)
        else:
            layer = stages[stack].index(index) if stack in stages else index[0]
            module = _module(name)
            beside_c_proj = f"{module.rpartition('.')[0]}.c_proj.weight" in blocks
            locations[name] = _inside(layer, module, module[block.end() :], beside_c_proj)
    return locations


def _outside(name: str) -> _Location:
    path = _module(name)
    parent, _, leaf = path.rpartition(".")
    role = _leaf(path)
    part: Part = "other"
    if re.search(families.UNEMBEDDING, path):
        role, part = "lm_head", "head"
    elif head := re.search(families.HEAD, path):
        role, part = path[path.rfind(".", 0, head.start() + 1) + 1 :], "head"
    elif leaf in families.EMBEDDINGS:
        role, part = families.EMBEDDINGS[leaf], "embedding"
    elif "emb" in path:
        role, part = path[path.rfind(".", 0, path.rfind("emb")) + 1 :], "embedding"
    return _Location(None, parent, "", role, "", part)


def _inside(layer: int, module: str, rest: str, beside_c_proj: bool) -> _Location:
    segments = rest.split(".")
    suffixes = (".".join(segments[start:]) for start in range(len(segments)))
    path = next((suffix for suffix in suffixes if suffix in IN_BLOCK or suffix in FUSED), "")
    if beside_c_proj and path in families.BESIDE_C_PROJ:
        role = families.BESIDE_C_PROJ[path]
    elif path:
        role = IN_BLOCK.get(path) or families.WHOLE[frozenset(FUSED[path][0].order)]
    else:
        role = _leaf(rest)
    part = families.PARTS.get(role, "embedding" if not path and "emb" in role else "block")
    variants = (prefix for prefix, modules in families.VARIANTS.items() if not modules.isdisjoint(segments))
    prefix = "".join(variants) if path and part == "block" else ""
    return _Location(layer, module.rpartition(".")[0], path, role, prefix, part)


def _module(name: str) -> str:
    """The module that owns the tensor; the parameter's own name where that is not `weight`."""
    return re.sub(r"(?:\.parametrizations)?\.weight(?:\.original\d)?$", "", name)


def _leaf(path: str) -> str:
    """The last name of a path, with the numbers behind it: `fc`, `net.3`."""
    segments = path.split(".")
    first = next((at for at in reversed(range(len(segments))) if not segments[at].isdecimal()), 0)
    return ".".join(segments[first:]) if segments[first] else path


class _Stored(NamedTuple):
    """How a tensor stores its matrix or stack of matrices; rows and columns are of one, (out, in)."""

    rows: int
    columns: int
    transposed: bool
    stack: int | None
    experts: int | None


@dataclass(frozen=True)
class _File:
    """The tensors of one file and its config, which tell about each other."""

    headers: Mapping[str, Header]
    locations: Mapping[str, _Location]
    config: Mapping[str, Any]

    @cached_property
    def siblings(self) -> dict[tuple[str, str], str]:
        """Tensors by parent module and role: the output projection of a fused input, and so on."""
        return {(location.parent, location.role): name for name, location in self.locations.items()}

    @cached_property
    def conv1d(self) -> bool:
        """Whether the file keeps (in, out): c_attn, or c_fc, widens columns; without them, c_proj rows."""
        for ending, axis in ((".c_attn.weight", 1), (".c_fc.weight", 1), (".mlp.c_proj.weight", 0)):
            shapes = (self.headers[name].shape for name in self.locations if name.endswith(ending))
            for shape in shapes:
                if shape[0] != shape[1]:
                    return shape[axis] > shape[1 - axis]
        return False

    @cached_property
    def configs(self) -> list[Mapping[Any, Any]]:
        """The config and those nested in it (text_config, ffn_config…), outermost first."""
        configs: list[Mapping[Any, Any]] = [self.config]
        for config in configs:  # grows while it is read
            configs += [value for value in config.values() if isinstance(value, Mapping)]
        return configs

    def ask(self, layout: Fused, keys: Iterable[str]) -> int | None:
        """The first number or switch under these keys in the config of this layout's model; None if none."""
        matching = [config for config in self.configs if config.get("model_type") in layout.types]
        values = (config.get(key) for key in keys for config in matching or self.configs)
        return next((value for value in values if isinstance(value, int)), None)

    def parts(self, name: str) -> Iterator[Matrix]:
        """The matrices of one tensor: itself, its experts, the parts fused in it."""
        location, stored = self.locations[name], self.stored(name)
        undivided = Matrix(
            name=name, tensor=name, layer=location.layer, component=location.prefix + location.role,
            part=location.part, rows=stored.rows, columns=stored.columns, dtype=self.headers[name].dtype,
            transposed=stored.transposed, experts=stored.experts,
        )  # fmt: skip
        if stored.stack is None:
            yield from self.divided(undivided)
        elif not re.search(families.STACK, name):
            yield replace(undivided, expert=0)
        else:
            for expert in range(stored.stack):
                yield from self.divided(replace(undivided, name=f"{name}:{expert}", expert=expert))

    def stored(self, name: str) -> _Stored:
        """Stack and orientation of a tensor, from its name and shape and from those of its siblings."""
        shape = self.headers[name].shape
        conv1d = self.conv1d and re.search(families.CONV1D, name)
        transposed = bool(conv1d or re.search(families.TRANSPOSED, name))
        stack = experts = None
        if re.search(families.ROWS_OF_EXPERTS, name):
            router = self.headers.get(name.partition(".experts.")[0] + ".router.layer.weight")
            if router is not None:
                stack = experts = router.shape[0] if router.shape else 1
                if not experts or shape[0] % experts:
                    problem = f"its {shape[0]} rows are no multiple of the {experts} experts of its router"
                    raise InputError(f"{name}: {problem}; is the file damaged?")
                shape = (shape[0] // experts, *shape[1:])
        elif len(shape) > 2 and re.search(families.STACK, name):
            stack, shape = shape[0], shape[1:]
            transposed = self.swapped(self.locations[name].parent)
        elif len(shape) > 2 and shape[0] == 1 and not name.endswith(".weight"):
            stack, shape = 1, shape[1:]  # a parameter's axis to broadcast over the batch
        rows, columns = shape[0], prod(shape[1:])
        if transposed:
            rows, columns = columns, rows
        return _Stored(rows, columns, transposed, stack, experts)

    def swapped(self, experts: str) -> bool:
        """Whether stacked experts are (in, out): gate_up (hidden, 2 inner), down (inner, hidden)."""
        gate_up, down = (self.siblings.get((experts, role)) for role in ("gate_up_proj", "down_proj"))
        if gate_up is None or down is None:
            return False
        (*_, a, b), (*_, c, d) = self.headers[gate_up].shape, self.headers[down].shape
        return a == d and b == 2 * c

    def divided(self, undivided: Matrix) -> Iterator[Matrix]:
        """The parts fused in a matrix, or the matrix itself."""
        location = self.locations[undivided.tensor]
        biased = families.FUSED_WITH_BIAS if f"{undivided.tensor}_bias" in self.headers else FUSED
        layout = next(filter(self.applies, biased.get(location.path, FUSED.get(location.path, ()))), None)
        if layout is None or not self.doubled(layout, undivided):
            yield undivided
            return
        groups, shares = self.grouping(layout, undivided)
        if not groups:
            missing = "model_type" if layout.per == "unknown" else families.HEAD_KEYS[0]
            yield replace(undivided, missing=(missing,))
            return
        unit, rest = divmod(undivided.rows, groups * sum(shares))
        if rest:
            raise InputError(
                f"{undivided.tensor}: its {undivided.rows} rows are no multiple of {groups} x {sum(shares)} "
                f"({', '.join(layout.order)} of every {layout.per}); is config.json that of another model?"
            )
        start = 0
        for letter, share in zip(layout.order, shares, strict=True):
            stop = start + share * unit
            yield replace(
                undivided, name=f"{undivided.name}:{letter}", component=f"{location.prefix}{letter}_proj",
                rows=groups * (stop - start), start=start, stop=stop, heads=groups,
            )  # fmt: skip
            start = stop

    def applies(self, layout: Fused) -> bool:
        """Whether a layout is the one of this checkpoint's model."""
        fits = not layout.types or any(config.get("model_type") in layout.types for config in self.configs)
        return fits and (layout.when is None or self.ask(layout, layout.when[:1]) is layout.when[1])

    def doubled(self, layout: Fused, undivided: Matrix) -> bool:
        """Whether a gated tensor is twice as high as its down projection is wide, as it must be."""
        if "gate" not in layout.order:
            return True
        down = self.siblings.get((self.locations[undivided.tensor].parent, "down_proj"))
        return undivided.rows == 2 * self.stored(down).columns if down else undivided.rows % 2 == 0

    def grouping(self, layout: Fused, undivided: Matrix) -> tuple[int, tuple[int, ...]]:
        """Number of equal groups of rows, and each part's share of one; 0 groups if the config must tell."""
        equal = (1,) * len(layout.order)
        heads = max(0, self.ask(layout, families.HEAD_KEYS) or 0)
        kv_heads = max(0, self.ask(layout, families.KV_HEAD_KEYS) or 0) or heads
        if layout.per == "head":
            return heads, equal
        if layout.per == "kv head":
            if heads and heads % kv_heads:
                raise InputError(
                    f"{undivided.tensor}: {heads} heads do not share {kv_heads} for keys and values evenly; "
                    "is config.json that of another model?"
                )
            return (kv_heads, (heads // kv_heads, 1, 1)) if heads else (0, equal)
        if layout.per == "rank":
            return families.CODEGEN_RANKS, equal
        if layout.per == "row":
            return undivided.rows // len(equal), equal
        if layout.per == "unknown":
            return 0, equal
        if "q" not in layout.order:
            return 1, equal
        # The output projection has a column for every row of q.
        output = self.siblings.get((self.locations[undivided.tensor].parent, "o_proj"))
        queries = self.stored(output).columns if output else 0
        others, odd = divmod(undivided.rows - queries, 2)
        if queries and others > 0 and not odd:
            return 1, (queries, others, others)
        if undivided.rows == 3 * undivided.columns:
            return 1, equal
        return int(heads > 0), (heads, kv_heads, kv_heads)

    def without_copies(self, named: dict[str, Matrix], untied: Collection[str]) -> dict[str, Matrix]:
        """The matrices without those that the model overwrites with its embedding when it loads."""
        stated = (config["tie_word_embeddings"] for config in self.configs if "tie_word_embeddings" in config)
        if not next(stated, False):
            return named
        embeds = [matrix for matrix in named.values() if matrix.component == "embed" and matrix.layer is None]
        originals = [matrix for matrix in embeds if _module(matrix.name).endswith("shared")]
        tied = [matrix for matrix in named.values() if matrix.component == "lm_head"]
        if originals:  # one table for encoder, decoder and head
            tied = [matrix for matrix in embeds if matrix not in originals] + tied
        copies: dict[str, list[str]] = {}
        for matrix in (matrix for matrix in tied if matrix.tensor not in untied):
            shape = matrix.rows, matrix.columns
            alike = (embed for embed in originals or embeds if (embed.rows, embed.columns) == shape)
            if original := next(alike, None):
                copies.setdefault(original.name, []).append(matrix.name)
        dropped = {name for names in copies.values() for name in names}
        kept = {name: matrix for name, matrix in named.items() if name not in dropped}
        return {name: replace(matrix, tied=tuple(copies.get(name, ()))) for name, matrix in kept.items()}
