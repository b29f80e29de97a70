"""torch.set_default_device is for the tensors of users: the package puts its own where they belong.

The default is set to meta, whose tensors have no values: one of ours that lands there is an error.
"""

import pytest
import torch
from pairs import randn
from torch.nn.utils.rnn import pack_padded_sequence

import torch_bptt
from torch_bptt import RNN, ElmanNetwork, RNNCell, functional

X, LENGTHS = randn(5, 3, 2), [5, 2, 4]
RESET = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()


def rnn(**options):
    torch.manual_seed(0)
    return RNN(2, 4, dtype=torch.float64, **options)


def gradients(module, create_graph=False, **options):
    def call():
        x = X.clone().requires_grad_()
        input = options.get("input", x)
        given = {name: value for name, value in options.items() if name != "input"}
        output, h_n = module(input, **given)
        leaves = [x, *module.parameters()] if input is x else list(module.parameters())
        flat = getattr(output, "data", output) if input is not x else output
        loss = flat.square().sum() + h_n.sum()
        found = torch.autograd.grad(loss, leaves, create_graph=create_graph)
        if create_graph:
            loss = sum(g.square().sum() for g in found)
            found = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return [h_n, *found]

    return call


def tangent(module, input):
    def call():
        data = input.data

        def run(data):
            return module(input._replace(data=data))[1]

        return torch.func.jvp(run, (data,), (data.flip(0),))

    return call


def loss_of_elman():
    torch.manual_seed(0)
    net = ElmanNetwork(2, 4, 3, dtype=torch.float64)
    target = randn(5, 3, 3)

    def call():
        loss, _ = net.loss(X, target, lengths=LENGTHS)
        return [loss, *torch.autograd.grad(loss, list(net.parameters()))]

    return call


def flow():
    module = rnn(num_layers=2)

    def call():
        with torch_bptt.diagnose.gradient_flow(module) as watched:
            output, _ = module(X, lengths=LENGTHS)
            output.sum().backward()
        found = [(layer.norms, layer.rms_by_step, layer.log_norms) for layer in watched]
        return [tensor for tensors in found for tensor in tensors]

    return call


def spectrum():
    module = rnn()

    def call():
        [layer] = torch_bptt.diagnose.jacobian_spectrum(module, X, window=2, exponents=2)
        [weights] = torch_bptt.diagnose.weights(module)
        return [layer.singular_values, layer.lyapunov, weights.eigenvalues]

    return call


def one_step_at_a_time():
    torch.manual_seed(0)
    cell = RNNCell(2, 4, dtype=torch.float64)
    return lambda: [cell(X[0]), cell(X[0, 0])]


def in_function():
    module = rnn()
    weights = [w.detach() for w in module._flat_weights]
    return lambda: list(functional.rnn(X, None, *weights, lengths=LENGTHS))


PACKED = pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
CALLS = {
    "dense": gradients(rnn(), reset=RESET),
    "both directions": gradients(rnn(bidirectional=True, num_layers=2)),
    "options": gradients(rnn(learn_h0=True, alpha=0.3, truncate=2, clip_grad_h=0.5), reset=RESET),
    "lengths": gradients(rnn(truncate=2), lengths=LENGTHS, reset=RESET),
    "packed": gradients(rnn(bidirectional=True), input=PACKED, reset=RESET),
    "second derivative": gradients(rnn(truncate=2), True, reset=RESET),
    "second derivative, packed": gradients(
        rnn(bidirectional=True, truncate=2), True, input=PACKED, reset=RESET
    ),
    "checkpoint": gradients(rnn(checkpoint=2), lengths=LENGTHS, reset=RESET),
    "jvp": tangent(rnn(), PACKED),
    "loss": loss_of_elman(),
    "gradient_flow": flow(),
    "spectrum": spectrum(),
    "cell": one_step_at_a_time(),
    "function": in_function(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_lands_on_the_default_device(call):
    expected = call()
    with torch.device("meta"):
        got = call()
    for a, b in zip(got, expected, strict=True):
        assert a.device == b.device
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
