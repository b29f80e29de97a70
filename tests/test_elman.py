"""ElmanNetwork: predictions and losses against a literal loop, memory, derivatives, errors.

``literal`` is the definition: one row at a time, one step at a time, one loss at a time, each
written with elementary operations. It knows no batch, no packing, no mask and no chunk.
"""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from pairs import assert_same, examples, randn
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bptt
from torch_bptt import ElmanNetwork

NONLINEARITIES = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}
ACTIVATIONS = {
    "identity": lambda o: o,
    "sigmoid": lambda o: 1 / (1 + torch.exp(-o)),
    "softmax": lambda o: torch.exp(o) / torch.exp(o).sum(),
}
LOSSES = {  # of one prediction: from o, yhat, y, each (K,), or y a class
    "mse": lambda o, yhat, y: ((yhat - y) ** 2).sum() / len(o),
    "half_squared_error": lambda o, yhat, y: ((yhat - y) ** 2).sum() / 2,
    "cross_entropy": lambda o, yhat, y: -(
        ACTIVATIONS["softmax"](o).log() * (F.one_hot(y, len(o)) if y.dim() == 0 else y)
    ).sum(),
    "binary_cross_entropy": lambda o, yhat, y: -(
        y * ACTIVATIONS["sigmoid"](o).log() + (1 - y) * ACTIVATIONS["sigmoid"](-o).log()
    ).sum()
    / len(o),
}


def literal_states(rnn, x, h0, starts):
    """(states (T, D*H) of the last layer, h_n (L*D, H)) of one row x, (T, I).

    starts[t]: the row starts from zero before step t.
    """
    directions, h_n = 2 if rnn.bidirectional else 1, []
    for layer in range(rnn.num_layers):
        outputs = []
        for name in [f"l{layer}", f"l{layer}_reverse"][:directions]:
            W, U = getattr(rnn, f"weight_ih_{name}"), getattr(rnn, f"weight_hh_{name}")
            b = getattr(rnn, f"bias_ih_{name}") + getattr(rnn, f"bias_hh_{name}") if rnn.bias else 0
            h, states = h0[len(h_n)], {}
            steps = range(len(x))
            for t in reversed(steps) if name.endswith("reverse") else steps:
                cut = t + 1 if name.endswith("reverse") else t
                if cut < len(x) and starts[cut]:
                    h = torch.zeros_like(h)
                h = states[t] = NONLINEARITIES[rnn.nonlinearity](W @ x[t] + U @ h + b)
            outputs.append([states[t] for t in steps])
            h_n.append(h)
        x = [torch.cat(together) for together in zip(*outputs, strict=True)]
    return x, torch.stack(h_n)


def literal(network, x, h0, starts):
    """(o, yhat) of one row: lists over its steps; many_to_one: over the one prediction."""
    states, h_n = literal_states(network.rnn, x, h0, starts)
    if network.many_to_one:
        states = [torch.cat(list(h_n[-2 if network.rnn.bidirectional else -1 :]))]
    c = 0 if network.head.bias is None else network.head.bias
    o = [network.head.weight @ h + c for h in states]
    return o, [ACTIVATIONS[network.output_activation](each) for each in o], h_n


def literal_loss(network, problem, loss, reduction):
    """The loss of a ``Problem`` whose input, hx and targets are those of its rows."""
    sums, lasts, count = [], [], 0
    for b in range(problem.rows):
        length = problem.lengths[b]
        o, yhat, _ = literal(
            network, problem.x[:length, b], problem.hx[:, b], problem.starts[:length, b]
        )
        own = []
        for t in range(len(o)):
            y = problem.y[b] if network.many_to_one else problem.y[t, b]
            counts = problem.mask[b] if network.many_to_one else problem.mask[t, b]
            if counts and not (y.dim() == 0 and y == -100):
                own.append(LOSSES[loss](o[t], yhat[t], y))
        sums += own
        lasts += own[-1:]
        count += len(own)
    total = sum(lasts if reduction == "last" else sums)
    return total / {"sum": 1, "mean": count, "last": len(lasts)}[reduction]


# ---- one problem in every layout

FITTING = [
    (loss, activation)
    for loss in LOSSES
    for activation in ACTIVATIONS
    if (loss, activation)
    not in {("cross_entropy", "sigmoid"), ("binary_cross_entropy", "softmax")}
]


