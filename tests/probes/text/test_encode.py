"""Rows become token ids in which what the row asks for is scored and nothing else, whatever the tokenizer."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, PythonBackend

from probes.text import encode as tasks
from probes.text.encode import encode, encoding_notes
from probes.text.rows import task_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CORPUS = [
    "the answer is yes and the answer is no",
    "hello world, hello there; 12 + 34 = 46",
    "naïve café über straße 😀 日本語  two spaces\n\nand lines",
] * 3
TEXT = st.text(
    st.one_of(st.sampled_from("the answer yes no 12\n"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=12,
)
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


HOLDS = "{{ messages[0].content }}"


def bos_first(tokenizer):
    """Puts <s> before every text."""
    bos_id = tokenizer.token_to_id("<s>")
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])


def byte_pairs(*, bos=False, trim=True):
    """GPT-2's kind: merges over bytes, learnt from a few lines; words and pieces of them are tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    inner = processors.ByteLevel(trim_offsets=trim)
    backend.post_processor = processors.Sequence([inner, bos_first(backend)]) if bos else inner
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def characters(*, bos=False, **settings):
    """Every ASCII character a token, and "ab" one too, so that a boundary can lie within a token."""
    vocabulary = {
        token: index for index, token in enumerate([*SPECIAL.values(), "ab", *map(chr, range(32, 127))])
    }
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    if bos:
        backend.post_processor = bos_first(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(SPECIAL | settings))


