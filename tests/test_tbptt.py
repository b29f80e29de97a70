"""tbptt against the definition, written out twice, step by step, and against the forum's recipe.

``definition`` is Williams and Peng's in numpy, with the backward pass by hand, for one network.
``step_by_step`` is for any module: autograd through calls of one step each, every state kept.
Neither knows pieces.
"""

import gc
import re
import weakref
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from pairs import assert_same, examples, randn
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_sequence

from torch_bptt import RNN, tbptt

GUIDE = Path(__file__).parent.parent / "docs" / "truncated-bptt.md"

# Two float64 runs that add in another order. A number goes through at most 30 steps forward and 30
# back, each with sums of at most 12 terms: fewer than 1000 roundings of 1.1e-16, none of which the
# recurrence stretches, as the norms of the recurrent matrices are below 1 (``network`` sees to it):
# 1.1e-13 if all had the same sign. Where an optimizer steps, at most 20 updates with rates of at
# most 0.1 add up a fraction of as much each. A wrong term changes a result by more than 1e-6.
LIMIT = 1e-12

# (T, k1, k2): overlapping windows, adjacent ones, gaps; multiples and none; all of T and more.
WINDOWS = [
    (12, 3, 3), (13, 3, 3), (12, 2, 6), (13, 2, 6), (13, 4, 6), (13, 3, 7), (13, 5, 6), (13, 1, 4),
    (13, 1, 13), (12, 6, 2), (13, 5, 2), (13, 4, 1), (13, 13, 2), (13, 40, 5), (13, 5, 40),
    (13, 13, 13), (13, 40, 40), (1, 1, 1), (2, 1, 2), (2, 2, 1), (16, 5, 1), (16, 5, 3),
]  # fmt: skip


class Network(nn.Module):
    """(x, hx) -> (o, hx): a recurrent layer and a head at every step."""

    def __init__(self, layer, head, embedding=None):
        super().__init__()
        self.layer, self.head, self.embedding = layer, head, embedding

    def forward(self, input, hx=None, **options):
        x = input if self.embedding is None else self.embedding(input)
        output, hx = self.layer(x, hx, **options)
        return self.head(output), hx


def network(layer=RNN, inputs=3, hidden=4, layers=1, symbols=None, **options):
    torch.manual_seed(0)
    embedding = None if symbols is None else nn.Embedding(symbols, inputs)
    layer = layer(inputs, hidden, layers, **options)
    result = Network(layer, nn.Linear(hidden, symbols or 2), embedding).double()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight_hh"):
                gates = weight.view(-1, hidden, hidden)
                gates *= 0.9 / torch.linalg.matrix_norm(gates, 2).max()
    return result


