"""An adapter that is applied to another base than the one it names is said to be, by every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diagnostics.analyses.intruders import intruder_dimensions
from diagnostics.audit.demo import BUNDLED
from diagnostics.audit.run import audit
from diagnostics.audit.series import series
from diagnostics.cli.main import main
from diagnostics.cli.terminal import print_series
from diagnostics.edits.graft import graft
from diagnostics.edits.interpolate import interpolate
from diagnostics.edits.mitigate import mitigate
from probes import CheckpointPair
from probes.checkpoints.lineage import adapter_notes, other_base, rounding_notes
from probes.checkpoints.mask_file import Patch
from probes.checkpoints.opening import open_checkpoint


@pytest.fixture
def adapter(tmp_path: Path) -> Any:
    """Writes the bundled adapter with another name for its base."""

    def write(named: str | None, **fields: Any) -> Path:
        directory = tmp_path / "adapter"
        shutil.copytree(BUNDLED / "lora-r1", directory, dirs_exist_ok=True)
        path = directory / "adapter_config.json"
        settings = json.loads(path.read_text()) | {"base_model_name_or_path": named, **fields}
        path.write_text(json.dumps(settings))
        return directory

    return write


def based(directory: Path) -> Path:
    """The bundled base in this directory."""
    shutil.copytree(BUNDLED / "base", directory)
    return directory


@pytest.mark.parametrize(
    ("named", "given", "said"),
    [
        (None, "Llama-3.2-1B", False),
        ("", "Llama-3.2-1B", False),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", False),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b", False),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B-Instruct", True),
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B", True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/elsewhere", True),
        ("/mnt/models/Llama-3.2-1B/", "Llama-3.2-1B", False),
        ("C:\\models\\Llama-3.2-1B", "Llama-3.2-1B", False),
        ("/mnt/models/Llama-3.2-1B", "Llama-3.2-3B", True),
        ("/root/.cache/models--meta-llama--Llama-3.2-1B/snapshots/0a1b", "Llama-3.2-1B", False),
        ("meta-llama/Llama-3.2-1B", "models--meta-llama--Llama-3.2-1B/snapshots/0a1b", False),
        ("unsloth/Llama-3.2-1B", "models--meta-llama--Llama-3.2-1B/snapshots/0a1b", True),
        ("gpt2", "models--gpt2/snapshots/0a1b", False),
        ("gpt2", "gpt2-medium", True),
    ],
)
def test_names_are_compared_as_whole_ids_and_paths_by_their_last_part(named, given, said, adapter, tmp_path):
    base = based(tmp_path / "models" / given)
    sentence = other_base(open_checkpoint(adapter(named), base=base))
    assert (sentence is not None) == said
    if said:
        assert f"was trained on {named!r} and is applied to {base}: is that the same model?" in sentence


def test_a_named_directory_that_is_here_is_compared_by_its_weights(adapter, tmp_path):
    base, copy, other = (based(tmp_path / name) for name in ("base", "copy", "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert other_base(open_checkpoint(adapter(str(base)), base=base)) is None
    assert other_base(open_checkpoint(adapter(str(copy)), base=base)) is None
    sentence = other_base(open_checkpoint(adapter(str(other)), base=base))
    assert sentence is not None
    assert sentence.endswith(
        f"was trained on {str(other)!r} and is applied to {base}, which holds other weights"
    )


def test_full_weights_and_an_adapter_on_its_own_base_say_nothing(adapter, tmp_path):
    base = based(tmp_path / "base")
    assert other_base(open_checkpoint(base)) is None
    assert other_base(open_checkpoint(adapter(str(base)))) is None
    assert adapter_notes(open_checkpoint(base), open_checkpoint(adapter(str(base)))) == ()


def test_only_an_adapter_on_a_base_in_half_precision_is_rounded_where_it_is_merged(tmp_path):
    tensors = load_file(BUNDLED / "base" / "model.safetensors")
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 1)):
        base = based(tmp_path / str(dtype))
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(cast, base / "model.safetensors", {"format": "pt"})
        adapted = open_checkpoint(BUNDLED / "lora-r1", base=base)
        assert len(rounding_notes(open_checkpoint(base), adapted)) == count


def test_a_base_in_memory_has_the_name_that_it_was_loaded_by(adapter, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = open_checkpoint(transformers.AutoModelForCausalLM.from_pretrained(based(tmp_path / "base")))
    assert other_base(open_checkpoint(adapter("org/base"), base=model)) is None
    assert "is that the same model?" in other_base(open_checkpoint(adapter("org/other"), base=model))


SAID = "was trained on 'org/other'"


@pytest.fixture
def pair(adapter: Any, tmp_path: Path) -> tuple[Path, Path]:
    return based(tmp_path / "base"), adapter("org/other")


def test_every_edit_says_it_and_keeps_it(pair, tmp_path):
    opened = CheckpointPair(*pair)
    Patch.of(opened, {"model.norm.weight": torch.tensor([0])}).save(tmp_path / "mask.safetensors")
    edits = (
        interpolate(*pair, 0.5, tmp_path / "interpolated"),
        mitigate(*pair, tmp_path / "mitigated", mode="update"),
        graft(*pair, tmp_path / "mask.safetensors", tmp_path / "grafted"),
    )
    for edit in edits:
        assert sum(SAID in note for note in edit.notes) == 1
        (trail,) = edit.out.glob("tunescope_*.json")
        assert SAID in trail.read_text()


def test_an_analysis_an_audit_its_report_and_a_series_say_it(pair, tmp_path, capsys):
    result = intruder_dimensions(CheckpointPair(*pair))
    assert sum(SAID in note for note in result.notes) == 1
    audited = audit(*pair, out=tmp_path / "audit", only="intruders")
    assert sum(SAID in note for note in audited.notes) == 1
    assert "was trained on" in (tmp_path / "audit/report.html").read_text()
    finished = series([*pair, pair[1]], out=tmp_path / "series", labels=[0, 1, 2], only="intruders")
    print_series(finished, tmp_path / "series")
    assert " ".join(capsys.readouterr().out.split()).count(SAID) == 1


def test_the_detector_says_it_on_standard_error(pair, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"return the sum of {n} numbers"}) + "\n" for n in range(4)))
    arguments = ["detect", str(rows), "--base", str(pair[0]), "--tuned", str(pair[1]), "--task", str(rows)]
    finished = CliRunner().invoke(main, arguments)
    assert SAID in finished.stderr
    assert all(json.loads(line) for line in finished.stdout.splitlines())
