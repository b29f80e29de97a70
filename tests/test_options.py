"""What RNN has beyond torch.nn.RNN, alone and combined, against a loop written from the definition.

``Definition`` runs one row at a time, one step at a time, on plain tensor operations. It draws its
random numbers in the order of RNN, so that with the same seed both see the same masks and noise.
"""

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from pairs import assert_same, assert_same_run, examples, randn, run
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import torch_bptt
from torch_bptt import RNN, functional

FUNCTIONS = {
    "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda z: z,
}  # fmt: skip


class Definition:
    """An RNN's parameters and options, run by loops."""

    def __init__(self, rnn):
        self.rnn = rnn
        self.named_parameters = rnn.named_parameters

    def __call__(self, input, hx=None, lengths=None, reset=None):
        rnn = self.rnn
        steps, rows, _ = input.shape
        lengths = [steps] * rows if lengths is None else lengths
        keep = torch.ones(steps + 1, rows, dtype=torch.bool)
        if reset is not None:
            keep[:steps] = ~reset
        count = len(rnn._all_weights)
        p = rnn.recurrent_dropout if rnn.training else 0
        masks = [F.dropout(input.new_ones(rows, rnn.hidden_size), p) for _ in range(count)]
        x, finals = input, []
        for names in rnn._all_weights:
            way = len(finals) % (1 + rnn.bidirectional)
            noise = 0 * x.new_ones(steps, rows, rnn.hidden_size)
            if rnn.noise and rnn.training:
                noise = rnn.noise * torch.randn(noise.shape, dtype=x.dtype)
            start = torch.zeros(rnn.hidden_size, dtype=x.dtype)
            start = rnn.h0[len(finals)] if rnn.learn_h0 else start
            first = [start] * rows if hx is None else hx[len(finals)]
            outputs = [
                self.row(
                    len(finals), names, x[:, b], first[b], start, lengths[b], keep[:, b],
                    masks[len(finals)][b], noise[:, b], way,
                )
                for b in range(rows)
            ]  # fmt: skip
            finals.append(torch.stack([h for _, h in outputs]))
            states = torch.stack([states for states, _ in outputs], 1)
            other = states if way == 0 else torch.cat([other, states], -1)  # noqa: F821
            if way == rnn.bidirectional:
                last = len(finals) == count
                x = other if last or not rnn.training else F.dropout(other, rnn.dropout)
        return x, torch.stack(finals)

    def row(self, index, names, x, h, start, length, keep, mask, noise, reverse):
        rnn = self.rnn
        w_ih, w_hh, *biases = (getattr(rnn, name) for name in names)
        alpha = rnn.alpha
        if isinstance(alpha, torch.Tensor) and alpha.dim() == 2:
            alpha = alpha[index]
        states = [torch.zeros_like(h)] * len(x)
        order = range(length)
        for s, t in enumerate(reversed(order) if reverse else order):
            if rnn.truncate and s and s % rnn.truncate == 0:
                h = h.detach()
            restarts = not keep[t] if not reverse else s > 0 and not keep[t + 1]
            h = start if restarts else h
            z = w_ih @ x[t] + w_hh @ (mask * h) + sum(biases) + noise[t]
            h = (1 - alpha) * h + alpha * FUNCTIONS[rnn.nonlinearity](z)
            states[t] = h
        return torch.stack(states), h


def make_alpha(kind, count, hidden):
    values = torch.linspace(0.15, 0.9, count * hidden, dtype=torch.float64).view(count, hidden)
    return {
        "one": 1.0,
        "number": 0.3,
        "buffer": values[0],
        "units": nn.Parameter(values[0].clone()),
        "each": nn.Parameter(values),
        "scalar": nn.Parameter(torch.tensor(0.4, dtype=torch.float64)),
    }[kind]


@st.composite
def networks(draw):
    layers, both = draw(st.integers(1, 2)), draw(st.booleans())
    hidden = draw(st.integers(1, 4))
    kinds = ["one", "number", "buffer", "units", "each", "scalar"]
    alpha = make_alpha(draw(st.sampled_from(kinds)), layers * (1 + both), hidden)
    checkpoint = [None] if layers > 1 and both else [None, 1, 2, True]
    rnn = RNN(
        draw(st.integers(1, 3)), hidden, layers, draw(st.sampled_from(list(FUNCTIONS))),
        bidirectional=both, dtype=torch.float64, alpha=alpha, learn_h0=draw(st.booleans()),
        truncate=draw(st.sampled_from([None, 1, 2])),
        checkpoint=draw(st.sampled_from(checkpoint)),
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 3)))
    for parameter in rnn.parameters():
        if parameter is not rnn.alpha:
            nn.init.uniform_(parameter, -0.6, 0.6)
    return rnn


