"""Path gemm around its products: how many there are, what is copied for them, what is allocated.

That its numbers are right is for test_kernels.py to say, in the same build and environment:
`make test-cuda-on-host`. Here PyTorch's profiler counts what a call asks of PyTorch.
"""

import collections
import dataclasses
import os

import pytest
import torch
from cases import Case, problem
from torch.profiler import ProfilerActivity, profile

from torch_bptt import _C

ON_HOST = _C.build_info()["cuda"].startswith("on the host")
pytestmark = pytest.mark.skipif(
    not (ON_HOST and os.environ.get("TORCH_BPTT_CUDA_PATH") == "gemm"),
    reason="needs `make test-cuda-on-host`",
)
OPERATORS = torch.ops.torch_bptt

# The three loops, each by the operator that runs it alone.
LOOPS = {
    "forward": lambda p: OPERATORS.rnn_forward(*p.operands, **p.forward_options),
    "adjoint": lambda p: OPERATORS.adjoint_scan(p.grad_h, p.gate, p.weight_hh, **p.adjoint_options),
    "tangent": lambda p: OPERATORS.tangent_scan(
        p.grad_h, p.grad_h_n if p.case.h0 else None, p.gate, p.weight_hh, **p.tangent_options
    ),
}
AROUND = {"forward": 1, "adjoint": 0, "tangent": 0}  # products of all rows at once


def calls(loop, p):
    """Name of an operator of PyTorch -> how often it was called."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        LOOPS[loop](p)
    return collections.Counter(event.name for event in profiler.events())


def made(T, without=(), expanded_h0=False, **options):
    p = problem(Case(T=T, B=5, H=24, **options), torch.float32)
    p = dataclasses.replace(p, **dict.fromkeys(without))
    if expanded_h0:
        p.h0, p.grad_h_n = p.h0[:, :1].expand_as(p.h0), p.grad_h_n[:, :1].expand_as(p.h0)
    return p


# Options -> the loops that need a copy of what enters a step. Where a row restarts from zeros, or
# truncation cuts it off, it takes its zeros later.
OPTIONS = {
    "none": ({}, ()),
    "no h0": ({"h0": False}, ()),
    "restarts from zeros": ({"keep": True}, ()),
    "truncated": ({"truncate": 2}, ()),
    "truncated backward": ({"truncate": 2, "reverse": True, "keep": True}, ()),
    "packed": ({"packed": True}, ()),
    "packed backward, no h0": ({"packed": True, "reverse": True, "h0": False}, ()),
    "packed backward": ({"packed": True, "reverse": True}, ("forward", "tangent")),
    "expanded h0": ({"expanded_h0": True}, ("forward", "tangent")),
    "a mask": ({"extra": True, "without": ("restart", "noise")}, ("forward", "tangent")),
    "restarts from a state": (
        {"extra": True, "keep": True, "without": ("mask", "noise")},
        ("forward", "tangent"),
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_one_product_and_nothing_is_copied_that_lies_in_a_matrix(name, loop):
    options, copying = OPTIONS[name]
    plain = calls(loop, made(6))
    got = calls(loop, made(6, **options))
    # Nothing enters the first step of a loop without h0, nor that of the adjoint, which has one
    # step more than there are.
    without_first = loop != "adjoint" and not options.get("h0", True)
    assert got["aten::mm"] == 6 - without_first + AROUND[loop]
    offsets = options.get("packed", False)  # where steps begin
    assert got["aten::empty"] == plain["aten::empty"] + offsets + (loop in copying)
    assert got["aten::copy_"] == plain["aten::copy_"]


@pytest.mark.parametrize("loop", LOOPS)
def test_memory_is_asked_for_as_often_for_many_steps_as_for_few(loop):
    few, many = (calls(loop, made(T, keep=True, extra=True)) for T in (6, 40))
    assert many["aten::mm"] - few["aten::mm"] == 34
    for name in ("aten::empty", "aten::empty_strided", "aten::clone", "aten::copy_"):
        assert few[name] == many[name], name
