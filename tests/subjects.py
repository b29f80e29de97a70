"""What PyTorch's tools are tried on: every form in which a module of ours is called, and the loop
in plain PyTorch that says what each has to give.

To add a form, add a line to FORMS.
"""

import plain
import torch
from pairs import assert_same, randn
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_bptt

I, H, STEPS, ROWS = 3, 5, 6, 4  # noqa: E741
LENGTHS = [2, 6, 3, 1]

# Name -> arguments of RNN beside the sizes, and what is given to forward beside the input.
FORMS = {
    "batch": ({}, ()),
    "layers and directions": ({"num_layers": 2, "bidirectional": True}, ("hx",)),
    "packed": ({"num_layers": 2, "bidirectional": True}, ("hx", "packed")),
    "lengths": ({"bidirectional": True}, ("hx", "lengths")),
    "reset": ({"bidirectional": True}, ("hx", "reset")),
    "leaky": ({"alpha": 0.3, "learn_h0": True, "nonlinearity": "sigmoid"}, ()),
    "everything": (
        {"num_layers": 2, "bidirectional": True, "alpha": 0.3, "learn_h0": True, "truncate": 4},
        ("lengths", "reset"),
    ),
    "cell": (None, ("hx",)),
}
OF_NN_RNN = ["batch", "layers and directions", "packed", "cell"]  # those that torch.nn has as well


def make(form, package=torch_bptt, **where):
    """A module of a form, with the parameters that it draws."""
    options, _ = FORMS[form]
    if options is None:
        return package.RNNCell(I, H, **where)
    return package.RNN(I, H, **options, **where)


class Subject:
    """A module, the tensors it is called with, and the two ways to call it.

    Both ways return (output, h_n), output (T, B, D*H) with zeros past the end of rows; of a cell
    the next state alone.
    """

    def __init__(self, form, dtype=torch.float64, device="cpu", package=torch_bptt):
        torch.manual_seed(0)
        self.net, self.given = make(form, package).double(), FORMS[form][1]
        self.cell = form == "cell"
        for name, parameter in self.net.named_parameters():
            nn.init.uniform_(parameter, -0.35, 0.35)
            if "weight" in name:  # no step amplifies an error: the limits of tests build on it
                assert torch.linalg.matrix_norm(parameter, 2) < 1, name
        states = 1 if self.cell else len(self.net._all_weights)
        self.x = randn(STEPS, ROWS, I)
        self.hx = randn(states, ROWS, H, seed=1) if "hx" in self.given else None
        self.reset = torch.zeros(STEPS, ROWS, dtype=torch.bool)
        self.reset[[0, 2, 3], [1, 1, 2]] = True
        self.to(device, dtype)

    def to(self, device, dtype):
        self.net.to(device, dtype)
        self.x = self.x.to(device, dtype).requires_grad_()
        if self.hx is not None:
            self.hx = self.hx.to(device, dtype).requires_grad_()
        self.reset = self.reset.to(device)

    @property
    def tensors(self):
        return (self.x,) if self.hx is None else (self.x, self.hx)

    @property
    def leaves(self):
        return [*self.tensors, *self.net.parameters()]

    def call(self, x, hx=None):
        if self.cell:
            return (self.net(x[0], hx[0]),)
        if "packed" in self.given:
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            output, h_n = self.net(packed, hx)
            return pad_packed_sequence(output, total_length=STEPS)[0], h_n
        return self.net(x, hx, **self.more())

    def more(self):
        made = {"lengths": LENGTHS, "reset": self.reset}
        return {name: value for name, value in made.items() if name in self.given}

    def loop(self, x, hx=None):
        """The same, from the definition. It looks at every weight once, as call does."""
        net = self.net
        for hook in net._forward_pre_hooks.values():  # where pruning computes weights
            hook(net, ())
        with nn.utils.parametrize.cached():
            if self.cell:
                z = x[0] @ net.weight_ih.T + hx[0] @ net.weight_hh.T + net.bias_ih + net.bias_hh
                return (torch.tanh(z),)
            more = {"lengths": LENGTHS} if "packed" in self.given else self.more()
            return plain.run(net, x, hx, **more)


def gradients(results, leaves, **options):
    """Of a random weighted sum of results; zeros where there is none."""
    total = sum((part * randn(*part.shape, seed=9).to(part)).sum() for part in results)
    return torch.autograd.grad(total, leaves, materialize_grads=True, **options)


def assert_same_results(got, expected, leaves, limit=None):
    """Two tuples of tensors, and the gradients of both."""
    options = {} if limit is None else {"limit": limit}
    for index, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert_same(f"result {index}", mine, other, **options)
    both = gradients(got, leaves), gradients(expected, leaves)
    for index, (mine, other) in enumerate(zip(*both, strict=True)):
        assert_same(f"gradient {index}", mine, other, **options)


def assert_same_bits(got, expected):
    for index, (mine, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(mine, other), f"tensor {index}"
