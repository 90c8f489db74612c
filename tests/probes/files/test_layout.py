"""Taking a matrix out of a stored tensor and putting it back are inverse, whatever the layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probes.files.layout import Header, Matrix


def matrix_of(**fields):
    return Matrix(name="w:part", tensor="w", layer=0, component="q_proj", part="block", **fields)


@st.composite
def cases(draw):
    """The fields of a matrix of any layout that `Matrix` can say, and a stored tensor of the right shape."""
    rows, columns, *more = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    heads = draw(st.integers(1, 3))
    rows *= heads * draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    shape = (columns, rows) if transposed else (rows, columns, *more)
    experts = draw(st.integers(1, 3))
    expert = draw(st.none() | st.integers(0, experts - 1))
    own_axis = draw(st.booleans())
    if expert is not None:
        shape = (experts, *shape) if own_axis else (experts * shape[0], *shape[1:])
    start, stop = sorted(draw(st.lists(st.integers(0, rows // heads), min_size=2, max_size=2, unique=True)))
    undivided = draw(st.booleans())
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    fields = {
        "rows": rows if undivided else heads * (stop - start),
        "columns": columns if transposed else columns * torch.Size(more).numel(),
        "dtype": dtype,
        "expert": expert,
        "experts": experts if expert is not None and not own_axis else None,
        "transposed": transposed,
        "start": 0 if undivided else start,
        "stop": None if undivided else stop,
        "heads": 1 if undivided else heads,
    }
    stored = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    if draw(st.booleans()):  # strided, as a view of another tensor may be
        stored = stored.mT.contiguous().mT
    return fields, stored


@given(cases())
def test_a_matrix_has_the_shape_that_it_announces(case):
    fields, stored = case
    assert matrix_of(**fields).take(stored).shape == (fields["rows"], fields["columns"])


@given(cases())
def test_putting_back_what_was_taken_changes_nothing(case):
    fields, stored = case
    matrix = matrix_of(**fields)
    assert torch.equal(matrix.put(stored, matrix.take(stored)), stored)


@given(cases())
def test_what_is_put_is_what_is_taken_and_nothing_else_changes(case):
    fields, stored = case
    matrix, before = matrix_of(**fields), stored.clone()
    value = -1 - torch.arange(matrix.rows * matrix.columns).reshape(matrix.rows, matrix.columns).float()
    changed = matrix.put(stored, value)
    assert changed.dtype == stored.dtype
    assert changed.shape == stored.shape
    assert torch.equal(matrix.take(changed), value.to(stored.dtype))
    # All new values are negative and no old one is: exactly the matrix's entries are new.
    assert int((changed < 0).sum()) == matrix.rows * matrix.columns
    assert torch.equal(changed[changed >= 0], before[changed >= 0])
    assert torch.equal(stored, before), "the given tensor is left as it was"


def test_a_plain_and_a_transposed_matrix_are_taken_without_a_copy():
    stored = torch.arange(6.0).reshape(2, 3)
    plain = matrix_of(rows=2, columns=3, dtype=stored.dtype)
    assert plain.take(stored).data_ptr() == stored.data_ptr()
    turned = matrix_of(rows=3, columns=2, dtype=stored.dtype, transposed=True)
    assert turned.take(stored).data_ptr() == stored.data_ptr()
    assert torch.equal(turned.take(stored), torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_a_part_takes_its_rows_from_every_head():
    # Two heads of three rows: q, k, v, q, k, v.  k is rows 1 and 4.
    stored = torch.arange(6.0).reshape(6, 1)
    keys = matrix_of(rows=2, columns=1, dtype=stored.dtype, start=1, stop=2, heads=2)
    assert keys.take(stored).flatten().tolist() == [1.0, 4.0]


def test_a_matrix_of_another_shape_is_not_put():
    matrix = matrix_of(rows=2, columns=3, dtype=torch.float32)
    for value in (torch.zeros(3, 2), torch.zeros(1, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"w:part: is 2 x 3, and a tensor of shape .* cannot replace it"):
            matrix.put(torch.zeros(2, 3), value)


def test_a_header_counts_entries_and_bytes():
    header = Header("w", (3, 4), torch.bfloat16)
    assert (header.entries, header.bytes) == (12, 24)
    assert Header("scalar", (), torch.float32).bytes == 4
