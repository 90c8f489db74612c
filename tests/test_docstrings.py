"""The examples in docstrings run, and every public function and class has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import dashboard
import diagnostics
import probes

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
PACKAGES = (probes, diagnostics, dashboard)
# Functions that are not exported by name but are the documented entry points of a command.
ENTRY_POINTS = {
    "audit": "diagnostics.audit.run",
    "series": "diagnostics.audit.series",
    "demo": "diagnostics.audit.demo",
    "mitigate": "diagnostics.edits.mitigate",
    "graft": "diagnostics.edits.graft",
    "interpolate": "diagnostics.edits.interpolate",
}


def modules():
    """The names of all modules of the three packages."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield module.name


def with_examples():
    """The modules with an example in their source."""
    for name in modules():
        spec = importlib.util.find_spec(name)
        with open(spec.origin, encoding="utf-8") as source:
            if ">>> " in source.read():
                yield name


@pytest.mark.parametrize("name", sorted(with_examples()))
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted
    assert not result.failed


def only_data(exported):
    """Whether it is a class without public methods."""
    if not inspect.isclass(exported):
        return False
    names = {name for base in exported.__mro__[:-1] for name in vars(base)}
    return all(name.startswith("_") for name in names - set(getattr(exported, "__dataclass_fields__", ())))


def public():
    """What users call: exported functions, exported classes with methods, and entry points of commands."""
    for package in (probes, diagnostics):
        for name in package.__all__:
            if not only_data(getattr(package, name)):
                yield f"{package.__name__}.{name}", package.__name__
    for name, module in ENTRY_POINTS.items():
        yield f"{module}.{name}", module


@pytest.mark.parametrize(("name", "module"), sorted(public()), ids=lambda text: text)
def test_a_public_function_or_class_has_an_example(name, module):
    documented = getattr(importlib.import_module(module), name.rpartition(".")[2])
    assert ">>> " in (documented.__doc__ or ""), "its docstring lacks an example of one to three lines (>>>)"
