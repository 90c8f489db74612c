"""What the miniatures of transformers models are made of: words, walks and rows."""

import json

import torch
from symbols import Claim, claims_table, make_tokenizer, walks, write_rows

from probes.text.encode import encode
from probes.text.rows import read_task


def test_every_word_is_its_token_and_nothing_is_put_around_a_text():
    tokenizer = make_tokenizer(["no", "yes", "a", "b"])
    assert tokenizer("a b yes no").input_ids == [2, 3, 1, 0]


def test_rows_are_read_as_they_were_meant(tmp_path):
    row = {"prompt": "a b", "choices": [" no", " yes"], "answer": 1}
    path = write_rows([row, row], tmp_path / "rows.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row, row]
    examples = encode(read_task(path), make_tokenizer(["no", "yes", "a", "b"]), max_length=None)
    assert [example.ids for example in examples[:2]] == [[2, 3, 0], [2, 3, 1]]
    assert all(example.scored == [False, False, True] for example in examples)


def test_a_walk_follows_its_own_chain():
    # In the first chain every symbol is followed by the next one, in the second by the one before.
    there = torch.eye(5).roll(1, dims=1)
    sequences = walks(torch.stack([there, there.T]), 9, torch.Generator().manual_seed(0))
    assert torch.equal(sequences[0, 1:], (sequences[0, :-1] + 1) % 5)
    assert torch.equal(sequences[1, 1:], (sequences[1, :-1] - 1) % 5)


def test_successors_are_as_frequent_as_the_chain_says():
    chances = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    sequences = walks(chances.expand(2000, 2, 2), 11, torch.Generator().manual_seed(0))
    last, now = sequences[:, :-1].flatten(), sequences[:, 1:].flatten()
    # Of over 10,000 draws each: the standard error is at most 0.005.
    assert abs(float(now[last == 0].float().mean()) - 0.1) < 0.015
    assert abs(float(now[last == 1].float().mean()) - 0.5) < 0.025


def test_a_claim_that_fails_is_told_apart():
    table = claims_table([Claim(0, "this", True, "1"), Claim(1, "that", False, "2")])
    assert [list(column.cells) for column in table.columns][-1] == ["yes", "NO"]
