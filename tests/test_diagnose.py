"""diagnose against literal loops: every h_t a tensor of its own, every Jacobian by autograd."""

import doctest
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import assert_same, randn
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from torch_bptt import RNN, ElmanNetwork, RNNCell, diagnose
from torch_bptt.reference import activations

ROOT = Path(__file__).parent.parent

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def network(*args, seed=0, **options):
    torch.manual_seed(seed)
    rnn = RNN(*args, **options).double()
    if rnn.learn_h0:
        nn.init.normal_(rnn.h0)
    return rnn


def single(factor, activation="identity", bias=0.0, dtype=torch.float64):
    """One unit, h_t = f(x_t + factor h_{t-1} + bias)."""
    rnn = RNN(1, 1, nonlinearity=activation).to(dtype)
    for parameter, value in zip(rnn.parameters(), (1.0, factor, bias, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    return rnn


def flow_of(norms, lengths=None, states=None, activation="identity", reverse=False):
    """A LayerFlow with these norms, (T, B), and nothing particular else."""
    norms = torch.as_tensor(norms)
    norms = norms[:, None] if norms.dim() == 1 else norms
    steps, rows = norms.shape
    return diagnose.LayerFlow(
        "rnn", 0, 0, reverse, activation, norms,
        torch.zeros(steps, rows, 1) if states is None else states,
        torch.full((rows,), steps) if lengths is None else torch.tensor(lengths),
        torch.tensor(1.0).double(), None,
    )  # fmt: skip


def parameters(rnn, layer, reverse):
    ending = f"_l{layer}{'_reverse' if reverse else ''}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(rnn, name + ending) for name in names]


def step(rnn, layer, reverse, x, h):
    """z_t and h_t from the definition, for one row."""
    w_ih, w_hh, b_ih, b_hh = parameters(rnn, layer, reverse)
    z = w_ih @ x + b_ih + w_hh @ h + b_hh
    alpha = torch.as_tensor(rnn.alpha, dtype=torch.float64)
    alpha = alpha[layer * len(directions(rnn)) + reverse] if alpha.dim() == 2 else alpha
    return z, (1 - alpha) * h + alpha * ACTIVATIONS[rnn.nonlinearity](z)


def directions(rnn):
    return (False, True) if rnn.bidirectional else (False,)


def row_by_row(rnn, x, hx, reset):
    """One row on its own, a loop over layers, directions and steps.

    x (n, I), hx (L * D, H), reset (n,): -> output (n, D * H), h_n (L * D, H), and for each layer
    and direction the lists of h_t and z_t. The gradient of every h_t is kept.
    """
    inputs, last, found = list(x), [], []
    for layer in range(rnn.num_layers):
        outputs = []
        for reverse in directions(rnn):
            h, states, zs = hx[len(last)], {}, {}
            for own, t in enumerate(range(len(x))[:: -1 if reverse else 1]):
                cut = own > 0 and reset[t + 1] if reverse else reset[t]
                if cut:
                    h = rnn.h0[len(last)] if rnn.learn_h0 else torch.zeros_like(h)
                if rnn.truncate and own > 0 and own % rnn.truncate == 0:
                    h = h.detach()
                zs[t], h = step(rnn, layer, reverse, inputs[t], h)
                if rnn.clip_grad_h is not None:
                    h.register_hook(lambda grad: grad.clamp(-rnn.clip_grad_h, rnn.clip_grad_h))
                h.retain_grad()
                states[t] = h
            last.append(h)
            steps = range(len(x))
            outputs.append([states[t] for t in steps])
            found.append(([states[t] for t in steps], [zs[t] for t in steps]))
        inputs = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return inputs, last, found


LAYOUTS = ["batch", "batch_first", "one", "one batch_first", "lengths", "packed", "unsorted"]
LENGTHS = {"lengths": [3, 6, 0, 3, 6], "packed": [6, 5, 3, 3, 1], "unsorted": [3, 6, 1, 3, 6]}
NETWORKS = {
    "tanh": {},
    "deep, both ways": {"num_layers": 2, "bidirectional": True},
    "leaky relu": {"nonlinearity": "relu", "alpha": 0.3, "bidirectional": True},
    "sigmoid": {"nonlinearity": "sigmoid"},
    "leaks and h0 learned": {
        "num_layers": 2,
        "bidirectional": True,
        "alpha": nn.Parameter(torch.linspace(0.1, 1, 16).reshape(4, 4).double()),
        "learn_h0": True,
    },
    "truncated": {"truncate": 2, "bidirectional": True},
    "clipped": {"clip_grad_h": 0.4, "num_layers": 2},
}


@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_norms_states_and_slopes_are_those_of_a_literal_loop(options, layout, with_reset):
    T, B = 6, 1 if layout.startswith("one") else 5
    rnn = network(3, 4, batch_first="batch_first" in layout or layout == "lengths", **options)
    x, hx = randn(T, B, 3), randn(rnn.num_layers * len(directions(rnn)), B, 4, seed=1)
    weigh, weigh_last = randn(T, B, 4 * len(directions(rnn)), seed=2), randn(*hx.shape, seed=3)
    reset = randn(T, B, seed=4) > 0.5 if with_reset else torch.zeros(T, B, dtype=torch.bool)
    lengths = LENGTHS.get(layout, [T] * B)

    # What the module sees, in the layout of the case.
    given = {"reset": reset} if with_reset else {}
    turn = (lambda t: t.transpose(0, 1)) if rnn.batch_first else (lambda t: t)
    if layout == "batch_first":
        given = {name: value.T for name, value in given.items()}
        input, own_hx = turn(x), hx
    elif layout.startswith("one"):
        given = {name: value[:, 0] for name, value in given.items()}
        input, own_hx = x[:, 0], hx[:, 0]
    elif layout == "lengths":
        given = {name: value.T for name, value in given.items()} | {"lengths": lengths}
        input, own_hx = turn(x), hx
    elif layout == "batch":
        input, own_hx = x, hx
    else:
        existing = torch.arange(T)[:, None] < torch.tensor(lengths)
        given = {name: value & existing for name, value in given.items()}
        input = pack_padded_sequence(x, lengths, enforce_sorted=layout == "packed")
        own_hx = hx

    model = nn.ModuleDict({"rnn": rnn})
    with diagnose.gradient_flow(model) as flow:
        output, h_n = rnn(input, own_hx, **given)
        if layout in ("packed", "unsorted"):
            output, _ = nn.utils.rnn.pad_packed_sequence(output)
        elif layout.startswith("one"):
            output, h_n = output[:, None], h_n[:, None]
        else:
            output = turn(output)
        exists = (torch.arange(T)[:, None] < torch.tensor(lengths))[..., None]
        ((output * weigh).where(exists, 0).sum() + (h_n * weigh_last).sum()).backward()

    assert len(flow) == rnn.num_layers * len(directions(rnn))
    for b, length in enumerate(lengths):
        outputs, last, found = row_by_row(rnn, x[:length, b], hx[:, b], reset[:, b])
        loss = sum((h * w[b]).sum() for h, w in zip(outputs, weigh, strict=False))
        loss = loss + sum((h * w[b]).sum() for h, w in zip(last, weigh_last, strict=True))
        if length:
            loss.backward()
        for layer, (states, zs) in zip(flow, found, strict=True):
            assert layer.module == "rnn"
            assert layer.lengths[b] == length
            assert layer.norms.shape == (T, B)
            assert layer.norms[length:, b].isnan().all()
            assert layer.states[length:, b].isnan().all()
            assert layer.slopes[length:, b].isnan().all()
            for t in range(length):
                grad = states[t].grad  # None where nothing came by
                norm = torch.zeros(()).double() if grad is None else grad.norm()
                assert_same("norm", layer.norms[t, b], norm, 1e-9)
                assert_same("state", layer.states[t, b], states[t].detach(), 1e-9)
                z = zs[t].detach().requires_grad_()
                (slope,) = torch.autograd.grad(ACTIVATIONS[rnn.nonlinearity](z).sum(), z)
                before = t + 1 if layer.reverse else t - 1
                known = 0 <= before < length and not reset[max(t, before), b]
                elman = isinstance(rnn.alpha, float) and rnn.alpha == 1
                if elman or (known if layer.reverse else known and not reset[t, b]):
                    steepest = 0.25 if rnn.nonlinearity == "sigmoid" else 1
                    assert_same("slope", layer.slopes[t, b], slope / steepest, 1e-9)
                else:
                    assert layer.slopes[t, b].isnan().all()
    labels = [(layer.layer, layer.reverse) for layer in flow]
    assert labels == [(n, r) for n in range(rnn.num_layers) for r in directions(rnn)]


# The numbers


def test_growth_is_the_slope_of_a_fitted_line():
    rows = randn(20, 3).abs()
    logs = np.log(np.sqrt(np.mean(rows.numpy() ** 2, axis=1)))[::-1]
    growth = math.exp(np.polyfit(np.arange(20), logs, 1)[0])
    layer = flow_of(rows)
    np.testing.assert_allclose(layer.log_norms, logs, rtol=1e-12)
    assert layer.growth == pytest.approx(growth, rel=1e-12)
    if growth < 1:
        assert layer.half_life == pytest.approx(-math.log(2) / math.log(growth), rel=1e-12)
        assert layer.doubling is None
    # In reverse, back is upward.
    upward = flow_of(rows.flip(0), reverse=True)
    assert upward.growth == layer.growth


@pytest.mark.parametrize(("factor", "half_life", "doubling"), [(0.5, 1, None), (2**0.25, None, 4)])
def test_half_life_and_doubling_of_a_linear_unit(factor, half_life, doubling):
    rnn = single(factor)
    with diagnose.gradient_flow(rnn) as flow:
        rnn(randn(30, 1, 1))[0][-1].sum().backward()
    layer = flow[0]
    np.testing.assert_allclose(layer.norms[:, 0], factor ** np.arange(29.0, -1, -1), rtol=1e-12)
    assert layer.growth == pytest.approx(factor, rel=1e-12)
    assert layer.half_life == (half_life and pytest.approx(half_life, rel=1e-12))
    assert layer.doubling == (doubling and pytest.approx(doubling, rel=1e-12))
    ratio = factor**29
    assert layer.left == pytest.approx(min(ratio, 1), rel=1e-12)
    assert layer.grown == pytest.approx(max(ratio, 1), rel=1e-12)


def test_steps_are_counted_back_from_the_end_of_each_row():
    nan = math.nan
    upward = torch.tensor([[1.0, 2.0, nan], [2.0, 4.0, nan], [4.0, nan, nan]]).double()
    expected = [math.sqrt((16 + 16) / 2), math.sqrt((4 + 4) / 2), 1]
    layer = flow_of(upward, lengths=[3, 2, 0])
    np.testing.assert_allclose(layer.log_norms.exp(), expected, rtol=1e-12)
    backward = torch.tensor([[4.0, 4.0, nan], [2.0, 2.0, nan], [1.0, nan, nan]]).double()
    layer = flow_of(backward, lengths=[3, 2, 0], reverse=True)
    np.testing.assert_allclose(layer.log_norms.exp(), expected, rtol=1e-12)


def test_norms_whose_squares_no_float64_holds():
    layer = flow_of(torch.tensor([1e-200, 1e-180, 1e-160], dtype=torch.float64))
    np.testing.assert_allclose(layer.log_norms, np.log([1e-160, 1e-180, 1e-200]), rtol=1e-12)
    assert layer.growth == pytest.approx(1e-20, rel=1e-9)


@pytest.mark.parametrize(
    ("norms", "growth", "left", "grown", "reach"),
    [
        ([3.0], None, 1, 1, 0),
        ([0.0, 0.0], None, None, None, None),
        ([0.0, 0.0, 2.0, 4.0, 0.0], 0.5, 0, 1, 2),  # nothing comes from the last step
        ([1.0, 8.0, 4.0], None, 1 / 8, 2, 2),
        ([math.inf, 4.0, 2.0], 2, None, None, 2),
        ([math.nan, 4.0, 2.0], 2, None, None, 2),
        ([], None, None, None, None),
    ],
    ids=str,
)
def test_zeros_and_what_is_not_finite(norms, growth, left, grown, reach):
    layer = flow_of(torch.tensor(norms).double())
    if growth is not None:
        assert layer.growth == pytest.approx(growth, rel=1e-12)
    elif len(norms) < 3:
        assert layer.growth is None
        assert layer.half_life is None
        assert layer.doubling is None
    for got, expected in ((layer.left, left), (layer.grown, grown)):
        assert got == (expected if expected is None else pytest.approx(expected, rel=1e-12))
    assert layer.reach == (reach if norms != [0.0, 0.0, 2.0, 4.0, 0.0] else 2)


def test_float32_norms_below_the_root_of_the_smallest_number():
    """1e-38 is a float32, its square is not: a sum of squares must not lose it; nor above 1e19."""
    for factor, row in ((0.1, 1.0), (10.0, 1e-3)):
        steps = 37 if factor < 1 else 40
        rnn = RNN(1, 9, nonlinearity="identity")
        with torch.no_grad():
            rnn.weight_hh_l0.copy_(factor * torch.eye(9))
        with diagnose.gradient_flow(rnn) as flow:
            output, _ = rnn(torch.zeros(steps, 1, 1), torch.zeros(1, 1, 9))
            (row * output[-1]).sum().backward()
        assert flow[0].norms.dtype == torch.float32
        exact = 3 * row * np.float64(np.float32(factor)) ** np.arange(steps - 1.0, -1, -1)
        # One rounding of 6e-8 in each of 40 products, and a few in the sum of 9 and its root.
        np.testing.assert_allclose(flow[0].norms[:, 0].double(), exact, rtol=50 * 6e-8)
        assert flow[0].growth == pytest.approx(factor, rel=1e-6)


def test_saturated_and_dead_units_by_hand():
    y = torch.tensor([[[0.0, 0.94, 0.96]], [[0.0, -0.96, -0.96]]]).double()
    layer = flow_of(torch.ones(2, 1), states=y, activation="tanh")  # 1 - y^2 < 0.1: |y| > 0.9487
    assert layer.saturated == pytest.approx(3 / 6)
    assert layer.dead == pytest.approx(1 / 3)
    assert layer.saturated_by_step.tolist() == pytest.approx([1 / 3, 2 / 3])
    y = torch.tensor([[[0.5, 0.02]], [[0.5, 0.03]]]).double()
    layer = flow_of(torch.ones(2, 1), states=y, activation="sigmoid")  # y (1 - y) < 0.025
    assert layer.saturated == pytest.approx(1 / 4)
    assert layer.dead == 0
    y = torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 3.0, 1.0]]])
    layer = flow_of(torch.ones(2, 1), states=y, activation="relu")
    assert layer.saturated == pytest.approx(3 / 6)
    assert layer.dead == pytest.approx(1 / 3)
    assert flow_of(torch.ones(2, 1), states=y).saturated == 0
    leaky_step = network(3, 4, alpha=0.5)
    with diagnose.gradient_flow(leaky_step) as flow:
        leaky_step(randn(1, 2, 3))[0].sum().backward()
    assert flow[0].saturated is None
    assert flow[0].dead is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_leak_does_not_blur_which_relus_are_off(dtype):
    """h is rounded, so that h - (1-a) p is only nearly zero where a unit is off."""
    torch.manual_seed(0)
    model = RNN(3, 32, nonlinearity="relu", alpha=0.1).to(dtype)
    x = torch.randn(50, 4, 3, dtype=dtype)
    with diagnose.gradient_flow(model) as flow:
        model(x)[0].sum().backward()
    w_ih, w_hh, b_ih, b_hh = (parameter.double() for parameter in parameters(model, 0, False))
    z = x[1:].double() @ w_ih.T + flow[0].states[:-1].double() @ w_hh.T + b_ih + b_hh
    # a f(z) above the last bits of h; and z, a sum of some 40 rounded terms, is not zero itself.
    last_bits = 2 * torch.finfo(dtype).eps * flow[0].states[1:].double().abs()
    clear = (z < -1e-4) | (0.1 * z > last_bits + 1e-4)
    off = (z < 0)[clear]
    assert clear.double().mean() > 0.9
    assert 0.2 < off.double().mean() < 0.8
    assert torch.equal(flow[0].slopes[1:][clear] == 0, off)