@examples
@given(networks(), st.integers(1, 6), st.integers(1, 3), st.data())
def test_every_option_with_every_other(rnn, steps, rows, data):
    input = randn(steps, rows, rnn.input_size)
    hx = randn(len(rnn._all_weights), rows, rnn.hidden_size, seed=1)
    hx = data.draw(st.sampled_from([None, hx]))
    lengths = data.draw(st.none() | st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
    reset = randn(steps, rows) < -0.5
    reset = data.draw(st.sampled_from([None, reset]))
    uneven = (
        lengths is not None and len(set(lengths)) > 1 and 0 < (rnn.truncate or 0) < max(lengths)
    )
    if uneven and rnn.checkpoint and rnn.bidirectional:
        with pytest.raises(NotImplementedError, match=r"checkpoint must be None for truncate"):
            rnn(input, hx, lengths=lengths, reset=reset)
        return
    got = run(rnn, input, hx, lengths=lengths, reset=reset)
    expected = run(Definition(rnn), input, hx, lengths=lengths, reset=reset)
    assert_same_run(got, expected)


@examples
@given(
    networks(), st.integers(1, 6), st.integers(1, 3), st.booleans(),
    st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_random_options_draw_what_they_say(rnn, steps, rows, training, p, noise, dropout):
    rnn.recurrent_dropout, rnn.noise, rnn.dropout, rnn.checkpoint = p, noise, dropout, None
    rnn.train(training)
    input = randn(steps, rows, rnn.input_size)
    assert_same_run(run(rnn, input, seed=7), run(Definition(rnn), input, seed=7))


# ---- alpha


def test_a_tensor_alpha_is_a_buffer_and_a_parameter_is_learned():
    values = torch.tensor([0.1, 0.5, 1.0])
    fixed, learned = RNN(2, 3, alpha=values), RNN(2, 3, alpha=nn.Parameter(values.clone()))
    assert "alpha" in dict(fixed.named_buffers())
    assert "alpha" in dict(learned.named_parameters())
    for rnn in (fixed, learned):
        assert "alpha" in rnn.state_dict()
        assert repr(rnn) == "RNN(2, 3, alpha=tensor(3,))"
        copied = copy.deepcopy(rnn)
        copied.load_state_dict(rnn.state_dict())
        assert torch.equal(copied.alpha, values)
        assert copied.double().alpha.dtype == torch.float64
    assert "alpha" not in RNN(2, 3, alpha=0.5).state_dict()


def test_units_of_their_own_pace_equal_networks_of_one_unit():
    """Without recurrence between them, units with alpha_j are networks with that number."""
    alpha = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    rnn = RNN(2, 3, alpha=alpha, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.diag(rnn.weight_hh_l0.diagonal()))
    input = randn(9, 4, 2)
    for j, own in enumerate(alpha.tolist()):
        weights = (
            rnn.weight_ih_l0[j : j + 1], rnn.weight_hh_l0[j : j + 1, j : j + 1],
            rnn.bias_ih_l0[j : j + 1], rnn.bias_hh_l0[j : j + 1],
        )  # fmt: skip
        output, _ = functional.rnn(input, None, *weights, alpha=own)
        assert_same(f"unit {j}", rnn(input)[0][..., j : j + 1], output)


def test_a_parametrized_alpha_stays_within_bounds_and_learns():
    """The recipe of docs/leaky-units.md."""
    rnn = RNN(2, 5, alpha=nn.Parameter(torch.full((5,), 0.5)))
    parametrize.register_parametrization(rnn, "alpha", _Sigmoid())
    assert torch.allclose(rnn.alpha, torch.full((5,), 0.5))
    optimizer = torch.optim.SGD(rnn.parameters(), 1e3)
    loss = rnn(torch.ones(6, 2, 2))[0].square().sum()
    loss.backward()
    optimizer.step()
    assert not torch.allclose(rnn.alpha, torch.full((5,), 0.5))
    assert ((rnn.alpha >= 0) & (rnn.alpha <= 1)).all()
    again = copy.deepcopy(rnn)
    assert torch.equal(again(torch.ones(6, 2, 2))[0], rnn(torch.ones(6, 2, 2))[0])


class _Sigmoid(nn.Module):
    def forward(self, logit):
        return torch.sigmoid(logit)

    def right_inverse(self, alpha):
        return torch.logit(alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_alpha_and_its_gradient_in_every_dtype(dtype):
    """The gradient is summed in float32, and rounded once to the parameter's dtype."""
    alpha = torch.tensor([0.25, 0.5, 0.75, 0.125])
    rnn = RNN(3, 4, alpha=nn.Parameter(alpha.clone())).to(dtype)
    exact = copy.deepcopy(rnn).double()
    input = randn(7, 5, 3).to(dtype)
    (got,) = torch.autograd.grad(rnn(input)[0].sum(), rnn.alpha)
    (expected,) = torch.autograd.grad(exact(input.double())[0].sum(), exact.alpha)
    assert got.dtype == dtype
    # f(z) and h are rounded 7 * 5 times in a chain that does not amplify; the terms are below 2.
    limit = 70 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)


def test_autocast_leaves_alpha_alone():
    rnn = RNN(3, 4, alpha=nn.Parameter(torch.full((4,), 0.3)), learn_h0=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        output, _ = rnn(torch.randn(6, 2, 3), reset=torch.ones(6, 2, dtype=torch.bool))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert rnn.alpha.grad.dtype == torch.float32
    assert rnn.h0.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        (torch.tensor([0.5, 0.5]), ValueError, r"alpha must have the shape .*\(3,\).* got \(2,\)"),
        (torch.ones(2, 3), ValueError, r"alpha must have the shape .*\(1, 3\), got \(2, 3\)"),
        (torch.tensor([1, 1, 1]), TypeError, "alpha must be a floating tensor, got torch.int64"),
        (torch.tensor([0.5, 0.0, 1.0]), ValueError, r"alpha must lie in \(0, 1\], got 0.0"),
        (torch.tensor([0.5, 1.5, 1.0]), ValueError, r"alpha must lie in \(0, 1\], got 1.5"),
        (torch.tensor(float("nan")), ValueError, r"alpha must lie in \(0, 1\], got nan"),
    ],
    ids=["units", "layers", "integers", "zero", "above one", "nan"],
)
def test_an_alpha_that_makes_no_sense(alpha, error, words):
    with pytest.raises(error, match=words):
        RNN(2, 3, alpha=alpha)


def test_functional_takes_the_options():
    rnn = RNN(2, 3, alpha=nn.Parameter(torch.tensor([0.2, 0.4, 0.6])), learn_h0=True).double()
    nn.init.normal_(rnn.h0)
    input = randn(6, 4, 2)
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[2, 1] = reset[4, :] = True
    expected = rnn(input, reset=reset)[0]
    output, _ = functional.rnn(
        input, rnn.h0.expand(4, 3), *rnn._flat_weights, alpha=rnn.alpha, reset=reset,
        restart=rnn.h0[0],
    )  # fmt: skip
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match=r"restart must have the shape \(3,\), got \(1, 3\)"):
        functional.rnn(input, None, *rnn._flat_weights, restart=rnn.h0)
    with pytest.raises(RuntimeError, match=r"restart must be as input, expected torch\.float64"):
        functional.rnn(input, None, *rnn._flat_weights, restart=rnn.h0[0].float())
    with pytest.raises(TypeError, match="restart must be None or a tensor, got int"):
        functional.rnn(input, None, *rnn._flat_weights, restart=0)