def parameters(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(name, torch.as_tensor(got[name]), torch.as_tensor(expected[name]), LIMIT)


# ---- the definition


def definition(net, x, y, h0, k1, k2, lr=0.0, run_again=True):
    """(gradients of every update, losses, last state, parameters at the end), all by hand.

    For t = k1, 2 k1, ... and T: errors enter at the steps since the last update, the recursion

        delta_s = f'(z_s) (error_s V + delta_{s+1} U)

    goes from s = t - 1 to s = t - k2, and the weights take a step of gradient descent. If the
    last steps are fewer than k1, it ends where it would if the others were still to come. There are
    two readings of it for weights that change: the steps of the window are run again with the
    weights as they are, from the state stored at its beginning; or they stay as first run.
    """
    w = {name: value.numpy().copy() for name, value in parameters(net).items()}
    x, y = x.numpy(), y.numpy()
    T = len(y)
    h = {-1: h0[0].numpy()}
    o = {}
    gradients, losses = [], []

    def run(step):
        z = x[step] @ w["layer.weight_ih_l0"].T + w["layer.bias_ih_l0"] + w["layer.bias_hh_l0"]
        h[step] = np.tanh(z + h[step - 1] @ w["layer.weight_hh_l0"].T)
        o[step] = h[step] @ w["head.weight"].T + w["head.bias"]

    last = 0
    for t in [*range(k1, T, k1), T]:
        window = range(max(0, t - k2, min(last, last + k1 - k2)), t)
        for step in range(min(last, window[0]) if run_again else last, t):
            run(step)
        new = range(last, t)
        losses.append(
            sum(((o[step] - y[step]) ** 2).sum() for step in new) / (len(new) * y[0].size)
        )

        g = {name: np.zeros_like(value) for name, value in w.items()}
        back = np.zeros_like(h[-1])
        for step in reversed(window):
            d = back
            if step in new:
                error = 2 * (o[step] - y[step]) / (len(new) * y[0].size)
                g["head.weight"] += error.T @ h[step]
                g["head.bias"] += error.sum(0)
                d = d + error @ w["head.weight"]
            delta = (1 - h[step] ** 2) * d
            g["layer.weight_ih_l0"] += delta.T @ x[step]
            g["layer.weight_hh_l0"] += delta.T @ h[step - 1]
            g["layer.bias_ih_l0"] += delta.sum(0)
            g["layer.bias_hh_l0"] += delta.sum(0)
            back = delta @ w["layer.weight_hh_l0"]
        g["hx"] = back[None] if window[0] == 0 else np.zeros_like(h0)
        gradients.append(g)
        for name in w:
            w[name] = w[name] - lr * g[name]
        last = t
    return gradients, losses, h[T - 1][None], w


def gradients_of(net, hx):
    """A hook that takes the gradients of an update away, and the list that it puts them into."""
    leaves, taken = {**dict(net.named_parameters()), "hx": hx}, []

    def take():
        none = torch.zeros_like
        taken.append({n: none(p) if p.grad is None else p.grad.clone() for n, p in leaves.items()})
        hx.grad = None

    return take, taken


def check_against_the_definition(T, k1, k2, B, lr):
    net = network()
    x, y, h0 = randn(T, B, 3), randn(T, B, 2, seed=1), randn(1, B, 4, seed=2)
    gradients, losses, last, end = definition(net, x, y, h0, k1, k2, lr)

    hx, seen = h0.clone().requires_grad_(), []
    take, taken = gradients_of(net, hx)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    loss, hx = tbptt(
        net, x, y, mse_loss, k1=k1, k2=k2, hx=hx, optimizer=optimizer,
        before_update=take, progress=lambda *report: seen.append(report),
    )  # fmt: skip

    assert len(taken) == len(gradients)
    for got, expected in zip(taken, gradients, strict=True):
        assert_same_tensors(got, expected)
    assert_same_tensors(parameters(net), end)
    assert_same("hx", hx, torch.as_tensor(last), LIMIT)
    assert not hx.requires_grad
    ends = [*range(k1, T, k1), T]
    assert [(step, updates) for step, _, updates in seen] == list(
        zip(ends, range(1, len(ends) + 1), strict=True)
    )
    assert_same("losses", torch.stack([loss for _, loss, _ in seen]), torch.tensor(losses), LIMIT)
    mean = np.dot(losses, np.diff([0, *ends])) / T
    assert_same("loss", loss, torch.tensor(mean), LIMIT)
    assert not loss.requires_grad


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize(("T", "k1", "k2"), WINDOWS)
def test_every_update_is_that_of_the_definition(T, k1, k2, lr):
    check_against_the_definition(T, k1, k2, 2, lr)


@examples
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_every_update_is_that_of_the_definition_whatever_the_sizes(T, k1, k2, B):
    check_against_the_definition(T, max(k1, -(-T // 20)), k2, B, 0.1)


def test_the_two_readings_of_the_definition_agree_without_updates_and_differ_by_the_rate():
    """What docs/truncated-bptt.md says of running a window again and of going back as stored."""
    net, x, y, h0 = network(), randn(20, 2, 3), randn(20, 2, 2, seed=1), randn(1, 2, 4, seed=2)

    def apart(lr):
        again, stored = (definition(net, x, y, h0, 2, 8, lr, way)[0][-1] for way in (True, False))
        return max(abs(again[name] - stored[name]).max() for name in again)

    assert apart(0.0) == 0.0
    # To first order proportional to lr: the second order is a part of lr of that, here 1e-3.
    assert apart(1e-3) > 1e-6
    assert apart(1e-4) == pytest.approx(apart(1e-3) / 10, rel=1e-2)


@pytest.mark.parametrize(("T", "k1", "k2"), WINDOWS)
def test_without_an_optimizer_gradients_add_up_and_parameters_stay(T, k1, k2):
    net = network()
    x, y, h0 = randn(T, 2, 3), randn(T, 2, 2, seed=1), randn(1, 2, 4, seed=2)
    before, hx = parameters(net), h0.clone().requires_grad_()
    tbptt(net, x, y, mse_loss, k1=k1, k2=k2, hx=hx)
    updates = definition(net, x, y, h0, k1, k2)[0]
    expected = {name: sum(update[name] for update in updates) for name in updates[0]}
    leaves = {**dict(net.named_parameters()), "hx": hx}
    got = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}
    assert_same_tensors(got, expected)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])


# ---- the forum's recipe


def recipe(step, inputs, targets, state, loss_fn, k1, k2, optimizer):
    """discuss.pytorch.org/t/15500: a graph per step, kept, and chained by hand through ``grad``."""
    history = [(None, state)]
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
        arriving = history[-1][1].detach().requires_grad_()
        output, leaving = step(x, arriving)
        history = [*history, (arriving, leaving)][-k2:]
        if t % k1 == 0:
            optimizer.zero_grad()
            loss_fn(output, y).backward(retain_graph=k1 < k2)
            for (earlier, left), (entered, _) in zip(history[-2::-1], history[:0:-1], strict=True):
                if earlier is None:
                    break
                left.backward(entered.grad, retain_graph=k1 < k2)
            optimizer.step()


class Recorder:
    """An optimizer that changes nothing and keeps the gradients of every update."""

    def __init__(self, *parameters):
        self.parameters, self.gradients = parameters, []

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        self.gradients.append([parameter.grad.clone() for parameter in self.parameters])


def test_the_example_that_the_recipe_gets_wrong():
    """h_t = w h_{t-1}, h_0 = 0.9, w = 0.2, loss h_t: dh_t/dw = t w^(t-1) h_0.

    From its third update on, the recipe finds in ``grad`` of a state what the updates before left
    there: 0.288 instead of 0.108.
    """
    w = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    h0, nothing = torch.tensor([0.9], dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)

    def step(x, h):
        return w * h, w * h

    def piece(x, h):
        states = [w * h]
        for _ in x[1:]:
            states.append(w * states[-1])
        return torch.stack(states), states[-1]

    def loss_fn(output, target):
        return output.sum()

    theirs, ours = Recorder(w), Recorder(w)
    recipe(step, nothing, nothing, h0, loss_fn, 1, 3, theirs)
    tbptt(piece, nothing, None, loss_fn, k1=1, k2=3, hx=h0, optimizer=ours)
    assert [gradient.item() for (gradient,) in ours.gradients] == pytest.approx([0.9, 0.36, 0.108])
    assert [gradient.item() for (gradient,) in theirs.gradients] == pytest.approx(
        [0.9, 0.36, 0.288]
    )


def by_step(net):
    """net as the recipe wants it: one step at a time, (B, I) and (1, B, H)."""

    def step(x, h):
        output, h = net(x[None], h)
        return output[0], h

    return step


def test_the_recipe_leaves_out_all_losses_but_every_k1th():
    net = network(nn.RNN)
    x, y, h0 = randn(12, 2, 3), randn(12, 2, 2, seed=1), randn(1, 2, 4, seed=2)
    theirs, ours, last_only = (Recorder(*net.parameters()) for _ in range(3))
    recipe(by_step(net), x, y, h0, mse_loss, 4, 4, theirs)
    options = {"k1": 4, "hx": h0}

    def loss_of_last_step(output, target):
        return mse_loss(output[-1], target[-1])

    tbptt(net, x, y, mse_loss, **options, optimizer=ours)
    tbptt(net, x, y, loss_of_last_step, **options, optimizer=last_only)
    updates = zip(theirs.gradients, last_only.gradients, ours.gradients, strict=True)
    for theirs, last_only, ours in updates:
        for recipe_s, of_last_step, right in zip(theirs, last_only, ours, strict=True):
            assert_same("gradient", recipe_s, of_last_step, LIMIT)
            assert (recipe_s - right).abs().max() > 1e-3


def test_the_recipe_cannot_update_while_windows_overlap():
    net = network(nn.RNN)
    x, y, h0 = randn(12, 2, 3), randn(12, 2, 2, seed=1), randn(1, 2, 4, seed=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        recipe(by_step(net), x, y, h0, mse_loss, 2, 4, optimizer)
    tbptt(net, x, y, mse_loss, k1=2, k2=4, hx=h0, optimizer=optimizer)


# ---- any module


def detached(state):
    return tuple(map(torch.Tensor.detach, state)) if isinstance(state, tuple) else state.detach()


def step_by_step(module, x, y, loss_fn, k1, k2, hx, optimizer):
    """tbptt for time-major x and y: every step a call, every state kept. Returns the last state."""
    states, outputs, last = {0: hx}, {}, 0
    for end in [*range(k1, len(x), k1), len(x)]:
        start = max(0, end - k2, min(last, last + k1 - k2))
        for step in range(min(last, start), end):
            state = states[step]
            if 0 < step <= start:
                state = detached(state)
            output, states[step + 1] = module(x[step : step + 1], state)
            outputs[step] = output if step >= start else output.detach()
        loss = loss_fn(torch.cat([outputs[step] for step in range(last, end)]), y[last:end])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = end
    return detached(states[len(x)])


def flat_cross_entropy(output, target):
    return cross_entropy(output.flatten(0, 1), target.flatten())


MODULES = {
    "RNN": {"layer": RNN},
    "RNN, two layers": {"layer": RNN, "layers": 2},
    "RNN, leaky, clipped": {"layer": RNN, "alpha": 0.3, "clip_grad_h": 0.02},
    "nn.RNN": {"layer": nn.RNN},
    "nn.GRU": {"layer": nn.GRU},
    "nn.LSTM, two layers": {"layer": nn.LSTM, "layers": 2},
    "embedding, RNN, head": {"layer": RNN, "symbols": 5},
}
SOME_WINDOWS = [(13, 3, 3), (13, 3, 7), (13, 1, 4), (13, 5, 2), (13, 5, 6), (13, 20, 20)]


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("T", "k1", "k2"), SOME_WINDOWS)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_a_module_learns_as_step_by_step(options, T, k1, k2, batch_first, with_hx):
    B, loss_fn = 3, mse_loss
    ours, theirs = network(**options, batch_first=batch_first), network(**options)
    x, y = randn(T, B, 3), randn(T, B, 2, seed=1)
    if "symbols" in options:
        x, y = (torch.arange(n, n + T * B).view(T, B) ** 2 % 5 for n in (0, B))
        loss_fn = flat_cross_entropy
    hx = None
    if with_hx:
        hx = randn(options.get("layers", 1), B, 4, seed=2)
        hx = (hx, hx / 2) if options["layer"] is nn.LSTM else hx
    first, second = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.5) for m in (ours, theirs))
    expected = step_by_step(theirs, x, y, loss_fn, k1, k2, hx, second)
    if batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    _, state = tbptt(ours, x, y, loss_fn, k1=k1, k2=k2, hx=hx, optimizer=first)
    assert_same_tensors(parameters(ours), parameters(theirs))
    assert type(state) is type(expected)
    for got, right in zip(state, expected, strict=True):
        assert_same("state", got, right, LIMIT)
        assert not got.requires_grad


