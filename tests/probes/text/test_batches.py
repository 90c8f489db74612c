"""Batches hold every example once, and what a model says of one does not depend on its neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.text.batches import EMPTY, EMPTY_SHARE, Batch, Example, batches, halving, pad, windows

SIDES = pytest.mark.parametrize("side", ["left", "right"])
PAD = 49


def example(ids, scored=None):
    """A sequence of which all but the first is scored.

    Not made inside a strategy: the type checks draw random numbers, which these must not.
    """
    return Example(ids=list(ids), scored=scored or [False, *[True] * (len(ids) - 1)], row=0)


IDS = st.lists(st.lists(st.integers(0, 48), min_size=1, max_size=12), min_size=1, max_size=20)


def unpadded(batch):
    """Index, ids, scored and positions of each row without its padding."""
    for row, index in enumerate(batch.indices.tolist()):
        here = batch.attention_mask[row].bool()
        yield index, *(values[row][here].tolist() for values in (batch.ids, batch.scored, batch.position_ids))


@SIDES
@given(ids=IDS, tokens=st.integers(1, 60))
def test_every_example_is_in_one_batch_as_it_was(side, ids, tokens):
    examples = [example(sequence) for sequence in ids]
    rows_by_index = {}
    for batch in batches(examples, tokens=tokens, pad_id=PAD, side=side):
        for index, kept, scored, positions in unpadded(batch):
            assert index not in rows_by_index
            rows_by_index[index] = (kept, scored)
            assert positions == list(range(len(kept)))
        padding = batch.attention_mask == 0
        assert (batch.ids[padding] == PAD).all()
        assert not batch.scored[padding].any()
        assert not batch.position_ids[padding].any()
    assert rows_by_index == {index: (row.ids, row.scored) for index, row in enumerate(examples)}


@given(IDS, st.integers(1, 60))
def test_batches_hold_no_more_tokens_than_asked_for_and_the_longest_come_first(ids, tokens):
    packed = list(batches([example(sequence) for sequence in ids], tokens=tokens, pad_id=PAD))
    assert all(batch.ids.numel() <= tokens or len(batch.indices) == 1 for batch in packed)
    lengths = [length for batch in packed for length in batch.attention_mask.sum(dim=1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    # No padding beyond the longest row of the batch.
    assert all(batch.attention_mask.any(dim=0).all() for batch in packed)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60))
def test_little_of_a_batch_is_padding(lengths):
    for batch in batches([example([1] * length) for length in lengths], pad_id=PAD):
        empty = batch.ids.numel() - int(batch.attention_mask.sum())
        assert empty <= max(EMPTY, EMPTY_SHARE * batch.ids.numel())


def test_rows_are_padded_on_the_side_asked_for():
    examples = [example([1, 2]), example([3, 4, 5])]
    (right,), (left,) = (list(batches(examples, pad_id=PAD, side=side)) for side in ("right", "left"))
    assert right.indices.tolist() == left.indices.tolist() == [1, 0]
    assert right.ids.tolist() == [[3, 4, 5], [1, 2, PAD]]
    assert left.ids.tolist() == [[3, 4, 5], [PAD, 1, 2]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]


def test_examples_without_tokens_are_in_no_batch():
    (batch,) = batches([example([1]), Example(ids=[], scored=[], row=1)], pad_id=PAD)
    assert batch.indices.tolist() == [0]
    assert list(batches([], pad_id=PAD)) == []


@SIDES
@given(ids=IDS.filter(lambda ids: len(ids) > 1))
def test_halves_hold_what_the_whole_did_without_more_padding_than_they_need(side, ids):
    ids.sort(key=len, reverse=True)
    batch = pad([example(sequence) for sequence in ids], range(len(ids)), len(ids[0]), PAD, side)
    halves = batch.split()
    assert [row for half in halves for row in unpadded(half)] == list(unpadded(batch))
    assert abs(len(halves[0].indices) - len(halves[1].indices)) <= 1
    assert all(half.attention_mask.any(dim=0).all() for half in halves)


def test_a_batch_of_one_row_cannot_be_split():
    (batch,) = batches([example([1, 2])], pad_id=PAD)
    with pytest.raises(ValueError, match="a batch of one row cannot be split"):
        batch.split()


def test_a_batch_moves_as_a_whole():
    (batch,) = batches([example([1, 2])], pad_id=PAD)
    assert {value.device.type for value in vars(batch.to("meta")).values()} == {"meta"}


# --- what a model says -------------------------------------------------------------------------------------


def log_likelihoods(model, examples, **settings):
    """Of each example the log-likelihoods of its scored tokens."""
    logs = [torch.empty(0)] * len(examples)
    for batch in batches(examples, **{"pad_id": PAD, **settings}):
        with torch.no_grad():
            logits = model(
                input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            ).logits
        here = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
        for row, index in enumerate(batch.indices.tolist()):
            logs[index] = here[row][batch.scored[row, 1:]]
    return logs


def test_what_a_model_says_of_an_example_depends_on_nothing_but_the_example(llama):
    model = llama()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in [1, 2, 3, 5, 8, 8, 13, 21, 34, 40]:
        ids = torch.randint(48, (length,), generator=generator).tolist()
        scored = (torch.rand(length, generator=generator) < 0.7).tolist()
        examples.append(example(ids, [False, *scored[1:]]))
    alone = []
    for sample in examples:
        with torch.no_grad():
            steps = model(input_ids=torch.tensor([sample.ids])).logits[0].log_softmax(-1)
        alone.append(
            torch.tensor([steps[t - 1, sample.ids[t]] for t in range(len(sample.ids)) if sample.scored[t]])
        )
    order = torch.randperm(len(examples), generator=generator).tolist()
    for settings in (
        {"tokens": 1}, {"tokens": 50}, {"tokens": 10_000}, {"tokens": 10_000, "side": "left"},
        {"tokens": 90, "side": "left", "pad_id": 0}, {"tokens": 10_000, "pad_id": 7},
    ):  # fmt: skip
        batched = log_likelihoods(model, examples, **settings)
        shuffled = log_likelihoods(model, [examples[i] for i in order], **settings)
        for i, expected in enumerate(alone):
            # Likelihoods are about -4 nats, and 1e-5 some 20 units in the last place of these.
            torch.testing.assert_close(batched[i], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(shuffled[order.index(i)], expected, rtol=0, atol=1e-5)


# --- memory ------------------------------------------------------------------------------------------------


def short_of_memory(limit, tried, error=None):
    """Sums of ids, for batches of fewer than `limit` entries; what was tried is appended by its size."""

    def run(batch):
        tried.append(tuple(batch.ids.shape))
        if batch.ids.numel() >= limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return (batch.ids * batch.attention_mask).sum(dim=1)

    return run


@given(IDS, st.integers(1, 200), st.integers(13, 300))
def test_a_batch_too_large_for_memory_is_halved_until_it_fits(ids, tokens, limit):
    examples, tried = [example(sequence) for sequence in ids], []
    totals = torch.full((len(examples),), -1)
    for batch, sums in halving(short_of_memory(limit, tried), batches(examples, tokens=tokens, pad_id=PAD)):
        assert batch.ids.numel() < limit
        totals[batch.indices] = sums
    assert totals.tolist() == [sum(sequence.ids) for sequence in examples]


def test_what_did_not_fit_once_is_not_tried_again():
    # 8 rows of 10 by fours: the first four fail, their halves fit; then the other four are halved unasked.
    examples = [example(range(10))] * 8
    tried = []
    parts = list(halving(short_of_memory(30, tried), batches(examples, tokens=40, pad_id=PAD)))
    assert tried == [(4, 10), (2, 10), (2, 10), (2, 10), (2, 10)]
    assert [batch.indices.tolist() for batch, _ in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_memory_runs_out_in_several_words(error):
    run = short_of_memory(5, [], error)
    assert len(list(halving(run, batches([example([1, 2])] * 4, pad_id=PAD)))) == 2


def test_memory_that_really_cannot_be_had_is_recognised():
    def run(batch):
        # As many bytes as no machine has, but for a single row.
        return torch.empty(batch.ids.numel() if len(batch.indices) == 1 else 2**60, dtype=torch.int8)

    assert [len(value) for _, value in halving(run, batches([example([1, 2])] * 3, pad_id=PAD))] == [2, 2, 2]


def test_one_row_that_does_not_fit_is_said_to_be_too_long():
    run = short_of_memory(5, [])
    with pytest.raises(ValueError, match="one row of 6 tokens does not fit into memory; lower max_length"):
        list(halving(run, batches([example(range(6)), example([1])], pad_id=PAD)))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def run(batch):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(halving(run, batches([example([1, 2])] * 2, pad_id=PAD)))


def test_a_result_is_let_go_before_the_next_batch_runs():
    import weakref

    class Held:
        """What a weak reference can be had to."""

    references = []

    def run(batch: Batch):
        assert all(reference() is None for reference in references)
        held = Held()
        references.append(weakref.ref(held))
        return held

    for _, held in halving(run, batches([example([1, 2])] * 3, tokens=2, pad_id=PAD)):
        assert isinstance(held, Held)
        del held, _
    assert len(references) == 3


# --- windows ---


def sequence(size, *, head=0, scored=None):
    ids = list(range(100, 100 + size))
    return Example(ids=ids, scored=scored or [False, *[True] * (size - 1)], row=3, choice=1, head=head)


@given(st.data(), st.integers(1, 60), st.integers(2, 20), st.integers(0, 2))
def test_windows_score_each_token_once_and_behind_as_many_as_any_window_has_before_it(
    data, size, longest, head
):
    head = min(head, size, longest - 1)
    flags = [False, *data.draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))]
    flags[:head] = [False] * head
    full = sequence(size, head=head, scored=flags)
    parts = windows(full, longest)
    assert all(len(window.ids) <= longest and window.scored[:1] == [False] for window in parts)
    assert all((window.row, window.choice, window.ids[:head]) == (3, 1, full.ids[:head]) for window in parts)
    scored_at = [
        (token, index)
        for window in parts
        for index, (token, counts) in enumerate(zip(window.ids, window.scored, strict=True))
        if counts
    ]
    assert [token for token, _ in scored_at] == [
        token for token, counts in zip(full.ids, flags, strict=True) if counts
    ]
    for token, index in scored_at:
        assert index == max(window.ids.index(token) for window in parts if token in window.ids)


def test_windows_begin_half_of_their_length_apart_behind_the_special_tokens():
    parts = windows(sequence(12, head=1), 6)
    # 11 tokens behind the BOS, 5 to a window, which begin 3 apart: 101–105, 104–108, 107–111.
    assert [window.ids for window in parts] == [
        [100, *range(101, 106)], [100, *range(104, 109)], [100, *range(107, 112)],
    ]  # fmt: skip
    assert [window.scored for window in parts] == [
        [False, *[True] * 5], [*[False] * 3, *[True] * 3], [*[False] * 3, *[True] * 3],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 6])
def test_a_sequence_that_is_short_enough_stays_as_it_is(size):
    short = Example(ids=[1] * size, scored=[False] * size, row=0)
    assert windows(short, 6) == [short]


@pytest.mark.parametrize(("longest", "head"), [(1, 0), (1, 1), (3, 3)])
def test_windows_that_special_tokens_fill_are_refused(longest, head):
    with pytest.raises(ValueError, match=f"windows of {longest} tokens leave no room for a scored token"):
        windows(sequence(9, head=head), longest)
