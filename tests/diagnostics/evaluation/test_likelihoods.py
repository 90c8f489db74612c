"""What a model writes, against taking the likeliest token by hand; what it says of texts is in test_ood."""

import pytest
import torch

from diagnostics.evaluation.likelihoods import greedy
from diagnostics.evaluation.paired_texts import TextOptions, with_greedy_answers
from probes.text.rows import task_of
from tests.diagnostics.chains import save_tokenizer
from tests.probes.runnable import LLAMA, TOKENS, VOCABULARY, make, rows_of

LETTERS = "".join(chr(code) for code in range(ord("0"), ord("0") + VOCABULARY - 1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One character a token, BOS and EOS being 0, with nothing put around a text."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, LETTERS, bos=False)
    return AutoTokenizer.from_pretrained(directory)


def likeliest(model, ids, count, ends=(0,)):
    """The tokens by hand."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[start:]


def decoded(tokenizer, ids):
    return "".join(LETTERS[token - 1] for token in ids)


@pytest.fixture(scope="module")
def prompts():
    return rows_of(4, 9, 2, 6)


def test_what_is_written_is_the_likeliest_whatever_the_settings_of_the_model_ask_for(tokenizer, prompts):
    model = make("llama")
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    expected = [decoded(tokenizer, likeliest(model, prompt.ids, 6)) for prompt in prompts]
    assert any(len(set(text)) < len(text) for text in expected)  # the penalty would forbid these
    assert greedy(model, tokenizer, prompts, longest=6) == expected
    assert model.generation_config.repetition_penalty == 9.0


def test_it_stops_where_the_model_ends_a_turn(tokenizer, prompts):
    model = make("llama")
    full = [likeliest(model, prompt.ids, 6) for prompt in prompts]
    turn = full[0][2]
    model.generation_config.eos_token_id = [0, turn]
    ended = [likeliest(model, prompt.ids, 6, ends=(0, turn)) for prompt in prompts]
    assert len(ended[0]) < len(full[0])
    assert greedy(model, tokenizer, prompts, longest=6) == [decoded(tokenizer, tokens) for tokens in ended]


def test_a_model_that_reads_padding_as_text_writes_what_it_writes_alone(tokenizer, prompts):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**TOKENS, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 2)
    expected = [decoded(tokenizer, likeliest(model, prompt.ids, 4)) for prompt in prompts]
    assert greedy(model, tokenizer, prompts, longest=4) == expected


@pytest.fixture
def ending(tokenizer, tmp_path):
    """The same tokenizer with an EOS put behind each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    reloaded.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 0)]
    )
    return reloaded


def test_an_answer_follows_its_question_and_not_the_end_of_the_text(tokenizer, ending):
    model = make("llama")
    task = task_of([{"prompt": "3:>", "completion": "="}, {"prompt": "A", "completion": "="}])
    assert ending("3:>")["input_ids"][-1] == 0
    plain, ended = (
        with_greedy_answers(model, variant, task, TextOptions(longest_answer=5))
        for variant in (tokenizer, ending)
    )
    assert plain == ended
    expected = [likeliest(model, tokenizer(text)["input_ids"], 5) for text in ("3:>", "A")]
    assert [row.completion for row in ended[0].rows] == [decoded(tokenizer, tokens) for tokens in expected]


def test_a_question_and_its_answer_fit_into_what_the_model_takes(tokenizer):
    model, long = make("gpt2"), "0123456789" * 3
    context = LLAMA["max_position_embeddings"]
    task = task_of([{"prompt": long, "completion": "="}, {"prompt": "A", "completion": "="}])
    answered, notes = with_greedy_answers(
        model, tokenizer, task, TextOptions(max_length=context, longest_answer=768)
    )
    # Of the 32 tokens half are for the answer; of the question its last 16 are read.
    expected = [likeliest(model, tokenizer(text)["input_ids"], 16) for text in (long[-16:], "A")]
    assert [row.completion for row in answered.rows] == [decoded(tokenizer, tokens) for tokens in expected]
    assert notes == [
        "rows: the model saw only the last 16 tokens of 1 of 2 prompts, to have room for an answer of 16; "
        "the first is rows:1. A lower longest_answer leaves more room"
    ]