@pytest.mark.parametrize("layer", [RNN, nn.GRU, nn.LSTM])
def test_with_k1_equal_to_k2_the_bits_are_those_of_the_loop_everybody_writes(layer):
    ours, theirs = network(layer), network(layer)
    x, y, losses, hx = randn(13, 2, 3), randn(13, 2, 2, seed=1), [], None
    first, second = (torch.optim.Adam(m.parameters(), 0.1) for m in (ours, theirs))
    for piece, target in zip(x.split(4), y.split(4), strict=True):
        output, hx = theirs(piece, hx)
        loss = mse_loss(output, target)
        second.zero_grad()
        loss.backward()
        second.step()
        hx = detached(hx)
        losses.append(loss.item())
    seen = []
    _, state = tbptt(
        ours, x, y, mse_loss, k1=4, optimizer=first, progress=lambda *report: seen.append(report)
    )
    assert [loss.item() for _, loss, _ in seen] == losses
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert all(map(torch.equal, state, hx))


@pytest.mark.parametrize(("k1", "k2"), [(13, 13), (13, None), (40, 13), (50, 50)])
def test_with_all_steps_in_the_window_the_gradient_is_autograd_s(k1, k2):
    net, x, y = network(nn.LSTM), randn(13, 2, 3), randn(13, 2, 2, seed=1)
    hx = tuple(randn(1, 2, 4, seed=seed).requires_grad_() for seed in (2, 3))
    loss, _ = tbptt(net, x, y, mse_loss, k1=k1, k2=k2, hx=hx)
    leaves = [*net.parameters(), *hx]
    whole = mse_loss(net(x, hx)[0], y)
    assert_same("loss", loss, whole.detach(), LIMIT)
    for leaf, gradient in zip(leaves, torch.autograd.grad(whole, leaves), strict=True):
        assert_same("gradient", leaf.grad, gradient, LIMIT)


