"""Mitigation scales the right directions by the right amount, in files that load, and nothing else."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

from diagnostics.analyses.intruders.analysis import intruder_dimensions
from diagnostics.analyses.intruders.damping import choose, damp, leading
from diagnostics.edits.mitigate import TRAIL, _check, mitigate
from probes.adapters.adapter import Adapter
from probes.checkpoints.opening import open_checkpoint
from probes.checkpoints.pair import CheckpointPair

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

# Matrices of 48 and more: in smaller ones chance comes too near to epsilon, and none would be examined.
WIDTH, EPSILON, K = 48, 0.7, 5
TOKENS = torch.arange(12).reshape(1, 12)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {
            "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 4, "num_local_experts": 2,
        },
    ),
}  # fmt: skip


def build(name: str, **settings: Any) -> Any:
    """A tiny model whose matrices have separated spectra, so that intruders are well defined."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = getattr(transformers, kind)
    instance = model(model.config_class(vocab_size=64, pad_token_id=None, **config | settings)).eval()
    with torch.no_grad():
        for parameter in instance.parameters():
            if parameter.ndim == 2:
                U, S, Vh = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(U * 0.9 ** torch.arange(len(S)) @ Vh)
    return instance


def spike(model: Any, *endings: str, size: float = 2.0) -> None:
    """Add a random direction of this size to the weights whose names end so: an intruder of rank 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(endings):
                u, v = (torch.randn(length, generator=generator) for length in parameter.shape[-2:])
                parameter += size * torch.outer(u / u.norm(), v / v.norm())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Save a base, and a tuned copy of it after `tune(model)`."""

    def save(name: str, tune: Callable[[Any], Any], dtype: Any = None, **settings: Any) -> tuple[Path, Path]:
        for role in ("base", "tuned"):
            model = build(name, **settings)
            if role == "tuned":
                tune(model)
            model.to(dtype or torch.float32).save_pretrained(tmp_path / role)
        return tmp_path / "base", tmp_path / "tuned"

    return save


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Save a base, and an adapter of random factors on it."""

    def save(name: str, **config: Any) -> tuple[Path, Path]:
        model = build(name)
        model.save_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out of a Conv1D with a warning
            peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, **config))
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for tensor in (p for p in peft.parameters() if p.requires_grad):
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(noise / math.sqrt(max(tensor.shape)) if tensor.ndim > 1 else noise.abs() + 1)
            peft.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return save


def logits(directory: Path, base: Path | None = None) -> torch.Tensor:
    """What the written checkpoint computes, through from_pretrained."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base or directory)
    if base:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, directory)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def same_files(ours: Path, theirs: Path, file: str = "model.safetensors") -> list[str]:
    """The tensors that differ between two files that hold the same names."""
    first, second = load_file(ours / file), load_file(theirs / file)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@given(
    rows=st.integers(3, 40),
    columns=st.integers(3, 40),
    scale=st.floats(0, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_squared_norm_falls_by_one_minus_scale_squared_times_each_singular_value(
    rows, columns, scale, seed, data
):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    some = st.lists(st.integers(1, min(rows, columns)), min_size=1, max_size=3, unique=True)
    ranks = sorted(data.draw(some))
    left, right, values = damp(W, ranks, scale)
    after = W + left @ right
    fall = (1 - scale**2) * values.square().sum()
    assert (W.square().sum() - after.square().sum()).item() == pytest.approx(fall.item(), abs=1e-9)
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(values, S[[rank - 1 for rank in ranks]], rtol=1e-8, atol=1e-8)
    # The other singular values stay: removing these ranks and adding λ s gives the spectrum of the result.
    S[[rank - 1 for rank in ranks]] *= scale
    torch.testing.assert_close(
        torch.linalg.svdvals(after), S.sort(descending=True).values, rtol=1e-7, atol=1e-9
    )
    if scale != 1:
        assert torch.linalg.matrix_rank(left @ right) == len(ranks)


@given(scale=st.floats(0, 2), seed=st.integers(0, 20))
def test_the_edit_is_affine_in_the_scale(scale, seed):
    W = torch.randn(9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    edits = {s: damp(W, [2], s) for s in (0.0, scale, 1.0)}
    dense = {s: left @ right for s, (left, right, _) in edits.items()}
    torch.testing.assert_close(dense[scale], (1 - scale) * dense[0.0], rtol=1e-9, atol=1e-12)
    assert not dense[1.0].any()


@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_leading_vectors_of_a_large_matrix_are_found_without_decomposing_it(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 700, generator=generator, dtype=torch.float64)).Q for n in shape)
    W = (U * 0.97 ** torch.arange(700) @ V.mT).float()
    exact = torch.linalg.svd(W.double(), full_matrices=False).U[:, :6]
    monkeypatch.setattr("diagnostics.numerics.linalg.left_singular", lambda W: pytest.fail("decomposed"))
    cosines = (leading(W, 6) * exact).sum(dim=0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-12)


def test_a_flat_spectrum_is_decomposed_because_no_search_would_end():
    W = torch.linalg.qr(torch.randn(660, 660, generator=torch.Generator().manual_seed(0))).Q
    U = leading(W, 2)
    torch.testing.assert_close(U.mT @ U, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)


def vectors(flags: str) -> pd.DataFrame:
    """A table in which `i` is an intruder, `.` is not and `?` was not measured."""
    return pd.DataFrame(
        {
            "matrix": "W",
            "rank": range(1, len(flags) + 1),
            "intruder": [flag == "i" for flag in flags],
            "cosine_low": [math.nan if flag == "?" else 0.9 for flag in flags],
        }
    )


@pytest.mark.parametrize(
    ("flags", "mode", "ranks"),
    [
        ("..i.i", "top", [3]),
        ("..i.i", "all", [3, 5]),
        ("..i.i", "neighbour", [2]),  # 2 and 4 are as near; 2 is the larger
        ("i.i..", "neighbour", [2]),
        ("iii.?", "neighbour", [4]),
        ("ii??", "neighbour", None),
        (".....", "all", None),
    ],
)
def test_each_mode_chooses_its_ranks(flags, mode, ranks):
    assert choose(vectors(flags), mode) == ({} if ranks is None else {"W": ranks})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_planted_direction_shrinks_and_every_other_tensor_stays_bit_for_bit(kind, saved, tmp_path):
    ending = {
        "llama": "0.self_attn.q_proj.weight",
        "gpt2": "0.attn.c_proj.weight",
        "mixtral": "v_proj.weight",
    }[kind]
    base, tuned = saved(kind, lambda model: spike(model, ending))
    done = mitigate(base, tuned, tmp_path / "out", scale=0.25, k=K, epsilon=EPSILON)
    changed = same_files(tmp_path / "out", tuned)
    assert [name.endswith(ending) for name in changed] == [True]
    (triple,) = done.triples
    assert (triple.rank, triple.matrix) == (1, changed[0])
    ours, theirs = (open_checkpoint(path).matrix(changed[0]).double() for path in (tmp_path / "out", tuned))
    U, S, Vh = torch.linalg.svd(theirs)
    expected = theirs - 0.75 * S[0] * torch.outer(U[:, 0], Vh[0])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert triple.singular_value == pytest.approx(S[0].item())
    assert done.norm == pytest.approx(0.75 * S[0].item())
    assert logits(tmp_path / "out").isfinite().all()


def test_all_three_parts_of_a_fused_tensor_are_edited_in_their_own_rows(saved, tmp_path):
    base, tuned = saved("gpt2", lambda model: spike(model, "0.attn.c_attn.weight", size=4))
    mitigate(base, tuned, tmp_path / "out", scale=0.0, mode="all", k=K, epsilon=EPSILON)
    before, after = (CheckpointPair(base, path) for path in (tuned, tmp_path / "out"))
    for part in "qkv":
        name = f"transformer.h.0.attn.c_attn.weight:{part}"
        ours, theirs = after.read(name)[1].double(), before.read(name)[1].double()
        U, S, Vh = torch.linalg.svd(theirs)
        torch.testing.assert_close(ours, theirs - S[0] * torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["top", "all", "neighbour", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_one_writes_every_byte_as_it_was(mode, dtype, saved, tmp_path):
    base, tuned = saved("gpt2", lambda model: spike(model, "c_proj.weight"), dtype)
    done = mitigate(base, tuned, tmp_path / "out", scale=1.0, mode=mode, k=K, epsilon=EPSILON)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert done.norm == 0
    assert done.share == 1
    assert done.edits


def test_a_checkpoint_without_intruders_is_copied(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight", size=1e-3))
    done = mitigate(base, tuned, tmp_path / "out", scale=0.0, mode="all", k=K, epsilon=EPSILON)
    assert not same_files(tmp_path / "out", tuned)
    assert "Nothing was scaled" in done.summary()


def test_update_at_zero_is_the_base_and_in_between_it_is_the_mean(saved, tmp_path):
    def tune(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)

    base, tuned = saved("llama", tune)
    mitigate(base, tuned, tmp_path / "zero", scale=0.0, mode="update")
    assert not same_files(tmp_path / "zero", base)
    done = mitigate(base, tuned, tmp_path / "half", scale=0.5, mode="update")
    base_tensors, tuned_tensors, half_tensors = (
        load_file(path / "model.safetensors") for path in (base, tuned, tmp_path / "half")
    )
    for name in base_tensors:
        torch.testing.assert_close(
            half_tensors[name], (base_tensors[name] + tuned_tensors[name]) / 2, rtol=0, atol=1e-6
        )
    total = math.sqrt(
        sum(
            float((tuned_tensors[name] - base_tensors[name]).double().square().sum()) for name in base_tensors
        )
    )
    assert done.norm == pytest.approx(total / 2)
    assert done.relative == pytest.approx(0.5)


def test_a_resized_vocabulary_keeps_its_new_rows(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    mitigate(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", scale=0.0, mode="update")
    base, tuned, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out"))
    name = "model.embed_tokens.weight"
    assert torch.equal(out[name][:64], base[name])
    assert torch.equal(out[name][64:], tuned[name][64:])


def test_bfloat16_weights_are_rounded_once(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight"), torch.bfloat16)
    mitigate(base, tuned, tmp_path / "out", scale=0.5, k=K, epsilon=EPSILON)
    for name in same_files(tmp_path / "out", tuned):
        W = load_file(tuned / "model.safetensors")[name].double()
        U, S, Vh = torch.linalg.svd(W)
        expected = (W - 0.5 * S[0] * torch.outer(U[:, 0], Vh[0])).bfloat16()
        written = load_file(tmp_path / "out" / "model.safetensors")[name]
        # A bfloat16 has 8 bits: an entry may fall on the other side only of a tie within 1e-9.
        assert (written != expected).float().mean() < 1e-3


ADAPTERS = {
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rslora": ("llama", {"target_modules": ["o_proj"], "use_rslora": True}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "embedding": ("gpt2", {"target_modules": ["wte", "attn.c_proj"]}),
    "embedding dora": ("gpt2", {"target_modules": ["wte"], "use_dora": True}),
    "experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}  # fmt: skip
SEARCH: dict[str, Any] = {"k": K, "epsilon": EPSILON, "parts": ("block", "embedding")}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("mode", ["all", "update"])
def test_scale_one_leaves_an_adapter_and_its_logits_as_they_were(case, mode, adapted, tmp_path):
    kind, config = ADAPTERS[case]
    base, adapter = adapted(kind, **config)
    mitigate(base, adapter, tmp_path / "out", scale=1.0, mode=mode, **SEARCH)
    assert not same_files(tmp_path / "out", adapter, "adapter_model.safetensors")
    torch.testing.assert_close(logits(tmp_path / "out", base), logits(adapter, base), rtol=0, atol=0)


@pytest.mark.parametrize("case", ADAPTERS)
def test_full_weights_hold_the_edit_exactly(case, adapted, tmp_path):
    kind, config = ADAPTERS[case]
    base, adapter = adapted(kind, **config)
    done = mitigate(base, adapter, tmp_path / "out", scale=0.5, mode="all", full=True, **SEARCH)
    assert done.triples
    assert done.share == 1
    tuned, out = open_checkpoint(adapter, base=base), open_checkpoint(tmp_path / "out")
    for edit in done.edits:
        W = tuned.matrix(edit.matrix).double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        for triple in done.triples:
            if triple.matrix == edit.matrix:
                i = triple.rank - 1
                W = W - 0.5 * S[i] * torch.outer(U[:, i], Vh[i])
        torch.testing.assert_close(out.matrix(edit.matrix).double(), W, rtol=0, atol=1e-5)
    untouched = set(tuned.matrices) - {edit.matrix for edit in done.edits}
    for name in untouched:
        torch.testing.assert_close(out.matrix(name), tuned.matrix(name), rtol=0, atol=1e-6)
    assert logits(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("mode", ["top", "all"])
def test_an_adapter_holds_the_share_of_the_edit_that_it_says(case, mode, adapted, tmp_path):
    kind, config = ADAPTERS[case]
    base, adapter = adapted(kind, **config)
    done = mitigate(base, adapter, tmp_path / "out", scale=0.5, mode=mode, **SEARCH)
    mitigate(base, adapter, tmp_path / "full", scale=0.5, mode=mode, full=True, **SEARCH)
    assert done.kind == "adapter"
    assert done.edits
    before, after = open_checkpoint(adapter, base=base), open_checkpoint(tmp_path / "out", base=base)
    wanted = open_checkpoint(tmp_path / "full")
    assert {name: h.shape for name, h in after.source.weights.headers.items()} == {
        name: h.shape for name, h in before.source.weights.headers.items()
    }
    groups: dict[str, list[str]] = {}
    for name, matrix in before.matrices.items():
        # What shares factors is truncated together: q, k and v, and the gate and up projections of an expert.
        groups.setdefault(matrix.tensor.replace(".w3.", ".w1."), []).append(name)
    shares = {edit.matrix: edit.share for edit in done.edits}
    for names in groups.values():
        stated = [shares[name] for name in names if name in shares]
        if stated:
            missed = sum(float((after.matrix(n) - wanted.matrix(n)).double().square().sum()) for n in names)
            edit = sum(float((before.matrix(n) - wanted.matrix(n)).double().square().sum()) for n in names)
            assert stated == pytest.approx([1 - missed / edit] * len(stated), abs=1e-4)
            assert 0 < min(stated) <= 1 + 1e-9
    assert logits(tmp_path / "out", base).isfinite().all()


def test_the_truncation_is_the_best_of_its_rank(adapted, tmp_path):
    base, adapter = adapted("llama", target_modules=["q_proj"])
    done = mitigate(base, adapter, tmp_path / "out", scale=0.5, mode="all", **SEARCH)
    mitigate(base, adapter, tmp_path / "full", scale=0.5, mode="all", full=True, **SEARCH)
    pair = CheckpointPair(base, tmp_path / "out")
    wanted = CheckpointPair(base, tmp_path / "full")
    for edit in done.edits:
        before, target = wanted.read(edit.matrix)
        S = torch.linalg.svdvals((target - before).double())
        ours = (pair.read(edit.matrix)[1] - target).double().norm().item()
        assert ours == pytest.approx(S[4:].norm().item(), abs=1e-5)  # r = 4


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.5])
def test_the_scaled_update_of_an_adapter_is_exact(case, scale, adapted, tmp_path):
    kind, config = ADAPTERS[case]
    base, adapter = adapted(kind, **config)
    done = mitigate(base, adapter, tmp_path / "out", scale=scale, mode="update")
    pair = CheckpointPair(base, open_checkpoint(adapter, base=base))
    out = open_checkpoint(tmp_path / "out", base=base)
    for name in pair.matrices:
        before, tuned = pair.read(name)
        torch.testing.assert_close(out.matrix(name), before + scale * (tuned - before), rtol=1e-5, atol=1e-6)
    assert done.relative == pytest.approx(abs(1 - scale))
    assert logits(tmp_path / "out", base).isfinite().all()


def test_the_square_projection_of_gpt2_is_edited_along_its_own_triple(adapted, tmp_path):
    """PEFT's reducer transposes the factors of a Conv1D; of a square one only the values tell."""
    base, adapter = adapted("gpt2", target_modules=["attn.c_proj"])
    done = mitigate(base, adapter, tmp_path / "out", scale=0.2, mode="top", **SEARCH)
    name = "transformer.h.0.attn.c_proj.weight"
    assert name in {edit.matrix for edit in done.edits}
    (triple,) = (triple for triple in done.triples if triple.matrix == name)
    before, after = (
        open_checkpoint(path, base=base).tensor(name).double() for path in (adapter, tmp_path / "out")
    )
    # Stored as (in, out): x @ W writes along the rows, so that u is on the right.
    U, S, Vh = torch.linalg.svd(before.mT)
    i = triple.rank - 1
    edit = (after - before).flatten()
    wanted = (-0.8 * S[i] * torch.outer(Vh[i], U[:, i])).flatten()
    transposed = (-0.8 * S[i] * torch.outer(U[:, i], Vh[i])).flatten()
    assert torch.cosine_similarity(edit, wanted, dim=0) > 0.8
    assert abs(torch.cosine_similarity(edit, transposed, dim=0)) < 0.2


def test_bfloat16_factors_keep_their_dtype_and_the_share_counts_their_rounding(adapted, tmp_path):
    base, adapter = adapted("llama", target_modules=["q_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()}, adapter / "adapter_model.safetensors"
    )
    done = mitigate(base, adapter, tmp_path / "out", scale=0.999, mode="all", **SEARCH)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert done.share < 0.5  # an edit of a thousandth is lost in factors of 8 bits


def test_neighbours_and_intruders_are_disjoint_and_in_the_same_matrices(adapted, tmp_path):
    base, adapter = adapted("llama", target_modules=["q_proj", "down_proj"])
    top = mitigate(base, adapter, tmp_path / "top", mode="top", **SEARCH)
    neighbours = mitigate(base, adapter, tmp_path / "beside", mode="neighbour", **SEARCH)
    assert {t.matrix for t in neighbours.triples} <= {t.matrix for t in top.triples}
    assert neighbours.triples
    assert all(triple.cosine_low >= EPSILON for triple in neighbours.triples)
    assert all(triple.cosine_high < EPSILON for triple in top.triples)


def test_what_was_done_lies_beside_the_weights(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight"))
    done = mitigate(base, tuned, tmp_path / "out", scale=0.5, k=K, epsilon=EPSILON)
    trail = json.loads((tmp_path / "out" / TRAIL).read_text())
    assert trail["base"] == str(base)
    assert (trail["mode"], trail["scale"], trail["k"], trail["epsilon"]) == ("top", 0.5, K, EPSILON)
    assert [row["matrix"] for row in trail["triples"]] == [triple.matrix for triple in done.triples]
    assert any("mode `update`" in note for note in trail["notes"])
    tables = done.tables()
    assert len(tables["triples"]) == len(done.triples) == 2
    assert tables["edits"]["norm"].tolist() == [edit.norm for edit in done.edits]
    assert "Scaled 2 intruder dimensions in 2 matrices by 0.5" in done.summary()


def test_models_in_memory_are_mitigated_without_being_touched(tmp_path):
    base, tuned = build("llama"), build("llama")
    spike(tuned, "q_proj.weight")
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    mitigate(base, tuned, tmp_path / "out", scale=0.0, k=K, epsilon=EPSILON)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    assert logits(tmp_path / "out").isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers in a way that is deprecated
        peft = get_peft_model(
            build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
    mitigate(base, peft, tmp_path / "adapter", scale=0.5, mode="update")
    again = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(base))
    live = open_checkpoint(peft)
    name = "model.layers.0.self_attn.q_proj.weight"
    W0, W1 = live.base.matrix(name), live.matrix(name)
    torch.testing.assert_close(again.matrix(name), (W0 + W1) / 2, rtol=1e-5, atol=1e-6)


def test_fewer_intruders_are_left_when_they_are_removed(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight", "o_proj.weight"))
    search = {"k": K, "epsilon": EPSILON}
    assert intruder_dimensions(CheckpointPair(base, tuned), **search).metrics["intruders"] == 4
    mitigate(base, tuned, tmp_path / "out", scale=0.0, mode="all", **search)
    assert intruder_dimensions(CheckpointPair(base, tmp_path / "out"), **search).metrics["intruders"] == 0


def test_progress_tells_of_searching_and_of_writing(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight"))
    steps: list[tuple[int, int, str]] = []
    mitigate(base, tuned, tmp_path / "out", k=K, epsilon=EPSILON, progress=lambda *step: steps.append(step))
    ends = [step for step in steps if step[0] == step[1]]
    assert len(ends) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, r"scale is -1.0; 0 removes, 1 changes nothing"),
        ({"scale": math.nan}, r"scale is nan"),
        ({"epsilon": 0.0}, r"epsilon is 0.0; it is a cosine"),
        ({"full": False}, r"holds full weights, which cannot be written as an adapter"),
    ],
)
def test_parameters_out_of_range_are_refused_and_nothing_is_written(settings, message, saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight"))
    with pytest.raises(ValueError, match=message):
        mitigate(base, tuned, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"mode is 'most'; it is one of: top, all, update, neighbour"):
        _check("most", 0.7)


def test_an_occupied_place_is_refused_before_the_search(saved, tmp_path):
    base, tuned = saved("llama", lambda model: spike(model, "q_proj.weight"))
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        mitigate(base, tuned, tuned, progress=lambda *step: pytest.fail("searched"))


def test_an_unrelated_base_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="does not descend from"):
        mitigate(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", k=K, epsilon=EPSILON)


def test_an_adapter_that_cannot_hold_the_edit_says_so(adapted, tmp_path):
    base, adapter = adapted("llama", target_modules=["q_proj"], trainable_token_indices=list(range(40)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight: the adapter cannot hold .*full=True"):
        mitigate(
            base, adapter, tmp_path / "out", scale=0.0, mode="all", k=K, epsilon=EPSILON, parts=("embedding",)
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_another_base_is_not_scaled_toward_the_wrong_one(adapted, tmp_path):
    base, adapter = adapted("llama", target_modules=["q_proj"])
    model = build("llama")
    spike(model, "down_proj.weight")
    model.save_pretrained(tmp_path / "other")
    tuned = open_checkpoint(adapter, base=base)
    with pytest.raises(
        ValueError, match=r"is an adapter of .*base; scaled, it moves toward that base, not toward"
    ):
        mitigate(tmp_path / "other", tuned, tmp_path / "out", mode="update")
    mitigate(tmp_path / "other", tuned, tmp_path / "out", mode="update", scale=0.0, full=True)
    assert not same_files(tmp_path / "out", tmp_path / "other")
    assert isinstance(tuned.source, Adapter)
