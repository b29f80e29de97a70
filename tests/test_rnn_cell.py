"""torch_bptt.RNNCell against torch.nn.RNNCell."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from pairs import assert_same, examples, randn
from torch import nn

from torch_bptt import RNN, RNNCell


def pair(*args, **kwargs):
    """(torch_bptt.RNNCell, torch.nn.RNNCell) with the same arguments and parameters, in float64."""
    theirs = nn.RNNCell(*args, **kwargs).double()
    ours = RNNCell(*args, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@examples
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["tanh", "relu"]),
    st.sampled_from([None, 0, 1, 3]),
    st.booleans(),
)
def test_output_and_gradients_are_those_of_nn_rnn_cell(features, hidden, bias, f, rows, with_hx):
    ours, theirs = pair(features, hidden, bias, f)
    batch = () if rows is None else (rows,)
    results = []
    for cell in (ours, theirs):
        input = randn(*batch, features).requires_grad_()
        hx = randn(*batch, hidden, seed=1).requires_grad_() if with_hx else None
        output = cell(input, hx)
        leaves = [input, *cell.parameters(), *([hx] if with_hx else [])]
        gradients = torch.autograd.grad((output * randn(*batch, hidden, seed=2)).sum(), leaves)
        results.append((output, *gradients))
    for mine, other in zip(*results, strict=True):
        assert_same("output or gradient", mine, other)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid", "identity"])
def test_steps_of_a_cell_are_an_rnn(nonlinearity):
    rnn = RNN(3, 4, nonlinearity=nonlinearity, dtype=torch.float64)
    cell = RNNCell(3, 4, nonlinearity=nonlinearity, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in rnn.state_dict().items()})
    input, h = randn(5, 2, 3), randn(2, 4)
    output, h_n = rnn(input, h[None])
    for t in range(5):
        h = cell(input[t], h)
        assert_same(f"state at {t}", h, output[t])
    assert_same("h_n", h, h_n[0])


def test_sizes_of_zero():
    for features, hidden in ((0, 4), (3, 0)):
        ours, theirs = pair(features, hidden)
        assert_same("output", ours(randn(2, features)), theirs(randn(2, features)))


def test_same_seed_same_weights():
    torch.manual_seed(5)
    theirs, state = nn.RNNCell(3, 4), torch.get_rng_state()
    torch.manual_seed(5)
    ours = RNNCell(3, 4, True, "sigmoid")
    assert torch.equal(torch.get_rng_state(), state)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_as_a_module():
    ours = RNNCell(3, 4, False, "relu", "meta", torch.float64)
    assert (
        repr(ours)
        == repr(nn.RNNCell(3, 4, False, "relu"))
        == ("RNNCell(3, 4, bias=False, nonlinearity=relu)")
    )
    assert ours.bias_ih is None
    assert ours.bias_hh is None
    assert (ours.weight_ih.device.type, ours.weight_ih.dtype) == ("meta", torch.float64)
    assert ours(torch.ones(2, 3, dtype=torch.float64, device="meta")).shape == (2, 4)
    ours, _ = pair(3, 4)
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert_same("output of a copy", copied(randn(2, 3)), ours(randn(2, 3)))


def test_from_torch_and_to_torch_share_everything():
    _, theirs = pair(3, 4, nonlinearity="relu")
    ours = RNNCell.from_torch(theirs.eval())
    back = ours.to_torch()
    assert type(ours) is RNNCell
    assert type(back) is nn.RNNCell
    for cell in (ours, back):
        assert not cell.training
        assert all(a is b for a, b in zip(cell.parameters(), theirs.parameters(), strict=True))
        assert_same("output", cell(randn(2, 3)), theirs(randn(2, 3)))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_autocast(dtype, weight_dtype, expected):
    theirs = nn.RNNCell(3, 4, dtype=weight_dtype)
    ours = RNNCell.from_torch(theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, reference = ours(randn(2, 3).to(dtype)), theirs(randn(2, 3).to(dtype))
    assert got.dtype == reference.dtype == expected
    # Both round to bfloat16 at the inputs, at sums below 4 and at the result: 2^-8 of 4 each.
    torch.testing.assert_close(got, reference, rtol=0, atol=3 * 4 * 2**-8)