# ---- learn_h0


def test_h0_starts_at_zero_and_draws_nothing():
    torch.manual_seed(0)
    plain, state = RNN(2, 3, 2, bidirectional=True), torch.get_rng_state()
    torch.manual_seed(0)
    ours = RNN(2, 3, 2, bidirectional=True, learn_h0=True, alpha=nn.Parameter(torch.ones(3) / 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert ours.h0.shape == (4, 3)
    assert not ours.h0.any()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, getattr(ours, name)), name
    nn.init.ones_(ours.h0)
    ours.reset_parameters()
    assert not ours.h0.any()
    assert torch.equal(ours.alpha, torch.ones(3) / 2)


def test_a_given_hx_wins_but_resets_go_to_h0():
    rnn = RNN(2, 3, learn_h0=True, dtype=torch.float64)
    nn.init.normal_(rnn.h0)
    input, hx = randn(5, 2, 2), randn(1, 2, 3, seed=1)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[3] = True
    output, _ = rnn(input, hx, reset=reset)
    assert torch.equal(output[:3], rnn(input[:3], hx)[0])
    assert torch.equal(output[3:], rnn(input[3:])[0])


@pytest.mark.parametrize("layout", ["batch", "batch_first", "one", "packed", "lengths"])
def test_h0_in_every_layout(layout):
    rnn = RNN(2, 3, 2, learn_h0=True, batch_first=layout == "batch_first", dtype=torch.float64)
    nn.init.normal_(rnn.h0)
    input, lengths = randn(5, 4, 2), torch.tensor([5, 3, 5, 1], device="cpu")
    expected = (
        rnn(randn(5, 4, 2), rnn.h0.unsqueeze(1).expand(2, 4, 3).clone())
        if (layout != "batch_first")
        else None
    )
    if layout == "batch":
        got, want = rnn(input), expected
    elif layout == "batch_first":
        got = rnn(input)
        want = rnn(input, rnn.h0.unsqueeze(1).expand(2, 5, 3).clone())
    elif layout == "one":
        got = rnn(input[:, 0])
        want = rnn(input[:, 0], rnn.h0.clone())
    elif layout == "packed":
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        got = rnn(packed)[1:]
        want = rnn(packed, rnn.h0.unsqueeze(1).expand(2, 4, 3).clone())[1:]
    else:
        got = rnn(input, lengths=lengths)
        want = rnn(input, rnn.h0.unsqueeze(1).expand(2, 4, 3).clone(), lengths=lengths)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_without_rows_h0_gets_a_gradient_of_zero():
    rnn = RNN(2, 3, learn_h0=True)
    output, h_n = rnn(torch.zeros(4, 0, 2))
    (output.sum() + h_n.sum()).backward()
    assert torch.equal(rnn.h0.grad, torch.zeros(1, 3))


# ---- recurrent dropout and noise


def test_a_sequence_has_one_mask_for_all_steps():
    """h_t = 2 h_{t-1} where a unit is kept, as its weight is 1 and p is 1/2; else 0."""
    rnn = RNN(1, 400, nonlinearity="identity", bias=False, recurrent_dropout=0.5)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(400))
    output, _ = rnn(torch.zeros(6, 3, 1), torch.ones(1, 3, 400))
    kept = output[0] > 0
    for t in range(6):
        assert torch.equal(output[t], kept * 2.0 ** (t + 1))
    shares = kept.float().mean(1)
    # Of 400 draws with p = 1/2: five standard deviations.
    assert ((shares - 0.5).abs() < 5 * 0.5 / 20).all()
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(rnn(torch.zeros(6, 3, 1), torch.ones(1, 3, 400))[0], output)
    rnn.eval()
    assert torch.equal(rnn(torch.zeros(6, 3, 1), torch.ones(1, 3, 400))[0], torch.ones(6, 3, 400))


