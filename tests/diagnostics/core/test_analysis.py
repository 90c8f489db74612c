import inspect
import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.core import registry as registry_module
from diagnostics.core.analysis import Result, plain
from diagnostics.core.registry import broken_analyses, find, find_source, installed, installed_analyses
from diagnostics.core.row_options import RowOptions

PAIR = SimpleNamespace(base="a base", tuned="a tuned model")


def nothing(*inputs, **parameters):
    return Result(metrics={}, tables={})


def test_parameters_are_recorded_as_used_with_defaults_and_without_where_it_ran(register):
    def measure(pair, *, k: int = 10, parts: tuple = ("block",), device="cpu", progress=None, seed: int = 0):
        return Result(metrics={}, tables={})

    result = register("made", measure)(PAIR, k=3, device="cuda")
    assert result.analysis == "made"
    assert result.parameters == {"k": 3, "parts": ["block"], "seed": 0}


def test_an_unknown_parameter_is_refused_with_the_known_ones(register):
    measured = register("made", lambda pair, *, k=10, seed=0: nothing())
    with pytest.raises(LookupError, match=r"made has no parameter 'q'; it has: k, seed"):
        measured(PAIR, q=1)


def test_positional_arguments_are_inputs_and_those_with_a_default_are_optional(register):
    def measure(pair, task, keep=None, *, k=1):
        return nothing()

    register("made", measure)
    record = find("made")
    assert (record.inputs, record.optional, list(record.parameters)) == (("pair", "task"), ("keep",), ["k"])


def test_a_metric_that_the_registration_does_not_list_is_a_mistake_of_the_analysis(register):
    measure = register("made", lambda: Result(metrics={"b": 1}, tables={}), metrics={"a": "…"})
    with pytest.raises(
        AssertionError, match=r"made gave metrics that its registration does not list: \['b'\]"
    ):
        measure()


def reads_rows(pair, *, k: int = 3, options: RowOptions = RowOptions(dtype="float32"), seed: int = 0):
    """Read rows.

    Args:
        k: how many.
        options: how rows are read and how models run on them.
        dtype: of the model; exact in float64.
        seed: of the choice.
    """
    return Result(metrics={"length": options.max_length or 0}, tables={"a": (options, k, seed)})


FIELDS = ["max_length", "chat_template", "batch_tokens", "trust_remote_code", "device", "dtype"]


def test_row_options_are_parameters_like_others(register):
    measured = register("made", reads_rows)
    record = find("made")
    assert list(record.parameters) == ["k", *FIELDS, "seed"]
    assert list(inspect.signature(measured).parameters) == ["pair", "k", *FIELDS, "seed"]
    assert record.parameters["max_length"].annotation == int | None
    assert record.describe()["parameters"]["dtype"] == "float32"
    result = measured(PAIR, max_length=64, device="cuda", k=5)
    assert result.tables["a"] == (RowOptions(max_length=64, device="cuda", dtype="float32"), 5, 0)
    assert result.parameters == {
        "k": 5, "max_length": 64, "chat_template": False, "batch_tokens": 16384,
        "trust_remote_code": False, "dtype": "float32", "seed": 0,
    }  # fmt: skip
    with pytest.raises(LookupError, match=f"made has no parameter 'options'; it has: k, {FIELDS[0]}"):
        measured(PAIR, options=RowOptions())


def test_every_parameter_is_explained_once_and_the_analysis_may_say_more(register):
    lines = register("made", reads_rows).__doc__.splitlines()
    explained = [line.split(":")[0].strip() for line in lines if ": " in line]
    assert sorted(explained) == sorted(["k", *FIELDS, "seed"])
    assert "    dtype: of the model; exact in float64." in lines
    assert "    device: where the model runs." in lines


def test_metrics_come_in_the_order_of_the_registration(register):
    given = {"a": 1, "b": 2}
    measure = register(
        "made", lambda: Result(metrics=given, tables={}), metrics={"b": "…", "c": "…", "a": "…"}
    )
    assert list(measure().metrics) == ["b", "a"]


def test_an_unknown_analysis_is_refused_with_the_installed_ones(register):
    register("one", nothing)
    register("two", nothing)
    with pytest.raises(LookupError, match=r"unknown analysis 'three'; known: one, two"):
        find("three")


