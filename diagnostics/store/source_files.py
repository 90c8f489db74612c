"""Which source a computation runs: a module and all that it imports, read without running any of it.

Imports within functions count, for a module that is loaded late computes too. Imports for type checkers do
not, nor does what only draws: `PRESENTATION`, and the functions that a registration names as `draw` and
`summary`.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import resolve_name
from pathlib import Path

from diagnostics.core.registry import find_source

# Shows and judges results that exist already.
PRESENTATION = {
    "diagnostics.plotting", "diagnostics.report", "diagnostics.core.policy", "diagnostics.core.policy_file",
}  # fmt: skip
OURS = {"diagnostics", "probes"}


@dataclass(frozen=True)
class Import:
    """What one statement imports from a module; no names: the module as a whole."""

    module: str
    names: frozenset[str]
    typing: bool


@dataclass(frozen=True)
class Source:
    """One source file: its hash and its imports."""

    digest: str
    imports: tuple[Import, ...]


def sources(module: str) -> dict[str, str]:
    """The hash of every source file that a module runs, by module.

    Of its own top-level package and of ours: other packages are known by their versions.
    """
    packages = {*OURS, module.partition(".")[0]}
    digests: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        above = [name[:at] for at, letter in enumerate(name) if letter == "."]
        if name in digests or name.partition(".")[0] not in packages or PRESENTATION & {name, *above}:
            continue
        file = _file(name)
        if file is not None:
            source = _read(name, file)
            digests[name] = source.digest
            waiting += above
            waiting += [target for line in source.imports if not line.typing for target in _targets(line)]
    return digests


def _targets(line: Import) -> Iterator[str]:
    """The modules that an import loads: the module, its submodules by name, and exports that it loads late.

    `diagnostics` and `probes` load their exports when asked, and list them for type checkers.
    """
    yield line.module
    yield from (f"{line.module}.{name}" for name in line.names)
    if line.module in OURS and (file := _file(line.module)):
        for export in _read(line.module, file).imports:
            if export.typing and (not line.names or export.names & line.names):
                yield export.module


def _file(module: str) -> Path | None:
    """The source file of a module; None where there is none, as for a function imported by name."""
    if module in sys.modules:  # also a module that is on no path, such as a script
        origin = getattr(sys.modules[module], "__file__", None)
        return Path(origin) if origin else None
    return _located(module)


@cache
def _located(module: str) -> Path | None:
    spec = find_source(module)
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _read(module: str, file: Path) -> Source:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    status = file.stat()
    return _parsed(file, package, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _parsed(file: Path, package: str, modified: int, size: int) -> Source:
    """A source file as it was then."""
    code = file.read_bytes()
    digest = hashlib.blake2b(code, digest_size=16).hexdigest()
    if file.suffix != ".py":
        return Source(digest, ())
    try:
        tree = ast.parse(code)
    except SyntaxError:  # being edited; nothing was imported from it
        return Source(digest, ())
    drawing = _drawing(tree)
    computing = [node for node in tree.body if getattr(node, "name", None) not in drawing]
    imports = [
        Import(line.module, line.names - drawing, line.typing)
        for line in _statements(computing, package, typing=False)
        if not line.names or line.names - drawing
    ]
    return Source(digest, tuple(imports))


def _drawing(tree: ast.Module) -> set[str]:
    """The functions that the registrations in a module name as `draw` and `summary`."""
    calls = [
        call
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "analysis"
    ]
    values = [word.value for call in calls for word in call.keywords if word.arg in ("draw", "summary")]
    return {value.id for value in values if isinstance(value, ast.Name)}


def _statements(body: list[ast.stmt], package: str, typing: bool) -> Iterator[Import]:
    """The imports among statements, however deep in them."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, frozenset(), typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                module = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # above the top-level package: it cannot run
                continue
            yield Import(module, frozenset(alias.name for alias in node.names), typing)
        else:
            checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for field in ("body", "orelse", "finalbody"):
                only_typing = typing or (checked and field == "body")
                yield from _statements(getattr(node, field, []), package, only_typing)
            for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                yield from _statements(part.body, package, typing)