def test_every_activation_has_its_largest_slope():
    from torch_bptt._flow import STEEPEST

    assert STEEPEST.keys() == activations.keys() == ACTIVATIONS.keys()
    z = torch.linspace(-9, 9, 3601).double().requires_grad_()
    for name, f in ACTIVATIONS.items():
        (slope,) = torch.autograd.grad(f(z).sum(), z)
        assert slope.max().item() == pytest.approx(STEEPEST[name], rel=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_first_step_that_is_not_finite(reverse):
    states = torch.zeros(6, 3, 2)
    states[2, 1, 0], states[4, 2, 1], states[4, 0, 1] = math.nan, math.inf, -math.inf
    norms = torch.ones(6, 3)
    norms[1, 2], norms[3, 1] = math.inf, math.nan
    states[5, 2], norms[5, 2] = math.nan, math.nan  # no such step
    layer = flow_of(norms, lengths=[6, 6, 5], states=states, reverse=reverse)
    assert layer.first_bad_state == ((4, 0) if reverse else (2, 1))
    assert layer.first_bad_gradient == ((1, 2) if reverse else (3, 1))
    assert flow_of(torch.ones(2, 1)).first_bad_state is None
    assert flow_of(torch.ones(2, 1)).first_bad_gradient is None


def test_a_network_that_overflows_says_where():
    rnn = single(1e10, "relu", bias=1.0, dtype=torch.float32)  # h_t is about 1e(10 t)
    with diagnose.gradient_flow(rnn) as flow:
        rnn(torch.zeros(8, 2, 1))[0][-1].sum().backward()
    assert flow[0].first_bad_state == (4, 0)
    # dL/dh_t is 1e10^(7 - t): 1e40 at step 3 is not a float32.
    assert flow[0].first_bad_gradient == (3, 0)
    words = "\n".join(diagnose.report(flow).findings)
    assert "state is NaN or infinite, first at step 4 in row 0" in words
    assert "gradient is NaN or infinite, going back first at step 3 in row 0" in words


# Modules and calls


class Twice(nn.Module):
    """One RNN run twice, the second time from the first one's state, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.ModuleDict({"main": RNN(2, 3), "idle": RNN(2, 3)})
        self.cell = RNNCell(2, 3)

    def forward(self, x):
        first, h = self.rnn["main"](x)
        second, _ = self.rnn["main"](input=x[:2], hx=h)
        return first, second


def test_calls_are_told_apart_and_rows_that_the_loss_does_not_see_have_zeros():
    model = Twice().double()
    x = randn(4, 5, 2)
    with diagnose.gradient_flow(model) as flow:
        first, second = model(x)
        first[1].sum().backward()
    assert [(own.module, own.call, len(own.norms)) for own in flow] == [
        ("rnn.main", 0, 4), ("rnn.main", 1, 2),
    ]  # fmt: skip
    assert flow[1].label == "rnn.main, layer 0, call 1"
    assert flow[1].norms.tolist() == [[0] * 5] * 2
    assert (flow[0].norms[:2] > 0).all()
    assert (flow[0].norms[2:] == 0).all()
    assert "no gradient arrives" in str(diagnose.report(flow))

    with diagnose.gradient_flow(model) as flow:
        first, second = model(x)
    second[-1].sum().backward()  # outside of the block
    whole = network(2, 3)
    whole.load_state_dict(model.rnn["main"].state_dict())
    with diagnose.gradient_flow(whole) as expected:
        whole(torch.cat((x, x[:2])))[0][-1].sum().backward()
    got = torch.cat((flow[0].norms, flow[1].norms))
    assert_same("norms", got, expected[0].norms, 1e-12)


def test_parameters_get_the_gradients_they_get_without():
    model = network(3, 5, 2, bidirectional=True, dropout=0.4)
    x = randn(6, 4, 3)

    def gradients():
        torch.manual_seed(1)
        output, h_n = model(x)
        return output, torch.autograd.grad(output.sum() + h_n.sum(), list(model.parameters()))

    output, expected = gradients()
    with diagnose.gradient_flow(model):
        watched, got = gradients()
    assert_same("output", watched, output)
    for mine, other in zip(got, expected, strict=True):
        assert_same("gradient", mine, other)
    assert model._observer is None
    assert not model._forward_pre_hooks


def test_rows_of_length_0_only_and_batches_of_none():
    model = network(3, 4)
    with diagnose.gradient_flow(model) as flow:
        output, h_n = model(randn(5, 2, 3), lengths=[0, 0])
        (output.sum() + h_n.sum()).backward()
    assert flow[0].norms.shape == (5, 2)
    assert flow[0].norms.isnan().all()
    assert flow[0].growth is None
    assert flow[0].left is None
    with diagnose.gradient_flow(model) as flow:
        model(randn(5, 0, 3))[0].sum().backward()
    assert flow[0].norms.shape == (5, 0)
    assert "no gradient arrives" in str(diagnose.report(flow))


def test_lower_precision_gives_float32_norms():
    model = RNN(3, 4).bfloat16()
    with diagnose.gradient_flow(model) as flow:
        model(randn(5, 2, 3).bfloat16())[0].sum().backward()
    assert flow[0].norms.dtype == torch.float32
    assert (flow[0].norms > 0).all()
    assert diagnose.report(flow).as_dict()["layers"][0]["saturated"] is not None


def test_under_autocast():
    model = RNN(3, 4)
    with diagnose.gradient_flow(model) as flow:
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = model(torch.ones(5, 2, 3))
        output.float().sum().backward()
    assert flow[0].states.dtype == torch.bfloat16
    torch.testing.assert_close(flow[0].norms[-1], torch.full((2,), 2.0))  # dL/dh_T: 4 ones


def test_compiled_models_are_refused():
    compiled = torch.compile(RNN(3, 4), backend="eager")
    in_place = nn.Sequential(RNN(3, 4))
    in_place[0].compile(backend="eager")
    for model in (compiled, nn.Sequential(compiled), in_place):
        with pytest.raises(ValueError, match=r"given to torch\.compile"):
            enter(model)


class OwnForward(RNN):
    def forward(self, x):
        return super().forward(x.relu())


def enter(model):
    with diagnose.gradient_flow(model):
        pass


def nested(model):
    with diagnose.gradient_flow(model), diagnose.gradient_flow(model):
        pass


def read(model, use):
    with diagnose.gradient_flow(model) as flow:
        use(model)
    return flow.layers


def backward_twice(model):
    loss = model(torch.zeros(2, 1, 3))[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()


def without_gradients(model):
    with torch.no_grad():
        model(torch.zeros(2, 1, 3))


def by_grad(model):
    torch.autograd.grad(model(torch.zeros(2, 1, 3))[0].sum(), model.weight_hh_l0)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: enter(3), TypeError, "model must be a torch.nn.Module, got int"),
        (lambda: enter(nn.Linear(3, 4)), ValueError, "contain a torch_bptt.RNN, got none$"),
        (lambda: enter(RNNCell(3, 4)), ValueError, "contain a torch_bptt.RNN, got none$"),
        (
            lambda: enter(nn.Sequential(nn.RNN(3, 4))),
            ValueError,
            r"got torch.nn.RNN \(0\): replace it with torch_bptt.convert\(model\)",
        ),
        (lambda: enter(nn.RNN(3, 4)), ValueError, r"got torch.nn.RNN \(model itself\): replace"),
        (lambda: enter(OwnForward(3, 4)), TypeError, "must keep its forward, got OwnForward"),
        (lambda: nested(RNN(3, 4)), RuntimeError, "model must be watched once at a time"),
        (lambda: read(RNN(3, 4), lambda model: None), RuntimeError, "got no call of an RNN"),
        (lambda: read(RNN(3, 4), without_gradients), RuntimeError, "got no gradient of a state"),
        (lambda: read(RNN(3, 4), by_grad), RuntimeError, "got no gradient of a state"),
        (lambda: read(RNN(3, 4), backward_twice), RuntimeError, "got 2 times through one"),
        (
            lambda: read(RNN(3, 4), lambda model: model.forward(torch.zeros(2, 1, 3))),
            RuntimeError,
            r"call the module, module\(input\)",
        ),
        (lambda: diagnose.weights(nn.RNN(3, 4)), ValueError, "weights: .* torch_bptt.convert"),
        (lambda: diagnose.report(RNN(3, 4)), TypeError, "loss must be a function .* got NoneType"),
        (
            lambda: diagnose.report(RNN(3, 4), nn.MSELoss()),
            TypeError,
            "loss must be a function without arguments .* got MSELoss",
        ),
        (
            lambda: diagnose.report(RNN(3, 4), lambda: 3.0),
            TypeError,
            "loss must return a tensor, got float",
        ),
        (
            lambda: diagnose.report(RNN(3, 4), lambda: torch.zeros(2)),
            ValueError,
            r"one number, got shape \(2,\)",
        ),
        (
            lambda: diagnose.report(RNN(3, 4), lambda: torch.zeros(())),
            RuntimeError,
            "got no call of an RNN",
        ),
    ],
)
def test_errors(act, error, words):
    with pytest.raises(error, match=words):
        act()


def test_a_module_is_free_again_after_an_error_inside():
    model = RNN(3, 4)
    with pytest.raises(RuntimeError), diagnose.gradient_flow(model):
        model(torch.zeros(2, 1, 5))
    assert model._observer is None
    assert not model._forward_pre_hooks
    enter(model)


# The report


def test_report_runs_once_and_leaves_gradients_alone():
    model = network(2, 3)
    x, calls = randn(20, 4, 2), []
    model.weight_hh_l0.grad = torch.ones_like(model.weight_hh_l0)

    def loss():
        calls.append(True)
        return model(x)[0][-1].sum()

    with torch.no_grad():
        found = diagnose.report(model, loss)
    assert len(calls) == 1
    assert model.weight_hh_l0.grad.eq(1).all()
    assert model.weight_ih_l0.grad is None
    with diagnose.gradient_flow(model) as flow:
        loss().backward()
    assert str(diagnose.report(flow)) == str(found) == found.text
    with pytest.raises(ValueError, match="loss must be None"):
        diagnose.report(flow, loss)


def test_report_in_words():
    rnn = single(0.5)
    found = diagnose.report(rnn, lambda: rnn(randn(30, 4, 1))[0][-1].sum())
    assert found.text.splitlines() == [
        "layer 0: 1 identity units, 30 steps, 4 rows",
        "  ! gradient vanishes: it halves every 1.0 steps back; "
        "1.9e-09 of it is left 29 steps back",
        "  ! W_hh: spectral radius 0.5, sigma_max 0.5; "
        "any gradient vanishes, as a step keeps at most 0.5 of it",
    ]
    assert found.findings == [
        f"layer 0: {line[4:]}" for line in found.text.splitlines() if line.startswith("  !")
    ]
    numbers = json.loads(json.dumps(found.as_dict()))
    assert numbers["findings"] == found.findings
    (layer,) = numbers["layers"]
    assert layer["half_life"] == pytest.approx(1, rel=1e-9)
    assert layer["left"] == pytest.approx(2.0**-29, rel=1e-9)
    assert (layer["steps"], layer["rows"], layer["units"]) == (30, 4, 1)
    assert layer["spectral_radius"] == layer["bound"] == 0.5


@pytest.mark.parametrize(
    ("rnn", "steps", "line"),
    [
        (
            single(2.0),
            11,
            "  ! gradient explodes: it doubles every 1.0 steps back; 1e+03-fold in all",
        ),
        (single(2.0), 9, "    gradient doubles every 1.0 steps back; 2.6e+02-fold in all"),
        (single(0.5), 9, "    gradient halves every 1.0 steps back; 0.0039 of it is left 8 steps"),
        (single(1.0), 9, "    gradient keeps its size within a factor of 2 over 8 steps"),
        (single(1.0), 1, "    gradient has norm 1 at the only step"),
        (single(0.0), 9, "  ! gradient is there at one step only"),
        (
            single(1.0),
            9,
            "    W_hh: spectral radius 1, sigma_max 1; no step makes a gradient longer",
        ),
        (
            single(2.0),
            9,
            "    W_hh: spectral radius 2, sigma_max 2; a step can stretch a gradient 2-",
        ),
        (
            single(0.9),
            9,
            "    W_hh: spectral radius 0.9, sigma_max 0.9; a step keeps at most 0.9 of",
        ),
        (single(math.nan), 9, "  ! W_hh is not finite"),
        (single(0.0, "tanh", 9.0), 4, "  ! 100 % of units saturated (slope below 10 % of the "),
        (single(0.0, "tanh", 0.1), 4, "    no unit is saturated at any step"),
        (single(0.0, "relu", -9.0), 4, "  ! units are off 100 % of the time; 100 % are dead"),
        (single(0.0, "relu", 9.0), 4, "    units are off 0 % of the time; 0 % are dead"),
    ],
)
def test_sentences(rnn, steps, line):
    x = torch.zeros(steps, 1, 1).double()
    text = str(diagnose.report(rnn, lambda: rnn(x)[0][-1].sum()))
    assert any(got.startswith(line) for got in text.splitlines()), text


def test_many_layers_are_counted_in_the_text_and_all_in_the_dictionary():
    model = network(2, 3, 14)
    found = diagnose.report(model, lambda: model(randn(3, 1, 2))[0].sum())
    assert found.text.count("layer") == diagnose.SHOWN == 12
    assert found.text.splitlines()[-1] == "and 2 more, 0 of them with findings: see as_dict()"
    assert len(found.as_dict()["layers"]) == 14


# The plots


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def small():
    model = network(2, 3, 2, bidirectional=True)
    with diagnose.gradient_flow(model) as flow:
        model(randn(6, 4, 2), lengths=[6, 2, 0, 3])[0].sum().backward()
    return model, flow


def test_plots_show_the_numbers(pyplot):
    model, flow = small()
    ax = flow.plot()
    assert ax.get_yscale() == "log"
    assert len(ax.lines) == 4
    for line, layer in zip(ax.lines, flow, strict=True):
        assert line.get_label() == layer.label
        expected = np.sqrt(np.nanmean(layer.norms.numpy()[:, [0, 1, 3]] ** 2, axis=1))
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    ax = flow.plot_saturation()
    for line, layer in zip(ax.lines, flow, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), 100 * layer.saturated_by_step)
    weights = diagnose.weights(model)
    ax = weights.plot()
    for line, layer in zip(ax.lines[1:], weights, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), layer.eigenvalues.real)
        np.testing.assert_array_equal(line.get_ydata(), layer.eigenvalues.imag)
    spectrum = diagnose.jacobian_spectrum(model, randn(6, 3, 2), window=2)
    ax = spectrum.plot()
    for line, layer in zip(ax.lines, spectrum, strict=False):
        expected = np.median(layer.singular_values.flatten(0, 1).numpy() ** 0.5, axis=0)
        assert len(line.get_ydata()) == 3
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    assert [ax.get_title() for ax in diagnose.report(flow).plot().axes] == [
        "Gradient of the state", "Saturation", "Eigenvalues of W_hh",
    ]  # fmt: skip


def test_plots_draw_on_the_axes_given(pyplot):
    model, flow = small()
    spectrum = diagnose.jacobian_spectrum(model, randn(6, 3, 2))
    plots = flow.plot, flow.plot_saturation, diagnose.weights(model).plot, spectrum.plot
    _, axes = pyplot.subplots(len(plots))
    for draw, ax in zip(plots, axes, strict=True):
        assert draw(ax) is ax
        assert ax.lines
    assert len(pyplot.get_fignums()) == 1


def test_plots_of_nothing_but_zeros(pyplot):
    model = single(0.0)
    with diagnose.gradient_flow(model) as flow:
        (0 * model(randn(3, 1, 1))[0]).sum().backward()
    diagnose.report(flow).plot().canvas.draw()


def test_without_matplotlib_plots_say_what_to_install(monkeypatch):
    model, flow = small()
    spectrum = diagnose.jacobian_spectrum(model, randn(6, 3, 2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots = flow.plot, flow.plot_saturation, diagnose.weights(model).plot, spectrum.plot
    for draw in (*plots, diagnose.report(flow).plot):
        with pytest.raises(ModuleNotFoundError, match=r"pip install torch_bptt\[plot\]"):
            draw()


# The words


def numbers_of(text):
    return [float(number) for number in re.findall(NUMBER, text)]


NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?"


def test_the_page_prints_what_it_says(pyplot, capsys):
    """Word for word; numbers to 5 %, as they have two digits and float32 rounds differently."""
    page = (ROOT / "docs" / "diagnose.md").read_text()
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks].count("text") == 3
    names = {}
    for kind, block in blocks:
        if kind == "python":
            printed = capsys.readouterr().out
            assert not printed, "not on the page"
            exec(block, names)
        else:
            printed = capsys.readouterr().out
            assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", block)
            assert numbers_of(printed) == pytest.approx(numbers_of(block), rel=0.05)
    assert len(pyplot.get_fignums()) == 2


@pytest.mark.parametrize("name", ["diagnose", "_watch"])
def test_examples_in_docstrings_run(name):
    module = sys.modules[f"torch_bptt.{name}"]
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 0
    assert failed == 0


def test_a_network_with_one_prediction_is_watched():
    network, x = ElmanNetwork(3, 8, 2, many_to_one=True), torch.randn(30, 4, 3)
    plain = network.loss(x, torch.zeros(4, 2))[0]
    report = diagnose.report(network, lambda: network.loss(x, torch.zeros(4, 2))[0])
    assert "rnn" in str(report)
    assert torch.equal(network.loss(x, torch.zeros(4, 2))[0], plain)
