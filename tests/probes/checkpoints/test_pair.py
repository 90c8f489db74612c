import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from probes import CheckpointPair, open_checkpoint
from probes.adapters.parts import LowRank
from probes.files.layout import Header
from probes.naming.align import align, without_wrappers

Q = "model.layers.0.self_attn.q_proj.weight"
K = Q.replace("q_proj", "k_proj")
EMBED = "model.embed_tokens.weight"


def put_adapter(path, directory, seed=1, target="q_proj", rank=2, **config):
    """A LoRA on one projection of both layers of the tiny Llama, all its factors set."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": [target],
              "base_model_name_or_path": str(directory)} | config  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    rows = {"q_proj": 32, "k_proj": 16}[target]
    factors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.{target}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(rank, 32, generator=random)
        factors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=random)
    save_file(factors, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def adapter(directory, tmp_path):
    return put_adapter(tmp_path / "adapter", directory)


def shapes(pair):
    return {
        unmatched.tensor: (unmatched.reason, unmatched.base_shape, unmatched.tuned_shape)
        for unmatched in pair.unmatched
    }


def refuse(match, base, tuned):
    with pytest.raises(ValueError, match=match) as caught:
        CheckpointPair(base, tuned)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- alignment


def test_a_checkpoint_aligns_wholly_with_itself(directory):
    pair = CheckpointPair(directory, directory)
    assert set(pair.matrices) == set(pair.base.matrices)
    assert pair.unmatched == []
    assert pair.resized == {}
    assert all(pair.identical(name) for name in pair.matrices)


def test_matrices_come_by_layer_number_and_not_by_file_order(llama, tmp_path):
    llama(num_hidden_layers=11).save_pretrained(tmp_path / "m")
    pair = CheckpointPair(tmp_path / "m", tmp_path / "m")
    layers = [matrix.layer for matrix in pair.matrices.values() if matrix.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(11))


def test_file_order_and_shards_change_nothing(llama, directory, edited, tmp_path):
    def bump(tensors):
        tensors[Q] += 1
        for name in sorted(tensors, reverse=True):
            tensors[name] = tensors.pop(name)

    tuned = edited(directory, bump)
    state = load_file(tuned / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_bytes((directory / "config.json").read_bytes())
    names = sorted(state, key=lambda name: hash((name, 1)))
    where = {}
    # The later shard holds what a sorted file would have first.
    for number, part in ((2, names[:5]), (1, names[5:])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, shards / file)
        where |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save(dict(reversed(state.items())), tmp_path / "w.bin")
    pairs = [CheckpointPair(directory, other) for other in (tuned, shards, tmp_path / "w.bin")]
    for pair in pairs:
        assert list(pair.matrices) == list(pairs[0].matrices)
        assert pair.unmatched == []
        assert [name for name in pair.matrices if not pair.identical(name)] == [Q]
        base, other = pair.read(Q)
        assert torch.equal(other, base + 1)


def test_a_missing_an_extra_and_a_reshaped_tensor_are_listed(directory, edited):
    def edit(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.extra.weight"] = torch.ones(3, 4)
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(8, 32)
        tensors["model.norm.weight"] = torch.ones(16)

    pair = CheckpointPair(directory, edited(directory, edit))
    assert shapes(pair) == {
        "model.layers.0.mlp.up_proj.weight": ("missing from tuned", (48, 32), None),
        "model.layers.0.extra.weight": ("extra in tuned", None, (3, 4)),
        "model.layers.1.self_attn.k_proj.weight": ("another shape", (16, 32), (8, 32)),
        "model.norm.weight": ("another shape", (32,), (16,)),
    }
    assert len(pair.matrices) == len(pair.base.matrices) - 2


def test_a_renamed_tensor_is_listed_on_both_sides_with_a_hint_and_is_not_aligned(directory, edited):
    def edit(tensors):
        tensors["model.layers.0.mlp.upward.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.layers.1.scale.weight"] = tensors.pop("model.layers.1.input_layernorm.weight") + 1

    pair = CheckpointPair(directory, edited(directory, edit))
    hint = "renamed to model.layers.0.mlp.upward.weight? it holds the same bytes"
    assert shapes(pair) == {
        "model.layers.0.mlp.up_proj.weight": (f"missing from tuned; {hint}", (48, 32), None),
        "model.layers.0.mlp.upward.weight": ("extra in tuned", None, (48, 32)),
        "model.layers.1.input_layernorm.weight": (
            "missing from tuned; renamed to model.layers.1.scale.weight? no other of this shape is new",
            (32,),
            None,
        ),
        "model.layers.1.scale.weight": ("extra in tuned", None, (32,)),
    }
    assert "model.layers.0.mlp.up_proj.weight" not in pair.matrices


def test_constant_tensors_are_not_taken_for_renamed_ones(directory, edited):
    # Four norms of ones are missing, and two new ones of ones are there: any might be any.
    def edit(tensors):
        for layer in range(2):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                del tensors[f"model.layers.{layer}.{norm}.weight"]
            tensors[f"model.layers.{layer}.norm.weight"] = torch.ones(32)

    reasons = [unmatched.reason for unmatched in CheckpointPair(directory, edited(directory, edit)).unmatched]
    assert sorted(reasons) == ["extra in tuned"] * 2 + ["missing from tuned"] * 4


def test_more_layers_in_tuned_are_listed_as_extra(llama, directory, tmp_path):
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    pair = CheckpointPair(directory, tmp_path / "deep")
    assert len(pair.matrices) == len(pair.base.matrices)
    assert {unmatched.reason for unmatched in pair.unmatched} == {"extra in tuned"}
    assert all(unmatched.tensor.startswith("model.layers.2.") for unmatched in pair.unmatched)
    assert len(pair.unmatched) == 9  # 7 matrices and 2 norms in a Llama block


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace(
            "layers.1.", "layers.1._orig_mod."
        ),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '.mlp._checkpoint_wrapped_module.')}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model.language_model.", 1),
    ],
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_what_wrappers_and_heads_add_to_names_is_taken_off(directory, edited, rename, side):
    def edit(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    other = edited(directory, edit)
    pair = CheckpointPair(directory, other) if side == "tuned" else CheckpointPair(other, directory)
    assert len(pair.matrices) == len(open_checkpoint(directory).matrices)
    assert pair.unmatched == []
    assert all(pair.identical(name) for name in pair.matrices)
    assert all(name in pair.base.matrices for name in pair.matrices)


def test_a_bare_model_aligns_with_one_that_has_a_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "head")
    model.bert.save_pretrained(tmp_path / "bare")
    pair = CheckpointPair(tmp_path / "bare", tmp_path / "head")
    assert pair.prefixes == ("", "bert.")
    assert shapes(pair) == {
        "classifier.weight": ("extra in tuned", None, (2, 16)),
        "classifier.bias": ("extra in tuned", None, (2,)),
    }
    assert all(pair.identical(name) for name in pair.matrices)
    assert "encoder.layer.0.attention.self.query.weight" in pair.matrices


def names(count=3, prefix=""):
    matrices = [f"{prefix}layers.{i}.{leaf}.weight" for i in range(count) for leaf in ("q", "k", "up")]
    return {name: Header(name, (4, 4), torch.float32) for name in [*matrices, f"{prefix}embed.weight"]}


def test_an_encoder_is_not_guessed_to_be_a_decoder():
    both = names(prefix="encoder.") | names(prefix="decoder.")
    assert align(names(), both) == ({}, ("", ""))
    assert align(both, both)[0] == {name: name for name in both}
    assert align(names(prefix="encoder."), both)[0] == {name: name for name in names(prefix="encoder.")}


@settings(max_examples=100, deadline=None)
@given(
    stems=st.lists(
        st.sampled_from(["", "model.", "transformer.", "bert.encoder.", "a.b."]), min_size=2, max_size=2
    ),
    wraps=st.lists(
        st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]), min_size=2, max_size=2
    ),
    extra=st.sets(st.sampled_from(["lm_head.weight", "score.weight"])),
)
def test_alignment_is_one_to_one_complete_and_symmetric(stems, wraps, extra):
    def side(stem, wrap, more):
        plain = [*names(prefix=stem), *more]
        return {wrap + name: Header(wrap + name, (4, 4), torch.float32) for name in plain}

    base, tuned = side(stems[0], wraps[0], ()), side(stems[1], wraps[1], extra)
    counterparts, _ = align(base, tuned)
    assert set(counterparts) == set(base)
    assert len(set(counterparts.values())) == len(counterparts)
    for name, other in counterparts.items():
        assert without_wrappers(name).removeprefix(stems[0]) == without_wrappers(other).removeprefix(stems[1])
    assert align(tuned, base)[0] == {other: name for name, other in counterparts.items()}


def test_a_file_without_configuration_is_read_by_the_other_sides(llama, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "m" / "model.safetensors").read_bytes())
    for sides in (
        (tmp_path / "m", tmp_path / "alone.safetensors"),
        (tmp_path / "alone.safetensors", tmp_path / "m"),
    ):
        pair = CheckpointPair(*sides)
        # Without the number of heads the fused projection could not be divided.
        assert "gpt_neox.layers.0.attention.query_key_value.weight:q" in pair.matrices
        assert all(pair.identical(name) for name in pair.matrices)
        assert pair.unmatched == []


def test_a_model_in_memory_aligns_with_its_directory(llama, directory):
    pair = CheckpointPair(directory, llama())
    assert pair.unmatched == []
    assert all(pair.identical(name) for name in pair.matrices)
    pair = CheckpointPair(llama(seed=1).state_dict(), directory)
    assert pair.unmatched == []
    assert not any(pair.identical(name) for name in pair.matrices)


# ------------------------------------------------------------------------- tied and resized vocabularies


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("described", [True, False])
def test_a_tied_head_that_one_side_stores_is_the_embedding_again(llama, tmp_path, side, described):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    state = load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in state
    stored = tmp_path / "stored"
    stored.mkdir()
    save_file(state | {"lm_head.weight": state[EMBED].clone()}, stored / "model.safetensors")
    if described:
        (stored / "config.json").write_bytes((tmp_path / "tied" / "config.json").read_bytes())
    else:
        (tmp_path / "tied" / "config.json").unlink()
    sides = (tmp_path / "tied", stored) if side == "tuned" else (stored, tmp_path / "tied")
    pair = CheckpointPair(*sides)
    assert pair.unmatched == []
    assert EMBED in pair.matrices
    assert "lm_head.weight" not in pair.matrices
    assert pair.identical(EMBED)


def test_a_head_that_differs_from_the_embedding_is_not_tied(llama, directory, tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    pair = CheckpointPair(tmp_path / "tied", directory)
    reason = f"tied to {EMBED} in base alone; not compared"
    assert shapes(pair) == {"lm_head.weight": (reason, (50, 32), (50, 32))}
    assert pair.tensors["lm_head.weight"] == EMBED


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_head_that_only_one_side_ties_is_listed(llama, tmp_path, role):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    state = load_file(tmp_path / "tied" / "model.safetensors")
    save_file(state | {"lm_head.weight": state[EMBED].clone()}, tmp_path / "tied" / "model.safetensors")
    shutil.copytree(tmp_path / "tied", tmp_path / "loose")
    save_file(state | {"lm_head.weight": state[EMBED] + 1}, tmp_path / "loose" / "model.safetensors")
    sides = [tmp_path / "tied", tmp_path / "loose"]
    pair = CheckpointPair(*(sides if role == "base" else sides[::-1]))
    reason = f"tied to {EMBED} in {role} alone; not compared"
    assert shapes(pair) == {"lm_head.weight": (reason, (50, 32), (50, 32))}


@pytest.mark.parametrize("rows", [53, 47])
def test_a_resized_vocabulary_keeps_the_common_rows_and_is_listed(directory, edited, rows):
    def edit(tensors):
        for name in (EMBED, "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((3, 32), float("nan"))])[:rows].contiguous()

    pair = CheckpointPair(directory, edited(directory, edit))
    assert pair.resized == {EMBED: (50, rows), "lm_head.weight": (50, rows)}
    common = min(rows, 50)
    reason = f"vocabulary resized from 50 to {rows} rows; the first {common} are compared"
    assert shapes(pair) == dict.fromkeys(pair.resized, (reason, (50, 32), (rows, 32)))
    for name in pair.resized:
        assert (pair.matrices[name].rows, pair.matrices[name].columns) == (common, 32)
        base, tuned = pair.read(name)
        assert base.shape == tuned.shape == (common, 32)
        assert torch.equal(base, tuned)
        assert pair.identical(name)


# ---------------------------------------------------------------------------------- reading and comparing


def test_identical_is_about_bytes(directory, edited):
    def edit(tensors):
        tensors[Q][0, 0] = 0.0
        tensors[K][-1, -1] += 1e-7

    base = edited(directory, edit, "base0")

    def negative_zero(tensors):
        edit(tensors)
        tensors[Q][0, 0] = -0.0
        tensors["model.layers.0.self_attn.v_proj.weight"] = tensors[
            "model.layers.0.self_attn.v_proj.weight"
        ].double()

    pair = CheckpointPair(base, edited(directory, negative_zero))
    assert not pair.identical(Q)
    assert pair.identical(K)
    assert not pair.identical("model.layers.0.self_attn.v_proj.weight")
    assert not CheckpointPair(directory, base).identical(K)  # the last entry differs, by one unit


def test_equal_bytes_are_identical_even_where_they_are_nan(directory, edited):
    def edit(tensors):
        tensors[Q][3] = float("nan")

    first, second = edited(directory, edit, "first"), edited(directory, edit, "second")
    assert CheckpointPair(first, second).identical(Q)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_values_that_are_not_finite_are_named_with_their_checkpoint(directory, edited, side):
    def edit(tensors):
        tensors[Q][2, 5] = float("inf")
        tensors[Q][3, 1] = float("nan")

    broken = edited(directory, edit, "broken")
    pair = CheckpointPair(broken, directory) if side == "base" else CheckpointPair(directory, broken)
    with pytest.raises(
        ValueError, match=rf"broken: {Q} holds 2 NaN or infinite values, the first at \(2, 5\)"
    ):
        pair.read(Q)
    pair.read(K)


def test_an_adapter_with_nan_is_named(directory, tmp_path):
    path = put_adapter(tmp_path / "adapter", directory)
    factors = load_file(path / "adapter_model.safetensors")
    factors[f"base_model.model.{Q.replace('weight', 'lora_B.weight')}"][4] = float("nan")
    save_file(factors, path / "adapter_model.safetensors")
    # One row of B makes one row of the merged matrix, 32 entries.
    with pytest.raises(
        ValueError, match=rf"adapter: {Q} holds 32 NaN or infinite values, the first at \(4, 0\)"
    ):
        CheckpointPair(directory, path).read(Q)


def test_an_unknown_matrix_is_answered_with_the_nearest(directory):
    pair = CheckpointPair(directory, directory)
    for ask in (pair.read, pair.identical, pair.delta):
        with pytest.raises(LookupError, match=rf"'model.layers.0.q_proj' is not a matrix of both; .*{Q}"):
            ask("model.layers.0.q_proj")


# ----------------------------------------------------------------------------------------------- adapters


def test_an_adapter_is_applied_to_the_base_it_is_compared_with(llama, adapter, directory, tmp_path):
    llama(seed=9).save_pretrained(tmp_path / "other")
    pair = CheckpointPair(tmp_path / "other", adapter)
    base, tuned = pair.read(Q)
    assert pair.tuned.base is pair.base
    assert torch.equal(base, llama(seed=9).state_dict()[Q])
    assert torch.allclose(tuned, base + pair.delta(Q).dense())


def test_an_adapter_reads_the_base_once_and_what_it_leaves_alone_not_at_all(adapter, directory, monkeypatch):
    pair = CheckpointPair(directory, adapter)
    read = []
    source = pair.base.source
    original = source.read
    monkeypatch.setattr(source, "read", lambda name: read.append(name) or original(name))
    untouched = [name for name in pair.matrices if pair.identical(name)]
    assert len(untouched) == len(pair.matrices) - 2
    assert [name for name in read if name != Q and name != Q.replace("0", "1")] == []
    read.clear()
    base, tuned = pair.read(Q)
    assert read == [Q]
    assert isinstance(pair.delta(Q), LowRank)
    assert pair.delta(Q).rank == 2
    assert pair.delta(K) is None
    assert base.dtype == tuned.dtype == torch.float32
    assert torch.equal(tuned, base + pair.delta(Q).dense())


def test_half_precision_bases_are_merged_in_single_precision(llama, tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "half")
    pair = CheckpointPair(tmp_path / "half", put_adapter(tmp_path / "adapter", tmp_path / "half"))
    base, tuned = pair.read(Q)
    assert base.dtype == torch.bfloat16
    assert tuned.dtype == torch.float32
    assert torch.equal(tuned, base.float() + pair.delta(Q).dense())


def test_two_adapters_of_one_base_are_compared_as_two(directory, tmp_path):
    first = put_adapter(tmp_path / "first", directory, seed=1)
    second = put_adapter(tmp_path / "second", directory, seed=2, rank=3)
    pair = CheckpointPair(first, second)
    base, tuned = pair.read(Q)
    assert torch.allclose(base, CheckpointPair(directory, first).read(Q)[1])
    assert torch.allclose(tuned, CheckpointPair(directory, second).read(Q)[1])
    assert pair.delta(Q).rank == 5
    assert torch.allclose(pair.delta(Q).dense(), tuned - base, atol=1e-4)
    assert pair.identical(K)
    assert not pair.identical(Q)
    other = CheckpointPair(first, put_adapter(tmp_path / "keys", directory, target="k_proj"))
    base, tuned = other.read(Q)
    assert torch.allclose(other.delta(Q).dense(), tuned - base, atol=1e-4)  # minus the first one's
    base, tuned = other.read(K)
    assert torch.allclose(other.delta(K).dense(), tuned - base, atol=1e-4)


def test_an_adapter_trained_on_an_adapted_model_adds_to_it(directory, adapter, tmp_path):
    first = open_checkpoint(adapter)
    second = open_checkpoint(put_adapter(tmp_path / "second", directory, seed=2), base=first)
    pair = CheckpointPair(first, second)
    base, tuned = pair.read(Q)
    assert torch.equal(base, first.matrix(Q))
    assert pair.delta(Q).rank == 2
    assert torch.allclose(tuned - base, pair.delta(Q).dense(), atol=1e-5)
    assert pair.identical(K)


def test_an_adapter_opened_on_another_base_is_compared_as_the_weights_it_makes(
    llama, adapter, directory, tmp_path
):
    llama(seed=9).save_pretrained(tmp_path / "other")
    pair = CheckpointPair(tmp_path / "other", open_checkpoint(adapter))
    assert pair.delta(Q) is None
    assert not pair.identical(K)
    assert torch.allclose(pair.read(Q)[1], CheckpointPair(directory, adapter).read(Q)[1])


# ------------------------------------------------------------------------------------- other processes


def test_a_pair_works_in_another_process(adapter, directory):
    pair = CheckpointPair(directory, adapter)
    expected = pair.read(Q)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sums, same, listed = pool.apply(_measure, (pair,))
    assert sums == [float(side.sum()) for side in expected]
    assert same
    assert listed == pair.unmatched
    assert list(pickle.loads(pickle.dumps(pair)).matrices) == list(pair.matrices)


def test_a_pair_of_files_is_pickled_as_their_paths_and_opened_once_a_process(adapter, directory):
    pair = CheckpointPair(directory, adapter)
    packed = pickle.dumps(pair)
    assert len(packed) < 5000  # nearly all of it three times config.json; one matrix in bfloat16 is 2,048
    again = pickle.loads(packed)
    assert again.matrices == pair.matrices
    assert (again.base.ref, again.tuned.ref) == (pair.base.ref, pair.tuned.ref)
    assert again.tuned.base is again.base
    assert again.tuned.adapter == pair.tuned.adapter
    assert pickle.loads(packed) is again


def test_files_that_changed_or_are_not_there_are_refused_where_they_are_opened_again(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    packed = pickle.dumps(CheckpointPair(directory, str(copy)))
    file = next(copy.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=r"copy: on .* it is not the file that was opened first"):
        pickle.loads(packed)
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=r"copy: not there on .*; every worker opens the checkpoints itself"):
        pickle.loads(packed)


def _measure(pair):
    return [float(side.sum()) for side in pair.read(Q)], pair.identical(K), pair.unmatched


# -------------------------------------------------------------------------------------------- bad input


def test_models_of_another_width_are_refused_with_both_shapes(llama, directory, tmp_path):
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    match = (
        r"model.layers.0.\S+: base is \d+x\d+, tuned \d+x\d+, and no other matrix fits either; base .*base "
        r"\(LlamaForCausalLM\), tuned .*wide \(LlamaForCausalLM\): are these of one architecture\?"
    )
    refuse(match, directory, tmp_path / "wide")


def test_models_of_another_architecture_are_refused_with_what_both_have(directory, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    # The same vocabulary and width, so that only the embeddings' shapes agree.
    config = GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    match = (
        r"no matrix in common: base .*base \(LlamaForCausalLM\) has 14 such as model.layers\S+ \(\d+x\d+\), "
        r"tuned .*gpt \(GPT2LMHeadModel\) has .* such as transformer.h.0\S+ \(\d+x\d+\); "
        r"are these of one architecture\?"
    )
    refuse(match, directory, tmp_path / "gpt")


def test_strangers_with_strange_names_are_refused_in_one_line():
    base = {"model.layers.0.mlp.up_proj.weight\n\x1b[2J": torch.ones(4, 2)}
    tuned = {"transformer.h.0.mlp.c_fc.weight": torch.ones(3, 5)}
    with pytest.raises(ValueError, match=r"no matrix in common|holds no matrix") as refused:
        CheckpointPair(base, tuned)
    assert str(refused.value).isprintable()


def test_a_checkpoint_without_matrices_is_refused(directory, tmp_path):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "norms.safetensors")
    refuse(
        r"tuned .*norms.safetensors \(LlamaForCausalLM\) holds no matrix, only 1 such as norm.weight \(3\)",
        directory,
        tmp_path / "norms.safetensors",
    )


def test_stacked_experts_align_with_separate_ones_and_fused_projections_with_their_parts(tmp_path):
    gate, up, down = torch.randn(3, 6, 8), torch.randn(3, 6, 8), torch.randn(3, 8, 6)
    common = {
        "model.embed_tokens.weight": torch.randn(10, 8),
        "model.layers.0.input_layernorm.weight": torch.ones(8),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    block = "model.layers.0.mlp"
    apart = common | {
        f"{block}.experts.{expert}.{part}_proj.weight": value[expert].clone()
        for part, value in (("gate", gate), ("up", up), ("down", down))
        for expert in range(3)
    }
    stacked = common | {
        f"{block}.experts.gate_up_proj": torch.cat([gate, up], dim=1),
        f"{block}.experts.down_proj": down,
    }
    config = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 8, "moe_intermediate_size": 6}
    for name, tensors in (("apart", apart), ("stacked", stacked)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    pair = CheckpointPair(tmp_path / "apart", tmp_path / "stacked")
    # embed, q_proj, and three matrices of each of three experts
    assert len(pair.matrices) == 11
    assert pair.unmatched == []
    assert all(pair.identical(name) for name in pair.matrices)


def test_a_pair_of_the_same_tensors_is_compared_completely(checkpoints):
    assert CheckpointPair(*checkpoints).compared == 1.0


def test_what_base_lacks_is_not_compared():
    base = {f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(8, 8) for layer in range(3)}
    tuned = base | {"model.layers.0.mlp.down_proj.weight": torch.randn(8, 8)}
    assert CheckpointPair(base, tuned).compared == 0.75


def test_of_a_longer_vocabulary_the_common_rows_are_compared():
    def model(rows):
        return {EMBED: torch.ones(rows, 4), Q: torch.ones(4, 4)}

    assert CheckpointPair(model(12), model(16)).compared == 1 - 16 / 80
