"""torch.nn.RNN and torch_bptt.RNN side by side: the same parameters, inputs and gradients.

``networks_with_input`` draws what the tests compare on; to cover a new argument of nn.RNN, add
a line to it.
"""

import copy
import dataclasses

import hypothesis
import hypothesis.strategies as st
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torch_bptt

# The same examples in every run.
examples = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

# Two float64 runs that add in another order. The drawn networks have at most 3 layers, 6 steps and
# sums of at most 16 terms, so that forward and back a number passes through fewer than 600
# roundings of 1.1e-16, and their recurrent matrices, with entries below H^-1/2, stretch a vector
# less than sqrt(5) per step: together below 600 * 1.1e-16 * 5^3 = 8e-12 of the largest entry.
# A wrong term changes a result by more than 1e-4.
LIMIT = 8e-12


def assert_same(name, got, expected, limit=LIMIT):
    """Equal shapes and dtypes; values to ``limit`` of the largest expected entry, or of 1."""
    assert got.shape == expected.shape, f"{name}: {got.shape=}, {expected.shape=}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype=}, {expected.dtype=}"
    if got.numel():
        error = (got - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= limit * scale, f"{name}: {error=:.3e}, allowed {limit * scale:.3e}"


def pair(*args, **kwargs):
    """(torch_bptt.RNN, torch.nn.RNN) with the same arguments and parameters, in float64."""
    torch.manual_seed(0)
    theirs = nn.RNN(*args, **kwargs).double()
    ours = torch_bptt.RNN(*args, **kwargs).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@dataclasses.dataclass
class Run:
    """What one forward and backward pass gives: every entry a tensor with a name."""

    output: object
    h_n: torch.Tensor
    gradients: dict

    def tensors(self):
        packed = isinstance(self.output, PackedSequence)
        yield "output", self.output.data if packed else self.output
        yield "h_n", self.h_n
        yield from self.gradients.items()


def run(module, input, hx=None, seed=0, **options):
    """Forward and backward on copies of input and hx; all gradients of a random weighted sum."""
    input = copy.deepcopy(input)
    leaf = input.data if isinstance(input, PackedSequence) else input
    leaf.requires_grad_()
    hx = None if hx is None else hx.clone().requires_grad_()
    torch.manual_seed(seed)  # of dropout
    output, h_n = module(input, hx, **options)
    flat = output.data if isinstance(output, PackedSequence) else output
    weigh = torch.Generator().manual_seed(1)
    loss = sum((part * normal(part, weigh)).sum() for part in (flat, h_n))
    leaves = {"input": leaf, "hx": hx, **dict(module.named_parameters())}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Run(output, h_n, {f"grad of {n}": g for n, g in zip(leaves, gradients, strict=True)})


def assert_same_run(got, expected):
    """Every output and every gradient of two runs."""
    assert got.gradients.keys() == expected.gradients.keys()
    for (name, mine), (_, other) in zip(got.tensors(), expected.tensors(), strict=True):
        assert_same(name, mine, other)
    if isinstance(expected.output, PackedSequence):
        for mine, other in zip(got.output[1:], expected.output[1:], strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)


def normal(like, generator):
    """Standard normal numbers, from a generator on the CPU, as many as ``like`` has."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu")
    return drawn.to(like.device)


def randn(*shape, seed=0):
    """Standard normal float64 numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


networks = st.fixed_dictionaries(
    {
        "input_size": st.integers(1, 4),
        "hidden_size": st.integers(1, 5),
        "num_layers": st.integers(1, 3),
        "nonlinearity": st.sampled_from(["tanh", "relu"]),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    }
)


@st.composite
def networks_with_input(draw, layouts=("batch", "one", "packed", "packed unsorted"), min_layers=1):
    """(arguments of RNN, input, hx): hx is None half of the time."""
    network = draw(networks)
    network["num_layers"] = max(network["num_layers"], min_layers)
    layout = draw(st.sampled_from(layouts))
    steps, rows = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    states = network["num_layers"] * (2 if network["bidirectional"] else 1)
    hx = randn(states, rows, network["hidden_size"], seed=2) if draw(st.booleans()) else None
    if layout == "one":
        input = randn(steps, network["input_size"])
        return network, input, None if hx is None else hx[:, 0]
    input = randn(steps, rows, network["input_size"])
    if layout != "batch":
        lengths = draw(st.lists(st.integers(1, steps), min_size=rows, max_size=rows))
        sort = layout == "packed"
        lengths = sorted(lengths, reverse=True) if sort else lengths
        return network, pack_padded_sequence(input, lengths, enforce_sorted=sort), hx
    return network, input.transpose(0, 1) if network["batch_first"] else input, hx