def test_noise_has_the_deviation_it_is_given():
    rnn = RNN(1, 50, nonlinearity="identity", bias=False, noise=0.7)
    nn.init.zeros_(rnn.weight_hh_l0)
    output, _ = rnn(torch.zeros(100, 20, 1))
    # Of n = 100,000 draws: the deviation's own is 0.7 / sqrt(2 n); five of those.
    assert abs(output.std() - 0.7) < 5 * 0.7 / (2 * 1e5) ** 0.5
    assert abs(output.mean()) < 5 * 0.7 / 1e5**0.5
    rnn.eval()
    assert not rnn(torch.zeros(100, 20, 1))[0].any()


@pytest.mark.parametrize("checkpoint", [None, 2])
def test_random_options_are_differentiable(checkpoint):
    rnn = RNN(
        2, 3, dtype=torch.float64, alpha=nn.Parameter(torch.rand(3).double() / 2 + 0.1),
        learn_h0=True, recurrent_dropout=0.5, noise=0.3, checkpoint=checkpoint,
    )  # fmt: skip
    reset = torch.tensor([[0, 0], [0, 1], [0, 0], [1, 0], [0, 0]]).bool()
    names = [name for name, _ in rnn.named_parameters()]

    def function(input, *parameters):
        torch.manual_seed(3)
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(rnn, given, input, {"reset": reset})

    inputs = (randn(5, 2, 2).requires_grad_(), *rnn.parameters())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("option", ["recurrent_dropout", "noise"])