class Problem:
    """Rows as the literal loop wants them, (T, B, ...), and as arguments in a layout."""

    def __init__(self, network, steps, lengths, *, loss, classes=True, mask, starts, ignore=False):
        generator = torch.Generator().manual_seed(steps + len(lengths))
        self.network, self.lengths, self.rows = network, lengths, len(lengths)
        rnn, K = network.rnn, network.head.out_features
        states = rnn.num_layers * (2 if rnn.bidirectional else 1)
        self.x = randn(steps, self.rows, rnn.input_size)
        self.hx = randn(states, self.rows, rnn.hidden_size, seed=1)
        shape = (self.rows,) if network.many_to_one else (steps, self.rows)
        self.mask = torch.ones(shape, dtype=torch.bool)
        if mask:
            self.mask = torch.rand(shape, generator=generator) < 0.7
        self.starts = torch.zeros(steps, self.rows, dtype=torch.bool)
        if starts:
            self.starts = torch.rand(self.starts.shape, generator=generator) < 0.3
        if loss == "cross_entropy" and classes:
            self.y = torch.randint(K, shape, generator=generator)
            if ignore:
                self.y[torch.rand(shape, generator=generator) < 0.3] = -100
        else:
            self.y = torch.rand(*shape, K, generator=generator, dtype=torch.float64)
            self.y = self.y / self.y.sum(-1, keepdim=True)

    def leaves(self):
        self.x.requires_grad_()
        self.hx.requires_grad_()
        return {"x": self.x, "hx": self.hx, **dict(self.network.named_parameters())}

    def arguments(self, layout):
        """(input, target, hx) and the options, in the words of the layout."""
        existing = torch.arange(len(self.x))[:, None] < torch.tensor(self.lengths)
        y, options = self.y, {}
        if not self.network.many_to_one:  # what does not count may be anything
            nothing = -7 if y.dtype == torch.int64 else float("nan")
            counts = existing & self.mask
            y = torch.where(counts if y.dim() == 2 else counts[..., None], y, nothing)
        x = torch.where(existing[..., None], self.x, float("nan"))
        if not bool(self.mask.all()):
            options["mask"] = self.mask
        if bool(self.starts.any()):
            options["reset"] = self.starts
        if layout.startswith("packed"):
            sort = sorted(self.lengths, reverse=True) == self.lengths

            def pack(tensor):
                return pack_padded_sequence(tensor, self.lengths, enforce_sorted=sort)

            x = pack(self.x)
            if layout == "packed all" and not self.network.many_to_one:
                y = pack(y)
                options = {n: pack(v) if n == "mask" else v for n, v in options.items()}
            return (x, y, self.hx), options
        if min(self.lengths) < len(self.x):
            options["lengths"] = self.lengths
        if layout == "batch_first":
            x = x.transpose(0, 1)
            flip = {"reset"} if self.network.many_to_one else {"reset", "mask"}
            y = y if self.network.many_to_one else y.transpose(0, 1)
            options = {n: v.transpose(0, 1) if n in flip else v for n, v in options.items()}
        if layout == "one":
            x, hx = x[:, 0], self.hx[:, 0]
            last = {n: v[0] for n, v in options.items() if n == "lengths"}
            y = y[0] if self.network.many_to_one else y[:, 0]
            rest = {n: v[..., 0] for n, v in options.items() if n not in last}
            return (x, y, hx), last | rest
        return (x, y, self.hx), options


@st.composite
def problems(draw):
    """(problem, arguments, options, loss, reduction)."""
    layout = draw(st.sampled_from(["batch", "batch_first", "one", "packed", "packed all"]))
    many_to_one = draw(st.booleans())
    loss, activation = draw(st.sampled_from(FITTING))
    torch.manual_seed(0)
    network = ElmanNetwork(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        output_activation=activation,
        many_to_one=many_to_one,
        num_layers=draw(st.integers(1, 2)),
        nonlinearity=draw(st.sampled_from(sorted(NONLINEARITIES))),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        batch_first=layout == "batch_first",
        dtype=torch.float64,
    )
    steps, rows = draw(st.integers(1, 5)), 1 if layout == "one" else draw(st.integers(1, 3))
    shortest = 1 if layout.startswith("packed") else 0
    lengths = [steps] * rows
    if layout.startswith("packed") or draw(st.booleans()):
        lengths = draw(st.lists(st.integers(shortest, steps), min_size=rows, max_size=rows))
    steps = max(lengths) if layout.startswith("packed") else steps
    flags = {name: draw(st.booleans()) for name in ("classes", "mask", "starts", "ignore")}
    problem = Problem(network, steps, lengths, loss=loss, **flags)
    reduction = draw(st.sampled_from(["sum", "mean"] if many_to_one else ["sum", "mean", "last"]))
    return problem, layout, loss, reduction, draw(st.sampled_from([1, 3, 1000, None]))


@examples
@given(problems())
def test_loss_is_the_literal_one(drawn):
    problem, layout, loss, reduction, chunk = drawn
    network, leaves = problem.network, problem.leaves()
    (x, y, hx), options = problem.arguments(layout)
    got, _ = network.loss(x, y, hx, loss=loss, reduction=reduction, chunk=chunk, **options)
    nothing_counts = False
    try:
        expected = literal_loss(network, problem, loss, reduction)
    except ZeroDivisionError:
        nothing_counts = True
    if nothing_counts:
        assert got.isnan()
        return
    assert_same("loss", got, torch.as_tensor(expected, dtype=torch.float64))
    if not torch.is_tensor(expected):  # the sum of nothing
        return
    for name, mine, other in zip(
        leaves,
        torch.autograd.grad(got, list(leaves.values()), materialize_grads=True),
        torch.autograd.grad(expected, list(leaves.values()), materialize_grads=True),
        strict=True,
    ):
        assert_same(f"grad of {name}", mine, other)


@examples
@given(problems())
def test_predictions_are_the_literal_ones(drawn):
    problem, layout, *_ = drawn
    network = problem.network
    (x, _, hx), options = problem.arguments(layout)
    options.pop("mask", None)
    prediction, h_n = network(x, hx, **options)
    if isinstance(prediction, PackedSequence):
        prediction, _ = pad_packed_sequence(prediction)
    if layout == "one":
        prediction, h_n = prediction[None] if network.many_to_one else prediction[:, None], h_n[:, None]
    if layout == "batch_first" and not network.many_to_one:
        prediction = prediction.transpose(0, 1)
    for b, length in enumerate(problem.lengths):
        row = problem.x[:length, b], problem.hx[:, b], problem.starts[:length, b]
        _, yhat, final = literal(network, *row)
        assert_same("h_n", h_n[:, b], final)
        own = prediction[b][None] if network.many_to_one else prediction[:length, b]
        if len(own):
            assert_same("prediction", own, torch.stack(yhat))
