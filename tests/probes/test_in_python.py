"""Work with models in memory, as in a notebook: what they show of themselves, tokenizers, activations."""

import pickle
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import probes
from probes import (
    Batch,
    CheckpointPair,
    CheckpointSeries,
    InputError,
    RunnablePair,
    batches,
    capture,
    encode,
    open_checkpoint,
    open_model,
    score_examples,
    task_of,
)
from probes.models.two_sided import TwoSidedModel
from tests.probes.runnable import make, saved

WORDS = ["[PAD]", "[UNK]", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of words, in memory alone."""
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def lora():
    """A base in memory and a PeftModel on it, every factor random."""
    peft = pytest.importorskip("peft")
    base = make("llama")
    model = peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return base, model.eval()


# --- what checkpoints show of themselves ---


def test_a_checkpoint_shows_its_kind_architecture_dtype_and_size(tmp_path):
    model = make("llama")
    size = sum(parameter.numel() for parameter in model.parameters())
    checkpoint = open_checkpoint(saved(model, tmp_path / "base"))
    assert repr(checkpoint) == (
        f"<Checkpoint {tmp_path / 'base'}: full, LlamaForCausalLM, float32, {size:,} parameters>"
    )
    table = checkpoint._repr_html_()
    assert table.startswith("<table>")
    for cell in (str(tmp_path / "base"), "full", "LlamaForCausalLM", "float32", f"{size:,}"):
        assert f"<td>{cell}</td>" in table


def test_a_pair_shows_both_sides_and_how_they_align(lora):
    pair = CheckpointPair(*lora)
    aligned = "16 matrices aligned, 0 tensors unmatched"  # 2 blocks of 7, embedding and head
    assert repr(pair).endswith(f": {aligned}>")
    table = pair._repr_html_()
    assert "<td>full</td><td>adapter</td>" in table
    assert f"<p>{aligned}</p>" in table
    assert len(table) < 1000


def test_a_pair_counts_what_does_not_align():
    shared = {f"model.layers.0.self_attn.{name}.weight": torch.ones(2, 2) for name in ("q_proj", "k_proj")}
    pair = CheckpointPair(shared, shared | {"model.layers.0.self_attn.v_proj.weight": torch.ones(2, 2)})
    assert "2 matrices aligned, 1 tensors unmatched" in repr(pair)


def test_a_series_shows_its_steps_and_its_ends():
    states = [{"model.layers.0.mlp.up_proj.weight": torch.full((2, 2), float(i))} for i in range(12)]
    table = CheckpointSeries(states, steps=range(0, 120, 10))._repr_html_()
    assert "12 checkpoints: 0, 10, 20, 30, 40, 50, 60, 70, …" in table
    assert "<th>0</th><th>110</th>" in table


def test_names_in_files_are_shown_as_text():
    checkpoint = open_checkpoint({"model.layers.0.mlp.up_proj.weight": torch.eye(2)}).described_by(
        {"architectures": ["<script>alert(1)</script>"]}
    )
    assert "<script>" not in checkpoint._repr_html_()
    assert "&lt;script&gt;" in checkpoint._repr_html_()


# --- tokenizers in memory ---


def test_a_model_in_memory_takes_its_tokenizer_along(lora, tokenizer):
    base, tuned = lora
    assert open_model(open_checkpoint(base, tokenizer=tokenizer)).tokenizer is tokenizer
    assert open_model(open_checkpoint(tuned, tokenizer=tokenizer)).tokenizer is tokenizer
    pair = CheckpointPair(base, tuned, tokenizer=tokenizer)
    with RunnablePair(pair) as runnable:
        assert runnable.tokenizer is tokenizer
        assert runnable.base_tokenizer is tokenizer
    with TwoSidedModel(pair) as two_sided:
        assert two_sided.editable.tokenizer is tokenizer
    # The base inside of the PeftModel too.
    inner = CheckpointPair(tuned.get_base_model(), tuned, tokenizer=tokenizer)
    assert RunnablePair(inner).base_tokenizer is tokenizer
    assert RunnablePair(inner).shared is RunnablePair(pair).shared


def test_rows_run_through_models_in_memory(lora, tokenizer):
    base, tuned = lora
    task = task_of([{"prompt": "one two", "completion": " three four"}])
    with RunnablePair(CheckpointPair(base, tuned, tokenizer=tokenizer)) as runnable:
        examples = encode(task, runnable.tokenizer, max_length=8)
        with runnable.tuned() as model:
            scores = score_examples(model, examples)
    ids = tokenizer("one two three four", return_tensors="pt").input_ids
    with torch.no_grad():
        logs = tuned(ids).logits.log_softmax(dim=-1)[0]
    # The completion's two tokens, each given those before it.
    expected = logs[1, ids[0, 2]] + logs[2, ids[0, 3]]
    assert scores.log_likelihoods.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_given_tokenizer_goes_before_that_of_the_directory(tmp_path, tokenizer):
    directory = saved(make("llama"), tmp_path / "base")
    tokenizer.save_pretrained(directory)
    other = deepcopy(tokenizer)
    checkpoint = open_checkpoint(directory, tokenizer=other)
    assert open_model(checkpoint).tokenizer is other
    assert open_model(directory).tokenizer.get_vocab() == tokenizer.get_vocab()
    # Opening it is one thing, giving it a tokenizer another.
    plain = open_checkpoint(directory)
    assert open_checkpoint(plain, tokenizer=other).tokenizer is other
    assert plain.tokenizer is None


def test_a_model_in_memory_without_a_tokenizer_says_how_to_give_one():
    with pytest.raises(InputError, match=r"LlamaForCausalLM: .* tokenizer; give it as tokenizer="):
        _ = open_model(make("llama")).tokenizer


def test_a_process_that_cannot_have_the_tokenizer_says_so(tmp_path, tokenizer):
    directory = saved(make("llama"), tmp_path / "base")
    tokenizer.save_pretrained(directory)  # another one would be read in silence
    for checkpoint in (open_checkpoint(directory, tokenizer=tokenizer),
                       open_checkpoint(make("llama"), tokenizer=tokenizer)):  # fmt: skip
        travelled = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(checkpoint))))
        assert travelled.matrices == checkpoint.matrices
        if checkpoint.opened:  # files are opened once, however often they are told of
            assert pickle.loads(pickle.dumps(checkpoint)) is travelled
            with pytest.raises(InputError, match=r"its tokenizer was given in memory, and workers do not"):
                _ = open_model(travelled).tokenizer
        else:
            assert travelled.tokenizer_lost


def test_results_of_another_tokenizer_are_not_taken_for_those_of_this(tokenizer):
    model, other = make("llama"), deepcopy(tokenizer)
    other.add_tokens(["five"])
    stamps = {
        open_checkpoint(model, tokenizer=choice).stamp()
        for choice in (None, tokenizer, deepcopy(tokenizer), other)
    }
    assert len(stamps) == 3


# --- activations of a tokenizer's output ---


def residuals(model, encoding):
    """The hidden states that transformers gives for each block's end, but the last, which it normalises."""
    with torch.no_grad():
        return model(**encoding, output_hidden_states=True).hidden_states[1:-1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_activations_of_a_batch_encoding_are_transformers_own_hidden_states(family, side, tokenizer):
    model = make(family)
    encoding = tokenizer(["one two three", "four"], padding=True, padding_side=side, return_tensors="pt")
    encoding.pop("token_type_ids", None)
    batch = Batch.of(encoding)
    expected = residuals(model, encoding | {"position_ids": batch.position_ids})
    with capture(model, "hook_resid_post", layers=[0]) as captured:
        activations = captured.activations(encoding)["blocks.0.hook_resid_post"]
        (streamed,) = [values for _, values in captured.stream([encoding])]
    here = encoding["attention_mask"].bool()
    torch.testing.assert_close(activations[here], expected[0][here], atol=1e-5, rtol=1e-5)
    assert torch.equal(streamed["blocks.0.hook_resid_post"][here], activations[here])


def test_activations_of_an_adapter_are_those_of_the_peft_model(lora, tokenizer):
    _, tuned = lora
    encoding = tokenizer(["one two", "three four"], return_tensors="pt")
    encoding.pop("token_type_ids", None)
    with capture(tuned, "hook_resid_post", layers=[0]) as captured:
        activations = captured.activations(encoding)["blocks.0.hook_resid_post"]
    torch.testing.assert_close(activations, residuals(tuned, encoding)[0], atol=1e-5, rtol=1e-5)


def test_lists_tensors_and_batches_of_the_same_rows_are_the_same_batch(tokenizer):
    texts = ["one two three", "four"]
    padded = Batch.of(tokenizer(texts, padding=True, return_tensors="pt"))
    ragged = Batch.of(tokenizer(texts, return_attention_mask=False))
    (expected,) = batches(encode(task_of(texts), tokenizer, max_length=None), pad_id=0)
    for batch in (
        padded,
        ragged,
        Batch.of(expected),
        Batch.of(tokenizer(texts, padding=True, return_tensors="np")),
    ):
        for name, value in vars(expected).items():
            assert torch.equal(getattr(batch, name), value), name
    (row,) = Batch.of(tokenizer(texts[0])).ids.tolist()
    assert row == padded.ids[0].tolist()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"ids": [[1]]}, "has ids, no input_ids; give a tokenizer's output"),
        ({}, "has nothing, no input_ids"),
        ({"input_ids": []}, "input_ids holds no sequences of token ids"),
        ({"input_ids": [[[1]]]}, "input_ids holds no sequences of token ids"),
        ({"input_ids": torch.zeros(1, 1, 1)}, r"input_ids has 3 axes; it is \(rows, tokens\)"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask is of shape \(1, 1\) and input_ids",
        ),
        ({"input_ids": [[1], []]}, "a sequence has no token"),
    ],
)
def test_what_is_no_tokenizers_output_is_refused(encoding, message):
    with pytest.raises(InputError, match=message):
        Batch.of(encoding)


def test_every_exported_name_is_importable_and_documented_with_an_example():
    for name in probes.__all__:
        value = getattr(probes, name)
        assert ">>> " in (value.__doc__ or ""), name