class PythonCharacters(PythonBackend):
    """The same in Python, which does not tell where tokens lie in a text."""

    def __init__(self):
        self.vocabulary = characters().get_vocab()
        self.names = {index: token for token, index in self.vocabulary.items()}
        super().__init__(**SPECIAL, special_tokens_pattern="none")

    @property
    def vocab_size(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return dict(self.vocabulary)

    def _tokenize(self, text):
        return [part for word in text.split("ab") for part in ("ab", *word)][1:]

    def _convert_token_to_id(self, token):
        return self.vocabulary.get(token, self.vocabulary["<unk>"])

    def _convert_id_to_token(self, index):
        return self.names[index]


def word_pieces():
    """BERT's kind: special tokens on either side, and no BOS among them."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "one", "two", "three", "four", "five", "six"]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]",
    )  # fmt: skip


def scored(example, tokenizer):
    """The scored tokens as written in the vocabulary."""
    ids = [token for token, counts in zip(example.ids, example.scored, strict=True) if counts]
    return tokenizer.convert_ids_to_tokens(ids)


def tokens(example, tokenizer):
    """All tokens as written in the vocabulary."""
    return tokenizer.convert_ids_to_tokens(example.ids)


def encoded(row, tokenizer, **settings):
    """The only example of a row."""
    (example,) = encode(task_of([row]), tokenizer, **{"max_length": None, **settings})
    assert len(example.ids) == len(example.scored)
    assert example.scored[:1] in ([], [False])
    return example


# --- what is scored ----------------------------------------------------------------------------------------


def test_of_a_text_all_is_scored_that_has_something_before_it():
    without, with_ = characters(), characters(bos=True)
    assert scored(encoded("cat", without), without) == ["a", "t"]
    assert tokens(encoded("cat", with_), with_) == ["<s>", "c", "a", "t"]
    assert scored(encoded("cat", with_), with_) == ["c", "a", "t"]


def test_a_prompt_is_not_scored():
    tokenizer = characters()
    example = encoded({"prompt": "1+1=", "completion": "2!"}, tokenizer)
    assert tokens(example, tokenizer) == ["1", "+", "1", "=", "2", "!"]
    assert scored(example, tokenizer) == ["2", "!"]


def test_each_choice_is_an_example_with_the_same_prompt():
    tokenizer = characters()
    first = {"prompt": "?", "choices": ["yes", "n"], "answer": 1}
    second = {"prompt": "!", "choices": ["c", "d"], "answer": 0}
    task = task_of([first, second])
    examples = encode(task, tokenizer, max_length=None)
    assert [(example.row, example.choice) for example in examples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [scored(example, tokenizer) for example in examples] == [["y", "e", "s"], ["n"], ["c"], ["d"]]
    assert tokens(examples[1], tokenizer) == ["?", "n"]


def test_a_token_across_the_end_of_the_prompt_is_scored():
    # "ca" + "b" is c, ab: the prompt's own tokens, c and a, do not begin these.
    tokenizer = characters()
    example = encoded({"prompt": "ca", "completion": "bd"}, tokenizer)
    assert tokens(example, tokenizer) == ["c", "ab", "d"]
    assert scored(example, tokenizer) == ["ab", "d"]


@given(st.data(), st.booleans(), st.booleans())
def test_tokens_with_any_byte_of_the_completion_are_scored_and_no_others(data, bos, trim):
    tokenizer = BYTE_PAIRS[bos, trim]
    prompt, completion = data.draw(TEXT), data.draw(TEXT)
    assume(not any(name in prompt + completion for name in SPECIAL.values()))
    example = encoded({"prompt": prompt, "completion": completion}, tokenizer)
    ids = example.ids[bos:]
    assert example.ids == tokenizer(prompt + completion)["input_ids"]
    # Each character of a token stands for one byte, so that bytes can be counted from the front.
    boundary, end, expected = len(prompt.encode()), 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        end += len(token)
        expected.append(end > boundary)
    assert end == len((prompt + completion).encode())
    if not bos:
        expected[0] = False
    assert example.scored[bos:] == expected


BYTE_PAIRS = {(bos, trim): byte_pairs(bos=bos, trim=trim) for bos in (False, True) for trim in (False, True)}


def test_the_trained_tokenizer_has_tokens_across_boundaries():
    # Or the test above would show nothing.
    tokenizer = BYTE_PAIRS[False, True]
    example = encoded({"prompt": "the answ", "completion": "er is"}, tokenizer)
    assert scored(example, tokenizer) == ["Ġanswer", "Ġis"]


def test_a_space_that_ends_the_prompt_is_scored_with_the_word_that_it_belongs_to():
    # SentencePiece's kind: a word and the space before it are one token, and a text begins with such a space.
    words = ["?", "▁", "▁is", "▁yes", *"isye"]
    backend = Tokenizer(models.Unigram([(word, float(len(word) - 9)) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    for prompt, completion in (("is ", "yes"), ("is", " yes")):
        example = encoded({"prompt": prompt, "completion": completion}, tokenizer)
        assert tokens(example, tokenizer) == ["▁is", "▁yes"]
        assert scored(example, tokenizer) == ["▁yes"]
    # Of a text every token but the first, though a space was put before it.
    assert scored(encoded("sis", tokenizer), tokenizer) == list("sis")


@given(st.text("abc", max_size=8), st.text("abc", min_size=1, max_size=8))
def test_a_tokenizer_in_python_scores_the_same_tokens(prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    assert encoded(row, PYTHON) == encoded(row, characters())


PYTHON = PythonCharacters()


def test_everything_is_scored_when_asked_for():
    tokenizer = characters(bos=True)
    example = encoded({"prompt": "1+", "completion": "2"}, tokenizer, score_span="all")
    assert scored(example, tokenizer) == ["1", "+", "2"]


def test_a_sequence_begins_and_ends_with_its_models_special_tokens_which_are_not_scored():
    tokenizer = word_pieces()
    example = encoded("One two THREE", tokenizer)
    assert tokens(example, tokenizer) == ["[CLS]", "one", "two", "three", "[SEP]"]
    assert scored(example, tokenizer) == ["one", "two", "three"]
    assert scored(encoded("one two", tokenizer, score_span="all"), tokenizer) == ["one", "two"]


def test_a_text_without_tokens_has_nothing_scored():
    assert encoded("", characters()).ids == []
    tokenizer = characters(bos=True)
    example = encoded("", tokenizer)
    assert (tokens(example, tokenizer), scored(example, tokenizer)) == (["<s>"], [])


def test_a_tokenizer_that_was_saved_to_cut_and_pad_does_neither():
    tokenizer = characters()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokens(encoded("cat", tokenizer), tokenizer) == ["c", "a", "t"]


def test_a_tokenizer_in_which_no_text_has_tokens_but_the_tasks_is_understood():
    # Not even "a" is in its vocabulary, and it has no token for what is not.
    backend = Tokenizer(models.BPE({"<s>": 0, "0": 1, "1": 2}, []))
    backend.post_processor = bos_first(backend)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert encoded("0110", tokenizer).ids == [0, 1, 2, 2, 1]


def test_many_rows_are_encoded_as_each_alone(monkeypatch):
    tokenizer = characters(bos=True)
    rows = [{"prompt": "p" * (i % 5), "choices": ["ab" * (1 + i % 3), "c"], "answer": 0} for i in range(23)]
    batch = encode(task_of(rows), tokenizer, max_length=7)
    monkeypatch.setattr(tasks, "CHUNK", 3)  # a row's choices fall into two chunks
    assert encode(task_of(rows), tokenizer, max_length=7) == batch
    alone = [example for row in rows for example in encode(task_of([row]), tokenizer, max_length=7)]
    assert [(e.ids, e.scored, e.truncated) for e in batch] == [(e.ids, e.scored, e.truncated) for e in alone]


# --- length ------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_loses_its_end():
    tokenizer = characters(bos=True)
    task = task_of(["cdef", "cde", "cd"])
    examples = encode(task, tokenizer, max_length=4)
    assert [tokens(example, tokenizer) for example in examples] == [
        ["<s>", "c", "d", "e"],
        ["<s>", "c", "d", "e"],
        ["<s>", "c", "d"],
    ]
    assert [example.truncated for example in examples] == [True, False, False]


def test_special_tokens_stay_when_a_text_is_cut():
    tokenizer = word_pieces()
    example = encoded("one two three four five six", tokenizer, max_length=5)
    assert tokens(example, tokenizer) == ["[CLS]", "one", "two", "three", "[SEP]"]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(2, 20), st.booleans())
def test_the_answer_is_never_cut_before_the_question(asked, answered, longest, bos):
    tokenizer = characters(bos=bos)
    prompt, completion = "qrstuvwxy"[:asked], "123456789"[:answered]
    example = encoded({"prompt": prompt, "completion": completion}, tokenizer, max_length=longest)
    pieces = tokens(example, tokenizer)
    assert len(pieces) == min(longest, bos + asked + answered)
    assert example.truncated == (bos + asked + answered > longest)
    body = "".join(pieces[bos:])
    question = body.rstrip("123456789")
    answer = body.removeprefix(question)
    # The end of the prompt, then the beginning of the completion, with as much of this as can be scored.
    assert prompt.endswith(question)
    assert completion.startswith(answer)
    context = bos or asked > 0
    assert len(answer) == min(answered, longest - 1 if context else longest)
    assert "".join(scored(example, tokenizer)) == (answer if context else answer[1:])


def test_all_choices_of_a_row_lose_the_same_part_of_the_prompt():
    tokenizer = characters(bos=True)
    long = {"prompt": "qrst", "choices": ["123", "1"], "answer": 0}
    short = {"prompt": "q", "choices": ["1", "2"], "answer": 0}
    last = {"prompt": "qrst", "choices": ["1", "123"], "answer": 0}
    task = task_of([long, short, last])
    examples = encode(task, tokenizer, max_length=6)
    assert ["".join(tokens(example, tokenizer)) for example in examples] == [
        "<s>st123", "<s>st1", "<s>q1", "<s>q2", "<s>st1", "<s>st123",
    ]  # fmt: skip
    assert [example.truncated for example in examples] == [True, True, False, False, True, True]


@pytest.mark.parametrize("longest", [1, 0, -5])
def test_a_length_without_room_for_a_scored_token_is_refused(longest):
    with pytest.raises(ValueError, match=f"max_length is {longest}; a token and one before it need 2"):
        encoded("cat", characters(), max_length=longest)


def test_a_length_that_special_tokens_fill_is_refused():
    with pytest.raises(ValueError, match="max_length is 2; special tokens alone fill that"):
        encoded("one two", word_pieces(), max_length=2)


# --- BOS and EOS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brings", "add_bos", "expected"),
    [
        (False, None, ["c", "d"]), (True, None, ["<s>", "c", "d"]), (False, True, ["<s>", "c", "d"]),
        (True, True, ["<s>", "c", "d"]), (False, False, ["c", "d"]), (True, False, ["c", "d"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["cd", "<s>cd", "<s><s>cd"])
def test_there_is_one_bos_or_none(brings, add_bos, expected, text):
    tokenizer = characters(bos=brings)
    example = encoded(text, tokenizer, add_bos=add_bos)
    # A text that begins with BOS has said what it wants, unless it is told otherwise.
    if add_bos is None and text.startswith("<s>"):
        expected = ["<s>", "c", "d"]
    assert tokens(example, tokenizer) == expected
    assert scored(example, tokenizer) == (["c", "d"] if expected[0] == "<s>" else ["d"])
    assert example.doubled_bos == (text.count("<s>") + brings > 1)


def test_a_bos_that_begins_the_prompt_is_kept_when_the_prompt_is_cut():
    tokenizer = characters(bos=True)
    example = encoded({"prompt": "<s>qr", "completion": "123"}, tokenizer, max_length=3)
    assert tokens(example, tokenizer) == ["<s>", "1", "2"]
    example = encoded({"prompt": "<s>qrst", "completion": "12"}, tokenizer, max_length=4)
    assert tokens(example, tokenizer) == ["<s>", "t", "1", "2"]
    assert scored(example, tokenizer) == ["1", "2"]


def test_an_eos_that_is_asked_for_is_scored_and_is_the_first_to_go():
    tokenizer = characters()
    row = {"prompt": "q", "completion": "12"}
    assert scored(encoded(row, tokenizer, add_eos=True), tokenizer) == ["1", "2", "</s>"]
    assert scored(encoded(row, tokenizer, add_eos=True, max_length=4), tokenizer) == ["1", "2", "</s>"]
    cut = encoded(row, tokenizer, add_eos=True, max_length=3)
    assert (scored(cut, tokenizer), cut.truncated) == (["1", "2"], True)
    # The prompt goes before it.
    row = {"prompt": "qr", "completion": "12"}
    assert tokens(encoded(row, tokenizer, add_eos=True, max_length=4), tokenizer) == ["r", "1", "2", "</s>"]


def test_an_eos_that_the_tokenizer_adds_is_there_once_and_scored_only_when_asked_for():
    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    for add, expected in ((False, ["d"]), (True, ["d", "</s>"])):
        example = encoded("cd", tokenizer, add_eos=add)
        assert tokens(example, tokenizer) == ["c", "d", "</s>"]
        assert scored(example, tokenizer) == expected


def test_special_tokens_that_the_tokenizer_lacks_cannot_be_added():
    tokenizer = word_pieces()
    with pytest.raises(ValueError, match="the tokenizer has no BOS token; leave add_bos out"):
        encoded("one", tokenizer, add_bos=True)
    with pytest.raises(ValueError, match="the tokenizer has no EOS token; leave add_eos out"):
        encoded("one", tokenizer, add_eos=True)


# --- chat templates ----------------------------------------------------------------------------------------


def chatting(template=CHAT, **settings):
    """A tokenizer with a template."""
    return characters(chat_template=template, **settings)


def test_a_template_is_used_on_request_only():
    tokenizer = chatting(bos=True)
    row = {"prompt": "q?", "completion": "12"}
    assert "".join(tokens(encoded(row, tokenizer), tokenizer)) == "<s>q?12"
    example = encoded(row, tokenizer, chat_template=True)
    assert "".join(tokens(example, tokenizer)) == "<s><|user|>q?<|end|><|assistant|>12"
    assert tokens(example, tokenizer)[0] == "<s>"
    assert scored(example, tokenizer) == ["1", "2"]
    assert not example.doubled_bos


@pytest.mark.parametrize("text", ["hello", "user", "<|user|>", "  spaced ", "⌜text⌝", ""])
def test_of_a_text_in_a_template_the_text_is_scored(text):
    tokenizer = byte_pairs(bos=True)
    tokenizer.chat_template = CHAT
    example = encoded(text, tokenizer, chat_template=True)
    rendered = tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
    assert rendered == f"<s><|user|>{text.strip()}<|end|>"
    ids = [token for token, counts in zip(example.ids, example.scored, strict=True) if counts]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text.strip()


def test_the_template_is_scored_too_when_everything_is():
    tokenizer = chatting()
    example = encoded("cd", tokenizer, chat_template=True, score_span="all")
    assert "".join(scored(example, tokenizer)) == "<|user|>cd<|end|>"


def test_a_tokenizer_in_python_scores_the_same_of_a_template():
    slow, template = PythonCharacters(), CHAT.replace("{{ bos_token }}", "")
    slow.chat_template = template
    for row in ("bab", {"prompt": "ba", "completion": "bab"}):
        assert encoded(row, slow, chat_template=True) == encoded(row, chatting(template), chat_template=True)


@pytest.mark.parametrize(
    ("add_bos", "template", "expected"),
    [
        (None, CHAT, "<s><|user|>"), (None, CHAT.replace("{{ bos_token }}", ""), "<|user|>"),
        (True, CHAT.replace("{{ bos_token }}", ""), "<s><|user|>"), (True, CHAT, "<s><|user|>"),
        (False, CHAT, "<|user|>"), (None, "{{ bos_token }}" + CHAT, "<s><|user|>"),
    ],
)  # fmt: skip
def test_the_template_says_whether_there_is_a_bos_unless_told(add_bos, template, expected):
    tokenizer = chatting(template, bos=True)
    example = encoded("cd", tokenizer, chat_template=True, add_bos=add_bos)
    assert "".join(tokens(example, tokenizer)) == expected + "cd<|end|>"
    assert example.doubled_bos == (template.count("bos_token") == 2)
    assert scored(example, tokenizer) == ["c", "d"]


def test_when_a_chat_is_too_long_the_prompt_is_cut_and_its_bos_stays():
    tokenizer = chatting()
    example = encoded({"prompt": "q?", "completion": "12"}, tokenizer, chat_template=True, max_length=6)
    assert "".join(tokens(example, tokenizer)) == "<s>t|>12"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template; leave --chat-template out"),
        ("{{ raise_exception('no system') }}", "rows: the chat template refuses .*no system"),
        ("nothing", "chat template does not hold a user's message once"),
        (HOLDS + HOLDS, "chat template does not hold a user's message once"),
        ("{{ messages[0].content | upper }}", "chat template does not hold a user's message once"),
        ("{{ messages[0].content | replace('z', 'y') }}", "rows:2: the template changes this row's text"),
        ("{% if 'z' in messages[0].content %}{{ raise_exception('no z') }}{% endif %}" + HOLDS,
         "rows:2: the chat template refuses .*no z"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_hold_the_text_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        encode(task_of(["cat", "adze"]), chatting(template), max_length=None, chat_template=True)


# --- notes -------------------------------------------------------------------------------------------------


def test_what_was_cut_and_what_has_nothing_to_score_is_said():
    tokenizer = characters(bos=True)
    cut = {"prompt": "q", "choices": ["1", "234567"], "answer": 0}
    doubled = {"prompt": "<s>", "choices": ["1", "2"], "answer": 1}
    task = task_of([cut, doubled], ref="task.jsonl")
    assert encoding_notes(task, encode(task, tokenizer, max_length=5)) == (
        "task.jsonl: 1 of 2 rows longer than the longest sequence and cut, the first at task.jsonl:1",
        "task.jsonl: 1 of 2 rows with a second BOS, which was left out, the first at task.jsonl:2",
    )
    texts = task_of(["cat", "", ""], ref="task.jsonl")
    assert encoding_notes(texts, encode(texts, tokenizer, max_length=5), tokenizer) == (
        "task.jsonl: 2 of 3 rows without a token to score, the first at task.jsonl:2",
    )


def test_a_bos_that_is_missing_is_said_where_the_tokenizer_would_put_one():
    task = task_of(["cat", "<s>dog"], ref="task.jsonl")
    for brings, expected in ((True, 1), (False, 0)):
        tokenizer = characters(bos=brings)
        notes = encoding_notes(task, encode(task, tokenizer, max_length=None, add_bos=False), tokenizer)
        missing = [note for note in notes if "2 of 2 rows without the BOS that the tokenizer puts" in note]
        assert len(missing) == expected


def test_there_is_nothing_to_say_of_rows_that_fit():
    tokenizer = characters(bos=True)
    task = task_of(["cat"])
    assert encoding_notes(task, encode(task, tokenizer, max_length=8), tokenizer) == ()
