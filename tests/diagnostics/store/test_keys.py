"""A result is used again exactly where the code that computed it is the same."""

import importlib
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from diagnostics.audit.run import audit
from diagnostics.core.registry import find, installed
from diagnostics.store.factor_cache import MAKES
from diagnostics.store.source_files import PRESENTATION, sources

PLUGIN = {
    "__init__.py": "from curved_plugin.analysis import measure as measure",
    "analysis.py": """
        from typing import TYPE_CHECKING
        from curved_plugin.figures import draw
        from diagnostics.core.analysis import Result, analysis

        if TYPE_CHECKING:
            from curved_plugin.notation import Letter

        def summary(result):
            from curved_plugin.words import told
            return told(result)

        @analysis("curved", question="", reading="", paper="", cost="", draw=draw, summary=summary)
        def measure(pair):
            from curved_plugin.maths import bend
            return Result(metrics={"number": bend()}, tables={})
    """,
    "figures.py": "COLOUR = 'red'\ndef draw(result): return {}",
    "words.py": "def told(result): return 'curved'",
    "notation.py": "Letter = str",
    "maths/__init__.py": "from .deep.deeper import bend",
    "maths/deep/__init__.py": "",
    "maths/deep/deeper.py": "def bend(): return 1",
    "unused.py": "",
}


@pytest.fixture
def plugin(registry, tmp_path, monkeypatch):
    """The folder of a plug-in with figures, late imports and sub-packages."""
    folder = tmp_path / "curved_plugin"
    for name, source in PLUGIN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("curved_plugin")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "curved_plugin"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["analysis.py", "__init__.py", "maths/__init__.py", "maths/deep/deeper.py"])
def test_what_an_analysis_computes_with_runs_it_again(plugin, checkpoints, tmp_path, name):
    assert not audit(*checkpoints, out=tmp_path / "audit").analyses["curved"].reused
    assert audit(*checkpoints, out=tmp_path / "audit").analyses["curved"].reused
    (plugin / name).write_text((plugin / name).read_text() + "\n# edited\n")
    assert not audit(*checkpoints, out=tmp_path / "audit").analyses["curved"].reused


@pytest.mark.parametrize("name", ["figures.py", "words.py", "notation.py", "unused.py"])
def test_what_only_draws_or_tells_keeps_the_result(plugin, checkpoints, tmp_path, name):
    audit(*checkpoints, out=tmp_path / "audit")
    (plugin / name).write_text((plugin / name).read_text().replace("red", "blue") + "\n# edited\n")
    assert audit(*checkpoints, out=tmp_path / "audit").analyses["curved"].reused


def test_a_drawing_module_that_gives_more_than_its_drawings_counts(plugin):
    text = (plugin / "analysis.py").read_text()
    (plugin / "analysis.py").write_text(text.replace("import draw", "import COLOUR, draw"))
    assert "curved_plugin.figures" in sources("curved_plugin.analysis")


@pytest.mark.parametrize("name", installed())
def test_no_key_depends_on_the_theme_or_on_another_analysis(name):
    files = sources(find(name).function.__module__)
    assert not {file for file in files if file.startswith(("diagnostics.plotting", "diagnostics.report"))}
    others = {file.split(".")[2] for file in files if file.startswith("diagnostics.analyses.")} - {name}
    assert others == ({"intruders"} if name == "mitigation" else set())
    assert {"probes.errors", "diagnostics.core.analysis"} <= set(files)


RUN = """
import json, sys, warnings
from pathlib import Path
import diagnostics
from diagnostics.core.registry import find
from probes import CheckpointPair
from probes.checkpoints.series import CheckpointSeries

warnings.simplefilter("ignore")
bundled = Path(diagnostics.__file__).parent / "bundled"
record = find(sys.argv[1])
inputs = {role: bundled / f"{role}.jsonl" for role in ("task", "keep")}
inputs["pair"] = CheckpointPair(bundled / "base", bundled / "lora-r1")
parity = bundled / "grokking" / "parity"
inputs["series"] = CheckpointSeries([parity / f"checkpoint-{step}" for step in (0, 50, 100, 150)])
if "series" in record.inputs:
    inputs["task"] = bundled / "grokking/held-out.jsonl"
taken = {name: inputs[name] for name in (*record.inputs, *record.optional) if name in inputs}
record.function(**taken, **record.device_test.parameters)
print(json.dumps([record.function.__module__, record.draw.__module__, sorted(sys.modules)]))
"""


def in_a_process(script, *arguments):
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    return json.loads(process.stdout.splitlines()[-1])


def ours(modules):
    return {name for name in modules if name.partition(".")[0] in ("diagnostics", "probes")}


@pytest.mark.parametrize("name", ["path", "trajectory"])
def test_every_module_that_an_analysis_loads_is_part_of_its_key(name):
    module, drawing, loaded = in_a_process(RUN, name)
    missing = ours(loaded) - set(sources(module)) - {drawing}
    assert {name for name in missing if not any(name.startswith(part) for part in PRESENTATION)} == set()


def test_every_module_that_makes_factors_is_part_of_their_key():
    imported = f"import json, sys, {MAKES}\nprint(json.dumps(sorted(sys.modules)))"
    missing = ours(in_a_process(imported)) - set(sources(MAKES))
    # Figures are drawn with the labels of steps, and factors are made without them.
    assert missing <= {"diagnostics.analyses.intruders.figures", "probes.checkpoints.steps"} | {
        name for name in missing if name.startswith("diagnostics.plotting")
    }
    assert {"diagnostics.numerics.linalg", "diagnostics.analyses.intruders.inverse_factors"} < set(
        sources(MAKES)
    )


def test_a_key_costs_milliseconds():
    module = find("sharpness").function.__module__
    sources(module)
    began = time.process_time()
    sources(module)
    assert time.process_time() - began < 0.05  # measured: 3 ms; 0.1 s for the first of a process


def test_a_function_typed_at_a_prompt_has_its_code_and_what_it_uses_in_its_key():
    script = """
import json
from diagnostics.numerics import linalg
from diagnostics.store import keys
source = "def measure(): import probes.text.rows; return linalg, {}"
code_keys = []
for value in (1, 1, 2):
    exec(source.format(value))
    code_keys.append(keys.source(measure))
used = []
keys.sources = lambda name: used.append(name) or {}
keys.source(measure)
print(json.dumps([code_keys, used]))
"""
    code_keys, used = in_a_process(script)
    assert code_keys[0] == code_keys[1] != code_keys[2]
    assert {"diagnostics.numerics.linalg", "probes.text.rows"} <= set(used)
