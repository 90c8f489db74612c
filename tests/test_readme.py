"""The README says what is true: its Python runs, its commands exist, and it names every analysis."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_names_every_analysis_with_its_question():
    from diagnostics.core.registry import installed_analyses

    for name, record in installed_analyses().items():
        rows = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        line = f"| `{name}` | {record.question} | {' and '.join(record.inputs)} | {record.paper} |"
        assert rows, f"add to the table of analyses in README.md:\n{line}"
        assert record.question in rows[0]
        assert record.paper.removeprefix("arXiv:") in rows[0]


def test_its_python_prints_what_it_says(monkeypatch, capsys):
    import plotly.graph_objects as go

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(go.Figure, "show", lambda figure: None)
    code, printed = re.search(r"```python\n(from probes.*?)```\s+```\n(.*?)```", README, re.S).groups()
    exec(code, {})
    shown, expected = (re.sub(r"\d+\.\d+", "#", text).split() for text in (capsys.readouterr().out, printed))
    assert shown == expected


def test_its_shell_example_prints_what_it_says(tmp_path, capsys, monkeypatch):
    from diagnostics.cli.main import main

    monkeypatch.chdir(ROOT / "diagnostics" / "bundled")
    monkeypatch.setattr(
        "sys.argv", ["tunescope", "audit", "base", "lora-r8", "--out", str(tmp_path / "audit")]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    shown = capsys.readouterr().out.replace(str(tmp_path / "audit"), "audit")
    printed = re.search(r"\$ cd diagnostics/bundled && tunescope audit.*?\n(.*?)```", README, re.S).group(1)
    seconds = re.compile(r" +\d+\.\d s ")
    assert seconds.sub(" # s ", shown) == seconds.sub(" # s ", printed)
