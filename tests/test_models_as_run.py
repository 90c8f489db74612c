"""Both sides of a pair, and all that is written of them, are what transformers and PEFT run.

The table is kept in `models_as_run.md`; `-s` prints the differences of each cell.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diagnostics.edits.graft import graft
from diagnostics.edits.interpolate import interpolate
from probes import CheckpointPair
from probes.checkpoints.mask_file import Patch
from probes.errors import InputError
from tests import models_as_run as tables
from tests.models_as_run import ARCHITECTURES, ROUND_OFF, VARIANTS, Cases

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """The models of an architecture, made once."""
    kept: dict[str, Cases] = {}

    def of(name: str) -> Cases:
        if name not in kept:
            kept[name] = Cases(name, tmp_path_factory.mktemp(re.sub(r"\W", "", name)))
        return kept[name]

    return of


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_both_ends_are_those_of_transformers(name, variant, cases, tmp_path):
    results = tables.cell(cases(name), variant, tmp_path)
    differences = {what: value for what, value in results.items() if isinstance(value, float)}
    print(f"\n{name}, {variant}:", ", ".join(f"{what} {value:.0e}" for what, value in differences.items()))
    assert tables.summary(results) == tables.committed()[name, variant]


def test_no_cell_of_the_table_is_off():
    cells = tables.committed()
    print("\n" + tables.TABLE.read_text(encoding="utf-8"))
    assert cells.keys() == {(name, variant) for name in ARCHITECTURES for variant in VARIANTS}
    assert not [cell for cell in cells.items() if " off" in cell[1] or not cell[1]]
    # What is not run is refused in one line, and its weights are still edited right.
    assert {cell.partition(":")[0] for cell in cells.values()} <= {"=", "= · no path 0, path 1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.FURTHER)
def test_further_architectures_are_right_in_every_variant(name, tmp_path):
    for variant in VARIANTS:
        cases = Cases(name, tmp_path / variant)
        assert tables.summary(tables.cell(cases, variant, tmp_path / variant / "out")) == "=", variant


def test_a_tied_weight_that_a_half_precision_file_holds_twice_is_widened_twice(cases, tmp_path):
    base, half = (cases("Llama").tuned(tied=True, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    tensors = weights(half)
    shutil.copytree(half, tmp_path / "twice")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | copy, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    interpolate(base, tmp_path / "twice", 0.0, tmp_path / "out")
    written = weights(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], weights(base)["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_an_adapter_merged_into_half_precision_says_what_is_rounded_off(cases, tmp_path):
    llama = cases("Llama")
    case = llama.adapter("for-half", tied=True)
    llama.load(case.base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    written = interpolate(case.base, case.tuned, 1.0, tmp_path / "whole")
    rounded = interpolate(tmp_path / "half", case.tuned, 1.0, tmp_path / "rounded")
    assert not any("rounded" in note for note in written.notes)
    (note,) = (note for note in rounded.notes if "rounded" in note)
    assert re.match(r"Merged weights are rounded to bfloat16, by a norm of 0\.\d+; PEFT, which runs", note)


def draw_adapter(architecture: tables.Architecture) -> st.SearchStrategy[dict[str, object]]:
    """Configurations of adapters, on anything that PEFT puts one on."""
    head, *body = architecture.head, *architecture.targets
    embedding = {"GPT-2": "wte", "BERT": "word_embeddings"}.get
    name = next(key for key, value in ARCHITECTURES.items() if value is architecture)
    embed = embedding(name, "embed_tokens")
    return st.fixed_dictionaries(
        {
            "target_modules": st.lists(st.sampled_from([*body, head, embed]), min_size=1, unique=True),
            "modules_to_save": st.sampled_from([None, [head], [embed], [head, embed]]),
            "bias": st.sampled_from(["none", "all", "lora_only"]),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "rank_pattern": st.sampled_from([{}, {body[0]: 2}]),
            "alpha_pattern": st.sampled_from([{}, {body[0]: 3}]),
            "ensure_weight_tying": st.booleans(),
            "trainable_token_indices": st.sampled_from([None, [3, 40]]),
        }
    )


@settings(max_examples=15, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data(), name=st.sampled_from(["Llama", "GPT-2", "BERT"]), tied=st.booleans())
def test_alpha_1_of_any_adapter_is_the_adapter_as_trained(data, name, tied, cases, tmp_path_factory):
    config = data.draw(draw_adapter(ARCHITECTURES[name]))
    root = tmp_path_factory.mktemp("adapter")
    try:
        case = cases(name).adapter(str(root / "adapter"), tied=tied, **config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError):
        return  # PEFT refuses the combination
    scale = float(case.tuned_logits.abs().max())
    for alpha, expected in ((1.0, case.tuned_logits), (0.0, case.base_logits)):
        try:
            written = interpolate(case.base, case.tuned, alpha, root / f"alpha-{alpha}").out
        except InputError:
            continue
        difference = (tables.logits(cases(name).load(written)) - expected).abs().max()
        assert float(difference) <= ROUND_OFF * scale, (alpha, config)


@settings(max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    name=st.sampled_from(["Llama", "GPT-2", "OLMoE", "Qwen2-VL"]),
    tied=st.booleans(),
    half=st.booleans(),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_graft_and_its_complement_hold_each_entry_of_both_once(
    name, tied, half, share, seed, cases, tmp_path_factory
):
    base = cases(name).base(tied=tied)
    tuned = cases(name).tuned(tied=tied, dtype=torch.bfloat16 if half else torch.float32)
    generator = torch.Generator().manual_seed(seed)
    headers = CheckpointPair(base, tuned).tuned.headers
    masks = {key: torch.rand(header.shape, generator=generator) < share for key, header in headers.items()}
    root = tmp_path_factory.mktemp("graft")
    index = {key: mask.flatten().nonzero()[:, 0] for key, mask in masks.items()}
    Patch.of(CheckpointPair(base, tuned), index).save(root / "mask.safetensors")
    ours, theirs = (weights(path) for path in (base, tuned))
    for without in (False, True):
        grafted = weights(
            graft(base, tuned, root / "mask.safetensors", root / f"{without}", without=without).out
        )
        for key, mask in masks.items():
            expected = torch.where(mask != without, theirs[key].float(), ours[key].float())
            assert torch.equal(grafted[key].float(), expected)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")