def summed_mse(output, target):
    return mse_loss(output, target, reduction="sum")


@pytest.mark.parametrize("k", [1, 3, 5, 12, 20])
def test_one_call_of_rnn_truncate_is_k1_equal_to_k2_without_updates(k):
    ours, theirs = network(), network(truncate=k)
    x, y, hx = randn(12, 2, 3), randn(12, 2, 2, seed=1), randn(1, 2, 4, seed=2)
    tbptt(ours, x, y, summed_mse, k1=k, hx=hx)
    summed_mse(theirs(x, hx)[0], y).backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same("gradient", got.grad, expected.grad, LIMIT)


@pytest.mark.parametrize(("k1", "k2"), [(7, 7), (7, 5)])
def test_a_module_that_truncates_counts_from_the_beginning_of_the_window(k1, k2):
    """And with k1 = k2 = 7 and truncate=3 all losses give a gradient, over at most 3 steps."""
    ours, theirs = network(truncate=3), network()
    x, y = randn(14, 2, 3), randn(14, 2, 2, seed=1)
    tbptt(ours, x, y, mse_loss, k1=k1, k2=k2)
    hx = None
    for first in (0, 7):
        outputs = []
        for step in range(first, first + 7):
            start = first + k1 - k2
            if hx is not None and (step <= start or (step - start) % 3 == 0):
                hx = hx.detach()
            output, hx = theirs(x[step : step + 1], hx)
            outputs.append(output if step >= start else output.detach())
        mse_loss(torch.cat(outputs), y[first : first + 7]).backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same("gradient", got.grad, expected.grad, LIMIT)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("T", "k1", "k2"), SOME_WINDOWS)
