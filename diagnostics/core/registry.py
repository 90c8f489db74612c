"""The registry: every installed analysis by name, ours and those of other packages.

A package announces an analysis as an entry point, `name = "module:function"`. The module is imported when its
analysis is first asked for, and `@analysis` in it fills in `REGISTRY`.
"""

import importlib.util
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from probes.errors import UnknownNameError

if TYPE_CHECKING:
    from diagnostics.core.analysis import Analysis

GROUP = "tunescope.analyses"
REGISTRY: "dict[str, Analysis]" = {}


def modules() -> dict[str, str]:
    """The module of every installed analysis, by the name of the analysis; imports none."""
    announced = {entry.name: entry.module for entry in entry_points(group=GROUP)}
    registered = {name: record.function.__module__ for name, record in REGISTRY.items()}
    return dict(sorted((registered | announced).items()))


def installed() -> list[str]:
    """The names of every installed analysis; imports none."""
    return list(modules())


def installed_analyses() -> "dict[str, Analysis]":
    """Every installed analysis by name, ours and those of other packages.

    One that cannot be imported is left out; `broken_analyses` says why.

    >>> installed_analyses()["ood"].inputs
    ('pair', 'task', 'ood')
    """
    broken = broken_analyses(installed())
    return {name: find(name) for name in installed() if name not in broken}


def preflight_first(names: Iterable[str]) -> list[str]:
    """The names in their order, those that check the files themselves first; imports these analyses.

    >>> preflight_first(["drift", "integrity"])
    ['integrity', 'drift']
    """
    names = list(names)
    broken = broken_analyses(names)
    return sorted(names, key=lambda name: name in broken or not find(name).preflight)


def broken_analyses(names: Iterable[str]) -> dict[str, str]:
    """Which of these analyses cannot be imported, and why."""
    reasons = {}
    for name in names:
        try:
            find(name)
        except UnknownNameError as error:
            reasons[name] = str(error.args[0])
    return reasons


def find(name: str) -> "Analysis":
    """The analysis called `name`; only its own module is imported.

    Raises:
        UnknownNameError: unknown name (the message lists the known ones), or its package is broken.
    """
    if name not in REGISTRY:
        for entry in entry_points(group=GROUP, name=name):
            import_entry(entry)
    if name not in REGISTRY:
        raise UnknownNameError(f"unknown analysis {name!r}; known: {', '.join(installed())}")
    return REGISTRY[name]


def import_entry(entry: Any) -> None:
    """Import the module of an entry point, which registers its analysis."""
    # Dash imports `importlib_metadata`, which replaces the class `EntryPoint` by its own: hence `Any`.
    package = entry.dist.name if entry.dist else "an unknown package"
    try:
        entry.load()
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way; the user needs its name
        raise UnknownNameError(
            f"analysis {entry.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); "
            f"mend or uninstall that package, or leave it out with --skip {entry.name}"
        ) from error
    if entry.name not in REGISTRY:
        raise UnknownNameError(f"{entry.value} of {package} registers no analysis called {entry.name!r}")


def find_source(module: str) -> ModuleSpec | None:
    """Where a module's source is; runs neither the module nor the packages it is in."""
    name, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # `__main__` has none
        return None
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec
