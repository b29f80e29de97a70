"""lengths= and reset=, in every combination: each row, and in it each segment, run alone by nn.RNN.

``alone`` is the definition of both: it knows no packing and no mask, only torch.nn.RNN on one
sequence without a batch.
"""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from pairs import assert_same, assert_same_run, examples, networks, pair, randn, run
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_bptt


def segments(length, starts):
    """[(first, end), ...]: the steps below length, cut before every step in starts."""
    cuts = sorted({0, length, *(t for t in starts if t < length)})
    return list(itertools.pairwise(cuts))


def alone(module, lengths=None, reset=None):
    """module, a torch.nn.RNN, as a function of (input, hx) with the given lengths and reset.

    A segment starts from zero. Only hx reaches into it: in the forward directions into the first
    one, unless reset at step 0, in the reverse directions into the last one.
    """

    def call(input, hx):
        input = input.transpose(0, 1) if module.batch_first else input
        steps, rows, _ = input.shape
        directions = 2 if module.bidirectional else 1
        states, hidden = module.num_layers * directions, module.hidden_size
        hx = input.new_zeros(states, rows, hidden) if hx is None else hx
        upward = torch.arange(states)[:, None] % directions == 0
        outputs, finals = [], []
        for b in range(rows):
            length = steps if lengths is None else lengths[b]
            starts = [] if reset is None else reset[:, b].nonzero().flatten().tolist()
            pieces, h_n = [], hx[:, b]
            for first, end in segments(length, starts):
                enters = upward & (first == 0 and 0 not in starts) | ~upward & (end == length)
                output, last = module(input[first:end, b], hx[:, b] * enters)
                pieces.append(output)
                leaves = upward & (end == length) | ~upward & (first == 0)
                h_n = torch.where(leaves, last, h_n)
            pieces.append(input.new_zeros(steps - length, directions * hidden))
            outputs.append(torch.cat(pieces))
            finals.append(h_n)
        output = torch.stack(outputs, 0 if module.batch_first else 1)
        return output, torch.stack(finals, 1)

    call.named_parameters = module.named_parameters
    return call


@st.composite
def rows(draw):
    """(lengths, reset (T, B), with hx?): each may be None."""
    steps, count = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    lengths = reset = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, steps), min_size=count, max_size=count))
    if lengths is None or draw(st.booleans()):
        flags = st.lists(st.booleans(), min_size=count, max_size=count)
        reset = torch.tensor(draw(st.lists(flags, min_size=steps, max_size=steps)))
    return steps, count, lengths, reset, draw(st.booleans())


@examples
@given(networks, rows())
def test_rows_and_segments_are_those_run_alone(network, drawn):
    steps, count, lengths, reset, with_hx = drawn
    ours, theirs = pair(**network)
    input = randn(steps, count, ours.input_size)
    input = input.transpose(0, 1) if ours.batch_first else input
    states = ours.num_layers * (2 if ours.bidirectional else 1)
    hx = randn(states, count, ours.hidden_size, seed=1) if with_hx else None
    given_reset = reset.T if reset is not None and ours.batch_first else reset
    got = run(ours, input, hx, lengths=lengths, reset=given_reset)
    if lengths is not None and max(lengths) == 0:
        assert got.output.eq(0).all()
        assert_same("h_n", got.h_n, torch.zeros_like(got.h_n) if hx is None else hx)
        for name, gradient in got.gradients.items():
            assert name == "grad of hx" or gradient.eq(0).all()
        return
    assert_same_run(got, run(alone(theirs, lengths, reset), input, hx))


def test_lengths_is_packing_and_padding_with_the_same_dropout():
    ours, theirs = pair(3, 4, 3, dropout=0.5, bidirectional=True)
    input, hx, lengths = randn(5, 4, 3), randn(6, 4, 4), [2, 5, 1, 5]

    def packing(input, hx):
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, h_n = theirs(packed, hx)
        return pad_packed_sequence(output)[0], h_n

    packing.named_parameters = theirs.named_parameters
    assert_same_run(run(ours, input, hx, lengths=lengths), run(packing, input, hx))


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"truncate": 2}, {"clip_grad_h": 0.3}], ids=str)
def test_with_the_other_options_a_row_is_the_row_alone(alpha, options):
    lengths = [3, 0, 5, 4]
    ours = torch_bptt.RNN(3, 4, 2, bidirectional=True, dtype=torch.float64, alpha=alpha, **options)
    input, hx = randn(5, 4, 3), randn(4, 4, 4)
    assert_same_run(run(ours, input, hx, lengths=lengths), run(alone(ours, lengths), input, hx))


def test_truncate_counts_steps_of_the_row_not_of_the_segment():
    ours = torch_bptt.RNN(3, 4, dtype=torch.float64, truncate=3)
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[2] = True
    input = randn(6, 1, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(input, reset=reset)[1].sum(), input)
    reaches = gradient.flatten(1).ne(0).any(1)
    assert reaches.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, lambda n: torch.tensor(n).int()])
def test_kinds_of_lengths(make):
    ours, _ = pair(3, 4)
    expected = ours(randn(5, 3, 3), lengths=[2, 5, 0])
    got = ours(randn(5, 3, 3), lengths=make([2, 5, 0]))
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_without_a_batch(batch_first):
    ours, theirs = pair(3, 4, 2, bidirectional=True, batch_first=batch_first)
    input, hx = randn(5, 3), randn(4, 4)
    reset = torch.tensor([False, False, True, False, False])
    output, h_n = ours(input, hx, lengths=4, reset=reset)
    batch = input[None] if batch_first else input[:, None]
    expected = alone(theirs, [4], reset[:, None])(batch, hx[:, None])
    assert_same("output", output, expected[0].squeeze(0 if batch_first else 1))
    assert_same("h_n", h_n, expected[1][:, 0])
    assert torch.equal(ours(input, hx, lengths=torch.tensor(4), reset=reset)[0], output)


def test_no_rows():
    ours, _ = pair(3, 4, 2)
    reset = torch.zeros(5, 0, dtype=torch.bool)
    got = run(ours, randn(5, 0, 3), randn(2, 0, 4), lengths=[], reset=reset)
    assert got.output.shape == (5, 0, 4)
    assert got.h_n.shape == (2, 0, 4)


def test_results_share_no_memory_with_hx():
    ours, _ = pair(3, 4)
    hx = randn(1, 2, 4)
    with torch.no_grad():
        ours(randn(5, 2, 3), hx, lengths=[0, 0])[1].zero_()
        ours(randn(5, 2, 3), hx, lengths=[0, 3])[1].zero_()
    assert torch.equal(hx, randn(1, 2, 4))


def test_what_lies_beyond_a_row_is_never_read():
    ours, _ = pair(3, 4, 2, bidirectional=True)
    input = randn(5, 3, 3)
    expected = ours(input, lengths=[2, 5, 0])
    input[2:, 0], input[:, 2] = torch.nan, torch.inf
    got = run(ours, input, lengths=[2, 5, 0])
    assert torch.equal(got.output, expected[0])
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


def test_reset_stops_what_is_not_finite():
    ours, _ = pair(3, 4, bidirectional=True)
    input = randn(6, 1, 3)
    reset = torch.zeros(6, 1, dtype=torch.bool)
    reset[3] = True
    expected = ours(input, reset=reset)[0]
    input[1] = torch.nan
    output = ours(input, reset=reset)[0]
    assert torch.equal(output[3:], expected[3:])
    assert output[:3].isnan().any()


def test_functional_in_reverse():
    ours, theirs = pair(3, 4, bidirectional=True)
    lengths = [3, 0, 5, 4]
    reset = torch.zeros(5, 4, dtype=torch.bool)
    reset[0, 0] = reset[2, 2] = reset[4, 3] = True  # at a start, inside, and past the end of a row
    input, hx = randn(5, 4, 3), randn(2, 4, 4)
    output, h_n = alone(theirs, lengths, reset)(input, hx)
    weights = [getattr(ours, f"{n}_l0_reverse") for n in ("weight_ih", "weight_hh", "bias_ih")]
    got = torch_bptt.functional.rnn(
        input,
        hx[1],
        *weights,
        ours.bias_hh_l0_reverse,
        reverse=True,
        lengths=torch.tensor(lengths),
        reset=reset,
    )
    assert_same("output", got[0], output[..., 4:])
    assert_same("h_n", got[1], h_n[1])