def test_reset_and_lengths_go_along_with_the_pieces(T, k1, k2, batch_first):
    B, lengths = 4, torch.tensor([T, 0, 1, 7])
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.2
    x, y, hx = randn(T, B, 3), randn(T, B, 2, seed=1), randn(1, B, 4, seed=2)
    exists = (torch.arange(T)[:, None] < lengths)[..., None].double()

    class ByHand(Network):
        """The same with a torch.where after every step; x also holds reset and exists."""

        def forward(self, input, hx):
            x, restart, exists = input.split([3, 1, 1], -1)
            output, state = self.layer(x, torch.where(restart.bool(), 0.0, hx))
            return self.head(output) * exists, torch.where(exists.bool(), state, hx)

    ours, theirs = network(batch_first=batch_first), network()
    theirs = ByHand(theirs.layer, theirs.head)
    first, second = (torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs))
    everything = torch.cat([x, reset[..., None], exists], -1)
    expected = step_by_step(theirs, everything, y * exists, mse_loss, k1, k2, hx, second)

    target = torch.cat([y * exists, exists], -1)
    if batch_first:
        x, target, reset = (tensor.transpose(0, 1) for tensor in (x, target, reset))

    def masked(output, target):
        return mse_loss(output * target[..., 2:], target[..., :2])

    _, state = tbptt(
        ours, x, target, masked, k1=k1, k2=k2, hx=hx, optimizer=first,
        lengths=lengths.tolist() if batch_first else lengths, reset=reset,
    )  # fmt: skip
    assert_same_tensors(parameters(ours), parameters(theirs))
    assert_same("hx", state, expected, LIMIT)


@pytest.mark.parametrize(("k1", "k2"), [(3, 7), (5, 2), (4, 4)])
def test_tuples_and_dicts_of_tensors(k1, k2):
    one, other = network(), network(nn.LSTM)
    x, y = randn(13, 2, 3), randn(13, 2, 2, seed=1)

    def module(input, hx):
        first, one_hx = one(input["x"], hx and hx["one"])
        second, other_hx = other(input["more"][0], hx and hx["other"])
        return (first, [second]), {"one": one_hx, "other": other_hx}

    def loss_fn(output, target):
        assert isinstance(output[1], list)
        return mse_loss(output[0], target) + mse_loss(output[1][0], target)

    tbptt(module, {"x": x, "more": (2 * x,)}, y, loss_fn, k1=k1, k2=k2)
    alone, apart = network(), network(nn.LSTM)
    tbptt(alone, x, y, mse_loss, k1=k1, k2=k2)
    tbptt(apart, 2 * x, y, mse_loss, k1=k1, k2=k2)
    learned = [*one.parameters(), *other.parameters()]
    for got, expected in zip(learned, [*alone.parameters(), *apart.parameters()], strict=True):
        assert_same("gradient", got.grad, expected.grad, LIMIT)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(("k1", "k2"), [(3, 7), (5, 2), (4, 4)])
def test_no_rows_and_float32(rows, k1, k2):
    rnn = RNN(3, 4)
    loss, hx = tbptt(
        rnn, torch.randn(9, rows, 3), None, lambda o, _: o.square().sum(), k1=k1, k2=k2
    )
    assert loss.dtype == hx.dtype == torch.float32
    assert hx.shape == (1, rows, 4)
    assert all((p.grad != 0).any() == (rows > 0) for p in rnn.parameters())