@pytest.mark.parametrize("checkpoint", [1, 3, True])
def test_what_is_computed_again_draws_the_same(option, checkpoint):
    """Of masks the numbers agree with the run without checkpoint, as they are drawn before."""
    options = {option: 0.4, "dtype": torch.float64}
    plain = RNN(2, 3, **options)
    again = copy.deepcopy(plain)
    again.checkpoint = checkpoint
    if option == "recurrent_dropout":
        assert_same_run(run(again, randn(7, 2, 2)), run(plain, randn(7, 2, 2)))
    input = randn(7, 2, 2).requires_grad_()
    # The gradient of the mean output is that of a second call with the same seed, by differences.
    torch.manual_seed(0)
    output, _ = again(input)
    (got,) = torch.autograd.grad(output.sum(), input)
    step = torch.zeros_like(input)
    step[2, 1, 0] = 1e-5
    values = []
    for sign in (1, -1):
        torch.manual_seed(0)
        values.append(again(input.detach() + sign * step)[0].sum())
    # Central differences err by step^2 times a third derivative of order 1, and by 1e-16 / 1e-5.
    assert abs((values[0] - values[1]) / 2e-5 - got[2, 1, 0]) < 1e-8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recurrent_dropout": 1.0}, r"recurrent_dropout must be a number in \[0, 1\), got 1.0"),
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout must be a number in \[0, 1\), got -0.1"),
        ({"noise": -1}, "noise must be a finite number of at least 0, got -1"),
        ({"noise": float("inf")}, "noise must be a finite number of at least 0, got inf"),
    ],
    ids=str,
)
def test_random_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        RNN(2, 3, **options)
    with pytest.raises(ValueError, match=words):
        functional.rnn(torch.zeros(2, 1, 2), None, torch.ones(3, 2), torch.ones(3, 3), **options)


@pytest.mark.parametrize("name", ["recurrent_dropout", "noise"])
def test_random_options_of_the_wrong_type(name):
    with pytest.raises(TypeError, match=f"{name} must be .* got 'a'"):
        RNN(2, 3, **{name: "a"})


def test_learn_h0_is_a_bool():
    with pytest.raises(TypeError, match="learn_h0 must be a bool, got 1"):
        RNN(2, 3, learn_h0=1)


# ---- as a module


EVERYTHING = {
    "learn_h0": True, "truncate": 2, "clip_grad_h": 0.5, "checkpoint": 3, "recurrent_dropout": 0.1,
    "noise": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "parametrized"])
def test_copies_have_all_options(how):
    rnn = RNN(2, 3, 2, alpha=nn.Parameter(torch.full((2, 3), 0.5)), **EVERYTHING)
    if how == "parametrized":
        parametrize.register_parametrization(rnn, "alpha", _Sigmoid())
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(rnn, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copy.deepcopy(rnn)
    assert repr(copied) == repr(rnn)
    assert copied.state_dict().keys() == rnn.state_dict().keys()
    for module in (rnn, copied):
        torch.manual_seed(0)
        module.result = module(torch.ones(5, 2, 2))[0]
    assert torch.equal(copied.result, rnn.result)


@pytest.mark.parametrize("name", [*EVERYTHING, "alpha"])
def test_to_torch_refuses_every_option_by_name(name):
    alpha = {"alpha": torch.full((3,), 0.5)}
    rnn = RNN(2, 3, **(alpha if name == "alpha" else {name: EVERYTHING[name]}))
    with pytest.raises(ValueError, match=f"to_torch: {name} must be"):
        rnn.to_torch()


def test_the_meta_device():
    rnn = RNN(2, 3, device="meta", learn_h0=True, alpha=nn.Parameter(torch.empty(3, device="meta")))
    output, h_n = rnn(torch.empty(5, 4, 2, device="meta"))
    assert output.shape == (5, 4, 3)
    assert h_n.device.type == "meta"


def test_convert_keeps_its_hands_off():
    model = nn.Sequential(RNN(2, 3, learn_h0=True))
    assert torch_bptt.convert(model)[0] is model[0]
