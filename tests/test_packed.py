"""PackedSequence through RNN: the metadata, and the order of rows, which is the caller's."""

import pytest
import torch
from pairs import assert_same, assert_same_run, pair, randn, run
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import torch_bptt

LENGTHS = [2, 5, 3, 5, 1]


def pack(lengths=LENGTHS, features=3, **options):
    return pack_padded_sequence(
        randn(max(lengths), len(lengths), features), lengths, enforce_sorted=False, **options
    )


def one_by_one(module, rows, hx):
    """(output of every row, h_n) with every row run alone, without a batch."""
    results = [module(row, hx[:, b]) for b, row in enumerate(rows)]
    return [output for output, _ in results], torch.stack([h_n for _, h_n in results], 1)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_are_those_run_alone(batch_first):
    ours, theirs = pair(3, 4, 2, bidirectional=True, batch_first=batch_first)
    input, hx = randn(5, 5, 3), randn(4, 5, 4)
    output, h_n = ours(pack(), hx)
    padded, lengths = pad_packed_sequence(output)
    assert lengths.tolist() == LENGTHS
    rows, expected = one_by_one(theirs, [input[:n, b] for b, n in enumerate(LENGTHS)], hx)
    assert_same("h_n", h_n, expected)
    for b, row in enumerate(rows):
        assert_same(f"row {b}", padded[: LENGTHS[b], b], row)
        assert padded[LENGTHS[b] :, b].eq(0).all()


@pytest.mark.parametrize("lengths", [[1], [4], [1, 1], [3, 3, 3], [4, 1]], ids=str)
def test_corner_cases(lengths):
    ours, theirs = pair(3, 4, bidirectional=True)
    input = pack(lengths)
    assert_same_run(run(ours, input), run(theirs, input))


def test_packed_without_indices():
    ours, theirs = pair(3, 4)
    input = pack_sequence([randn(5, 3), randn(2, 3)])
    got = run(ours, input)
    assert_same_run(got, run(theirs, input))
    assert got.output.sorted_indices is None


def test_packed_data_of_any_strides():
    ours, theirs = pair(3, 4, 2)
    input = pack()
    input = PackedSequence(input.data.T.contiguous().T, *input[1:])
    assert_same_run(run(ours, input, randn(2, 5, 4)), run(theirs, input, randn(2, 5, 4)))


def test_outputs_feed_the_next_module():
    ours, theirs = pair(3, 4)
    next_ours, next_theirs = pair(4, 6)
    got, expected = next_ours(ours(pack())[0]), next_theirs(theirs(pack())[0])
    assert_same("output", got[0].data, expected[0].data)
    assert_same("h_n", got[1], expected[1])


def test_functional_takes_packed_rows():
    ours, _ = pair(3, 4)
    hx = randn(1, 5, 4)
    expected = ours(pack(), hx)
    output, h_n = torch_bptt.functional.rnn(pack(), hx[0], *ours.parameters())
    assert_same("output", output.data, expected[0].data)
    assert_same("h_n", h_n, expected[1][0])


def test_reset_is_in_the_order_before_sorting():
    ours, theirs = pair(3, 4, bidirectional=True)
    reset = torch.zeros(5, 5, dtype=torch.bool)
    reset[2, 1] = True  # the row that sorting moves to the front
    reset[2, 0] = True  # past the end of a row, where it means nothing
    hx = randn(2, 5, 4)
    h_n = ours(pack(), hx, reset=reset)[1]
    rows = [randn(5, 5, 3)[:n, b] for b, n in enumerate(LENGTHS)]
    expected = one_by_one(theirs, rows, hx)[1].clone()
    expected[0, 1] = theirs(rows[1][2:])[1][0]
    expected[1, 1] = theirs(rows[1][:2])[1][1]
    assert_same("h_n", h_n, expected)