# ---- state, hooks, cost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_mean_of_narrow_losses_is_added_up_in_float32_and_rounded_once(dtype):
    """Losses of 1 and, in the last update, 129. Float16 ends at 65504, and bfloat16 has no 257;
    float32 has every number here but the quotient."""
    for steps, k1 in ((70_001, 1000), (258, 257)):
        input = torch.ones(steps, 1, dtype=dtype)
        input[-1] = 129
        loss, _ = tbptt(requiring_grad, input, None, last_of, k1=k1)
        assert steps % k1 == 1
        assert loss.dtype == dtype
        assert loss.item() == torch.tensor((steps - 1 + 129) / steps, dtype=dtype).item()


def requiring_grad(x, hx):
    return x.clone().requires_grad_(), hx


def last_of(output, target):
    return output[-1, 0]


def test_the_state_is_carried_over_from_call_to_call():
    whole, halves = network(nn.LSTM), network(nn.LSTM)
    x, y, hx = randn(16, 2, 3), randn(16, 2, 2, seed=1), None
    first, second = (torch.optim.SGD(m.parameters(), 0.1) for m in (whole, halves))
    loss, state = tbptt(whole, x, y, mse_loss, k1=4, optimizer=first)
    losses = []
    for piece, target in zip(x.split(8), y.split(8), strict=True):
        half, hx = tbptt(halves, piece, target, mse_loss, k1=4, hx=hx, optimizer=second)
        losses.append(half)
    assert all(map(torch.equal, whole.parameters(), halves.parameters()))
    assert all(map(torch.equal, state, hx))
    assert_same("loss", loss, torch.stack(losses).mean(), LIMIT)


@pytest.mark.parametrize(("k1", "k2"), [(3, 7), (4, 4)])
def test_an_initial_state_is_learned(k1, k2):
    """It is in the optimizer: every window that begins at step 0 begins at what it is then."""

    class WithStart(Network):
        def forward(self, input, hx=None):
            return super().forward(input, self.start if hx is None else hx)

    ours, theirs = network(), network()
    theirs = WithStart(theirs.layer, theirs.head)
    theirs.start = nn.Parameter(randn(1, 2, 4, seed=2))
    x, y, hx = randn(13, 2, 3), randn(13, 2, 2, seed=1), theirs.start.detach().clone()
    first = torch.optim.SGD([*ours.parameters(), hx.requires_grad_()], lr=0.1)
    tbptt(ours, x, y, mse_loss, k1=k1, k2=k2, hx=hx, optimizer=first)
    second = torch.optim.SGD(theirs.parameters(), lr=0.1)
    step_by_step(theirs, x, y, mse_loss, k1, k2, None, second)
    assert_same("hx", hx.detach(), theirs.start.detach(), LIMIT)
    assert (hx - randn(1, 2, 4, seed=2)).abs().max() > 1e-4