def modules(tmp_path, monkeypatch, **sources):
    """Entry points `name` -> a module `made_<name>` with that source."""
    for name, source in sources.items():
        (tmp_path / f"made_{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"made_{name}", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint(name, f"made_{name}", "tunescope.analyses") for name in sources]
    monkeypatch.setattr(
        registry_module,
        "entry_points",
        lambda group, name=None: [e for e in entries if name in (None, e.name)],
    )


REGISTERS = """
from diagnostics.core.analysis import Result, analysis

@analysis({name!r}, question="", reading="", paper="", cost="", draw=lambda result: {{}})
def measure(pair):
    return Result(metrics={{}}, tables={{}})
"""


def test_finding_one_analysis_imports_only_its_own_module(registry, tmp_path, monkeypatch):
    modules(tmp_path, monkeypatch, wanted=REGISTERS.format(name="wanted"), other="raise RuntimeError('boom')")
    assert installed() == ["other", "wanted"]
    assert find("wanted").inputs == ("pair",)
    assert "made_other" not in sys.modules


@pytest.mark.parametrize(
    ("source", "error"),
    [("raise RuntimeError('boom')", "RuntimeError: boom"), ("import sys; sys.exit(3)", "SystemExit: 3")],
)
def test_a_broken_package_is_named_and_the_others_are_there(registry, tmp_path, monkeypatch, source, error):
    modules(tmp_path, monkeypatch, broken=source, good=REGISTERS.format(name="good"))
    assert list(installed_analyses()) == ["good"]
    message = rf"'broken' of .* cannot be loaded \({error}\).*--skip broken"
    with pytest.raises(LookupError, match=message):
        find("broken")
    [(name, why)] = broken_analyses(installed()).items()
    assert name == "broken"
    assert re.search(message, why)


def test_a_module_is_located_without_running_it_or_its_packages(tmp_path, monkeypatch):
    (tmp_path / "outer_package" / "inner").mkdir(parents=True)
    for package in ("outer_package", "outer_package/inner"):
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source("outer_package.inner").origin == str(tmp_path / "outer_package/inner/__init__.py")
    assert find_source("outer_package.other") is None
    assert find_source("outer_package.inner.deeper.still") is None
    assert find_source("no_such_package.inner") is None


def test_an_entry_point_that_registers_another_name_is_refused(registry, tmp_path, monkeypatch):
    modules(tmp_path, monkeypatch, one=REGISTERS.format(name="two"))
    with pytest.raises(LookupError, match=r"made_one of .* registers no analysis called 'one'"):
        find("one")


def test_a_result_draws_and_tells_itself_through_the_registry(register):
    table = pd.DataFrame({"x": [1.0]})
    register(
        "made",
        lambda: Result(metrics={"a": 1}, tables={"t": table}),
        draw=lambda result: {"figure": result.tables["t"]},
        summary=lambda result: f"a is {result.metrics['a']}",
    )
    drawable = find("made").function()
    assert drawable.figures() == {"figure": table}
    assert drawable.summary() == "a is 1"


def test_without_a_summary_of_its_own_a_result_tells_its_first_metrics(register):
    register("made", lambda: Result(metrics={"a": 1, "b": 0.123456, "c": 3, "d": 4, "e": 5}, tables={}))
    assert find("made").function().summary() == "a 1, b 0.1235, c 3, d 4"


def test_the_description_of_an_analysis_is_plain(register):
    def measure(pair, *, parts=("a", "b"), device="cpu", progress=None):
        return nothing()

    register("made", measure, metrics={"m": "what it says"})
    description = find("made").describe()
    assert json.loads(json.dumps(description)) == description
    assert description["parameters"] == {
        "parts": ["a", "b"]
    }  # neither device nor progress: they identify nothing
    assert description["needs"] == ["pair"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_plain_values_survive_json(value):
    assert json.loads(json.dumps(plain(value))) == plain(value)


def test_what_json_has_no_word_for_is_kept_by_its_name(tmp_path):
    import torch

    assert plain({"dtype": torch.float32, "out": tmp_path, "names": {"b", "a"}}) == {
        "dtype": "torch.float32",
        "out": str(tmp_path),
        "names": ["a", "b"],
    }


def test_everything_that_the_package_exports_is_there():
    import diagnostics

    for name in dir(diagnostics):
        assert getattr(diagnostics, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'diagnostics' has no attribute 'nothing'"):
        _ = diagnostics.nothing


def test_every_analysis_of_ours_is_exported_by_its_function():
    import diagnostics

    functions = {
        name: record.function
        for name, record in installed_analyses().items()
        if record.function.__module__.startswith("diagnostics.")
    }
    assert "intruders" in functions
    text = Path(diagnostics.__file__).read_text(encoding="utf-8")
    for name, function in functions.items():
        word = function.__name__
        assert getattr(diagnostics, word) is function
        line = f"    from diagnostics.analyses.{name} import {word} as {word}"
        assert line in text.splitlines(), f"under TYPE_CHECKING in diagnostics/__init__.py, add\n{line}"


def test_exports_are_listed_without_importing_any():
    script = (
        "import sys, diagnostics\nassert 'layer_sharpness' in dir(diagnostics)\n"
        "print([name for name in sys.modules if name.startswith('diagnostics.')])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