@pytest.mark.parametrize(("k1", "k2"), [(3, 7), (5, 2)])
def test_before_update_stands_between_backward_and_step(k1, k2):
    net, x, y = network(), randn(13, 2, 3), 10 * randn(13, 2, 2, seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before, called = parameters(net), []

    def clip():
        assert_same_tensors(parameters(net), before)
        norm = clip_grad_norm_(net.parameters(), 0.01)
        assert norm > 0.1
        called.append("clip")

    def progress(*_):
        nonlocal before
        after = parameters(net)
        change = sum((after[name] - before[name]).square().sum() for name in after).sqrt()
        # clip_grad_norm_ divides by norm + 1e-6: less than 1e-5 of it.
        assert change.item() == pytest.approx(0.01, rel=1e-5)
        before = after
        called.append("progress")

    tbptt(
        net,
        x,
        y,
        mse_loss,
        k1=k1,
        k2=k2,
        optimizer=optimizer,
        before_update=clip,
        progress=progress,
    )
    assert called == ["clip", "progress"] * -(-13 // k1)


@pytest.mark.parametrize(
    ("T", "k1", "k2"), [*WINDOWS, (1000, 10, 10), (1000, 10, 40), (1000, 40, 10)]
)
def test_module_is_called_on_pieces_and_loss_fn_once_an_update(T, k1, k2):
    net, calls, pieces = network(), [], []

    def module(input, hx):
        calls.append((len(input), torch.is_grad_enabled()))
        return net(input, hx)

    def loss_fn(output, target):
        pieces.append(len(output))
        return mse_loss(output, target)

    tbptt(module, randn(T, 1, 3), randn(T, 1, 2), loss_fn, k1=k1, k2=k2)
    updates = -(-T // k1)
    assert pieces == [k1] * (T // k1) + [T % k1] * (T % k1 > 0)
    assert len(calls) <= (updates if k1 == k2 else 2 * updates)
    # The arithmetic of docs/truncated-bptt.md.
    if T % k1 == 0:
        assert sum(n for n, gradient in calls if gradient) == sum(
            min(k2, end) for end in range(k1, T + 1, k1)
        )
    without = sum(n for n, gradient in calls if not gradient)
    assert without == sum(max(0, n - k2) for n in pieces)


def kept_at_most(T, k1, k2):
    """The most numbers that autograd keeps at a time."""
    net, alive, most = network(nn.RNN), weakref.WeakSet(), 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal most
        kept = Kept(tensor)
        alive.add(kept)
        most = max(most, sum(kept.tensor.numel() for kept in alive))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        tbptt(net, randn(T, 1, 3), randn(T, 1, 2), mse_loss, k1=k1, k2=k2)
    gc.collect()
    assert not alive
    return most


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (5, 10), (2, 10), (10, 5)])
def test_the_memory_of_autograd_does_not_grow_with_the_sequence(k1, k2):
    assert kept_at_most(20, k1, k2) == kept_at_most(80, k1, k2) < kept_at_most(80, 80, 80) / 2


# ---- mistakes

X, Y = torch.zeros(6, 2, 3), torch.zeros(6, 2, 4)


def computed(*shape):
    return torch.zeros(*shape, requires_grad=True) * 2


MISTAKES = {
    "k1 0": (dict(k1=0), ValueError, "k1 must be a positive int, got 0"),
    "k1 float": (dict(k1=2.0), TypeError, "k1 must be a positive int, got 2.0"),
    "k1 bool": (dict(k1=True), TypeError, "k1 must be a positive int, got True"),
    "k2 negative": (dict(k2=-1), ValueError, "k2 must be a positive int, got -1"),
    "k2 text": (dict(k2="2"), TypeError, "k2 must be a positive int, got '2'"),
    "module": (dict(module=3), TypeError, "module must be callable, got int"),
    "bidirectional": (
        dict(module=RNN(3, 2, bidirectional=True)), ValueError, "run forward in time",
    ),
    "batch_first of other": (
        dict(module=RNN(3, 4, batch_first=True), batch_first=False), ValueError,
        "batch_first must be that of module, expected True, got False",
    ),
    "batch_first too much": (dict(batch_first=True), ValueError, "expected False, got True"),
    "bidirectional inside": (
        dict(module=Network(nn.LSTM(3, 2, bidirectional=True), nn.Identity())), ValueError,
        "got LSTM with bidirectional=True",
    ),
    "batch_first of either kind": (
        dict(module=nn.Sequential(RNN(3, 4), RNN(4, 4, batch_first=True))), ValueError,
        "batch_first must be given",
    ),
    "truncate": (
        dict(module=RNN(3, 4, truncate=3), k2=4), ValueError,
        "expected truncate=None, got truncate=3",
    ),
    "truncate inside": (
        dict(module=Network(RNN(3, 4, truncate=3), nn.Identity()), k2=4), ValueError,
        "expected truncate=None, got truncate=3",
    ),
    "optimizer": (dict(optimizer=0.1), TypeError, "zero_grad() and step(), got float"),
    "no input": (dict(input=None), TypeError, "input must be a tensor, got none: None"),
    "input a list of numbers": (dict(input=[1.0]), TypeError, "got float"),
    "packed input": (dict(input=pack_sequence([X[:, 0]])), TypeError, "got a PackedSequence: pad"),
    "packed target": (dict(target=pack_sequence([Y[:, 0]])), TypeError, "target must be a tensor"),
    "no steps": (dict(input=X[:0], target=Y[:0]), ValueError, "at least one step, got 0"),
    "no dimensions": (dict(input=X[0, 0, 0]), ValueError, "have time as dimension 0, got ()"),
    "target too short": (
        dict(target=Y[:5]), ValueError,
        "target must have as many steps as input, expected 6 in dimension 0, got (5, 2, 4)",
    ),
    "reset too long": (dict(reset=torch.zeros(7, 2, dtype=torch.bool)), ValueError, "reset must"),
    "reset not bool": (dict(reset=torch.zeros(6, 2)), TypeError, "reset must be a bool tensor"),
    "lengths too long": (dict(lengths=[6, 7]), ValueError, "expected 0 to 6, got 7 in row 1"),
    "lengths of other rows": (dict(lengths=[6]), ValueError, "expected (2,) torch.int64"),
    "lengths, no batch": (dict(input=X[:, 0, 0], lengths=[6]), ValueError, "must have a batch"),
    "hx": (dict(hx=3), TypeError, "hx must be a tensor or tuples, lists and dicts"),
    "input computed": (dict(input=computed(6, 2, 3)), ValueError, "3 updates would go back"),
    "target computed": (dict(target=computed(6, 2, 4)), ValueError, "target must not be computed"),
    "hx computed": (
        dict(hx=computed(1, 2, 4), k2=4), ValueError,
        "hx must not be computed from what requires a gradient, as 2 updates would",
    ),
    "module without state": (dict(module=lambda x, hx: x), TypeError, "must return (output, hx)"),
    "module of last outputs": (
        dict(module=lambda x, hx: (x[-1], hx), k1=3), ValueError,
        "expected 3 in dimension 0, got (2, 3)",
    ),
    "module with a packed state": (
        dict(module=lambda x, hx: (x, pack_sequence([x[:, 0]]))), TypeError,
        "hx of module must be a tensor",
    ),
    "loss a number": (dict(loss_fn=lambda o, y: 1.0), TypeError, "return a tensor, got float"),
    "loss not reduced": (
        dict(loss_fn=nn.MSELoss(reduction="none")), ValueError, "of shape (), got (2, 2, 4)",
    ),
    "nothing to learn": (
        dict(module=RNN(3, 4).requires_grad_(False)), RuntimeError, "must depend on parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change, kind, text):
    arguments = {"module": RNN(3, 4), "input": X, "target": Y, "loss_fn": mse_loss, "k1": 2}
    with pytest.raises(kind, match=re.escape(text)):
        tbptt(**{**arguments, **change})


def test_batch_first_of_a_function_is_what_is_said():
    net = network(batch_first=True)
    x, y = randn(2, 13, 3), randn(2, 13, 2, seed=1)
    expected, _ = tbptt(net, x, y, mse_loss, k1=3)
    got, _ = tbptt(lambda *given: net(*given), x, y, mse_loss, k1=3, batch_first=True)
    assert torch.equal(got, expected)


def test_what_is_said_of_batch_first_goes_before_the_layers_inside():
    """A module that turns its tensors for the layer inside."""

    class Turned(Network):
        def forward(self, input, hx):
            output, hx = super().forward(input.transpose(0, 1), hx)
            return output.transpose(0, 1), hx

    net = network(batch_first=True)
    turned = Turned(net.layer, net.head)
    x, y = randn(13, 2, 3), randn(13, 2, 2, seed=1)
    expected, _ = tbptt(net, x.transpose(0, 1), y.transpose(0, 1), mse_loss, k1=3)
    got, _ = tbptt(turned, x, y, mse_loss, k1=3, batch_first=False)
    assert_same("loss", got, expected, LIMIT)


def test_without_grad_mode_there_is_nothing_to_learn():
    with torch.no_grad(), pytest.raises(RuntimeError, match="with grad mode on"):
        tbptt(RNN(3, 4), X, Y, mse_loss, k1=2)


def test_what_one_update_goes_back_through_may_be_computed():
    """An encoder that makes hx, where only the first window begins at step 0."""
    encoder, rnn = nn.Linear(1, 4), RNN(3, 4)
    hx = encoder(torch.ones(1, 2, 1))
    tbptt(rnn, X, Y, mse_loss, k1=2, hx=hx)
    assert (encoder.weight.grad != 0).any()
    tbptt(rnn, computed(6, 2, 3), Y, mse_loss, k1=6)


# ---- the guide


def test_the_guide_s_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), names)


def test_autocast_around_it_sees_every_update():
    """Autocast keeps narrow copies of weights until it ends, which here is after all updates."""
    torch.manual_seed(0)
    model, head = nn.LSTM(3, 8), nn.Linear(8, 2)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    x, y = torch.randn(3, 4, 3).repeat(5, 1, 1), torch.randn(3, 4, 2).repeat(5, 1, 1)
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tbptt(
            lambda x, _: (head(model(x)[0]), None),
            x,
            y,
            lambda output, target: (output.float() - target).square().mean(),
            k1=3,
            optimizer=optimizer,
            progress=lambda steps, loss, updates: losses.append(loss.item()),
        )
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]
