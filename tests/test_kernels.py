"""The four operators against reference.py: every option, size, dtype, layout and instruction set.

``solve`` runs all four on a problem, so one test body covers them all; ``tolerances.py`` says how
far they may differ and ``cases.py`` holds the problems.
"""

import dataclasses
import inspect
import itertools
import os
import re

import numpy as np
import pytest
import torch
from cases import (
    EVERYTHING,
    Case,
    Problem,
    computed,
    grid,
    integers,
    largest_sum,
    one_step,
    problem,
    sized,
)
from tolerances import close_to_truth, floor, largest_error, same_bits, ulps

import torch_bptt  # noqa: F401 - registers the operators
from torch_bptt import reference

OPERATORS = torch.ops.torch_bptt
FLOATS = [torch.float32, torch.float64]
NARROW = [torch.bfloat16, torch.float16]
SUMS = ("grad_weight_ih", "grad_weight_hh", "grad_bias", "grad_alpha")  # over all rows
GRADIENTS = ("grad_x", "grad_h0", *SUMS, "grad_restart", "norms")
COMPUTED = ("grad_alpha", "norms")  # results in the type that is computed in
STEPPED = ("h", "f", "grad_x", "norms", "d", "q")  # results whose first dimension is time

pytestmark = pytest.mark.usefixtures("isa")


def forward(operators, p):
    return dict(
        zip(("h", "h_n", "f"), operators.rnn_forward(*p.operands, **p.forward_options), strict=True)
    )


def all_of(p):
    """The flags of all gradients that there are."""
    return [name != "grad_alpha" or p.alpha is not None for name in GRADIENTS]


def backward(operators, p, h, f, wanted=None):
    wanted = wanted or all_of(p)
    given = (p.grad_h, p.grad_h_n, p.x, p.h0, h, f, p.weight_ih, p.weight_hh)
    grads = operators.rnn_backward(*given, **p.backward_options, wanted=wanted)
    return dict(zip(GRADIENTS, grads, strict=True))


def scans(operators, p):
    adjoint = operators.adjoint_scan(p.grad_h, p.gate, p.weight_hh, **p.adjoint_options)
    q = operators.tangent_scan(p.grad_h, p.grad_h_n, p.gate, p.weight_hh, **p.tangent_options)
    return {**dict(zip(("d", "d0", "d_restart"), adjoint, strict=True)), "q": q}


def solve(operators, p, h=None, f=None):
    """All results of all operators, name -> tensor; h and f replace the states given to backward.

    Two backwards on the same states compare without forward's rounding, which may flip a slope.
    """
    results = forward(operators, p)
    h, f = (results["h"], results["f"]) if h is None else (h, f)
    return {**results, **backward(operators, p, h, f), **scans(operators, p)}


def errors_of_reference(p, h, f):
    """The yardstick: how far the plain loop is from float64, in p's dtype (see tolerances.py)."""
    dtype = torch.float32 if p.x.dtype == torch.float64 else p.x.dtype
    ratio = torch.finfo(p.x.dtype).eps / torch.finfo(dtype).eps
    p, h, f = p.to(dtype), h.to(dtype), f.to(dtype)
    plain, truth = (
        solve(reference, p, h, f),
        solve(reference, p.to(torch.float64), h.double(), f.double()),
    )
    return {name: ratio * largest_error(plain[name], truth[name]) for name in truth}


def compare_with_reference(case, dtype):
    p = problem(case, dtype)
    exact = p.to(torch.float64)
    states = forward(reference, exact)
    h, f = states["h"].to(dtype), states["f"].to(dtype)
    truth = solve(reference, exact, h.double(), f.double())
    plain_errors = errors_of_reference(p, h, f)
    got = solve(OPERATORS, p, h, f)
    rows = h.shape[:-1].numel()
    for name in truth:
        assert got[name].dtype == (computed(dtype) if name in COMPUTED else dtype), name
        terms = rows if name in SUMS else case.I + case.H + 3  # two biases and noise
        where = {"steps": name in STEPPED, "batch_sizes": p.batch_sizes}
        close_to_truth(name, got[name], truth[name], plain_errors[name], K=terms, **where)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_every_combination_of_options(case, dtype):
    compare_with_reference(case, dtype)


@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *sized(),
        *sized(**EVERYTHING),
        *sized(bias=False, h0=False, packed=True, activation="relu"),
        *sized(keep=True, reverse=True, truncate=3, activation="sigmoid"),
    ],
    ids=str,
)
def test_every_size(case, dtype):
    compare_with_reference(case, dtype)


# --- bit for bit ----------------------------------------------------------------------------------

EXACT = [
    *sized(activation="identity"),
    *sized(activation="relu", packed=True),
    *sized(activation="relu", packed=True, keep=True, reverse=True, truncate=2, clip=2.0),
    *sized(activation="identity", packed=True, keep=True, extra=True),
    *sized(activation="identity", keep=True, truncate=3, bias=False, h0=False),
]


def fits(case, dtype):
    """Integers that stay exact: sums below 2^24, and for narrow types results they can hold."""
    significand = {torch.float32: 24, torch.float64: 53, torch.bfloat16: 8, torch.float16: 11}[
        dtype
    ]
    fan = 2 if case.T < 10 and dtype in FLOATS else 1
    p = integers(case, fan)
    return p if largest_sum(p) < 2**significand else None


@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_integers_agree_bit_for_bit(case, dtype):
    p = fits(case, dtype)
    if p is None:
        assert dtype in NARROW, "the case must be made smaller"
        p = fits(case.but(T=min(case.T, 2), B=min(case.B, 7)), dtype)
    expected = solve(reference, p)
    got = solve(OPERATORS, p.to(dtype))
    for name in expected:
        where = {"steps": name in STEPPED, "batch_sizes": p.batch_sizes}
        if name == "norms":  # a root is not exact: two roundings, and the sum's in another order
            torch.testing.assert_close(got[name], expected[name].to(computed(dtype)))
            continue
        same_bits(name, got[name], expected[name].to(got[name].dtype), **where)


@pytest.mark.parametrize(
    "case", grid(Case(T=4), alpha=0.5, clip=None, extra=False, activation="identity"), ids=str
)
def test_halves_agree_bit_for_bit(case):
    """a = 1/2 only shifts the binary point: by T places in states and gradients, 2T+1 in
    products.
    """
    p = integers(case, fan=1)
    assert largest_sum(p) * 2 ** (2 * case.T + 1) < 2**24
    expected, got = solve(reference, p), solve(OPERATORS, p.to(torch.float32))
    for name in expected.keys() - {"norms"}:
        same_bits(name, got[name], expected[name].float())


# --- long chains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_long_chains_err_at_most_twice_as_much_as_nn_rnn(dtype, nonlinearity):
    """400 steps forward, backward from our own states."""
    p = problem(Case(T=400, B=3, I=5, H=40, activation=nonlinearity), dtype)

    def torch_rnn(p):
        rnn = torch.nn.RNN(5, 40, nonlinearity=nonlinearity, dtype=p.x.dtype)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(rnn, f"{name}_l0", torch.nn.Parameter(getattr(p, name)))
        x, h0 = p.x.clone().requires_grad_(), p.h0.clone().requires_grad_()
        output, h_n = rnn(x, h0)
        leaves = (x, h0, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0)
        grads = torch.autograd.grad((output, h_n), leaves, (p.grad_h, p.grad_h_n))
        return {
            "h": output.detach(),
            "h_n": h_n.detach(),
            **dict(zip(GRADIENTS[:5], grads, strict=True)),
        }

    truth, plain = torch_rnn(p.to(torch.float64)), torch_rnn(p)
    states = forward(OPERATORS, p)
    got = {**states, **backward(OPERATORS, p, states["h"], states["f"])}
    for name in truth:
        terms = 1200 if name in SUMS else 45
        plain_error = largest_error(plain[name], truth[name])
        close_to_truth(name, got[name], truth[name], plain_error, K=terms, steps=name in STEPPED)


# --- one function of one number -------------------------------------------------------------------


def through_the_operator(x, activation, width=1):
    """Apply an activation to every number: one step of `width` units, each seeing one input."""
    eye = torch.eye(width, dtype=x.dtype)
    h, _, _ = OPERATORS.rnn_forward(
        x.to(eye.device).view(-1, width),
        None,
        eye,
        torch.zeros_like(eye),
        None,
        None,
        activation=activation,
    )
    return h.flatten().cpu()


def correctly_rounded(activation, x):
    z = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        return np.tanh(z) if activation == "tanh" else 1 / (1 + np.exp(-z))


def all_magnitudes(dtype):
    """Numbers of every exponent and sign: a prime stride over the bit patterns, and the edges."""
    if dtype == torch.float32:
        bits = np.arange(0, 2**31, 2503, dtype=np.int64).astype(np.uint32)
        x = bits.view(np.float32)
    else:
        bits = np.arange(0, 2**63, 9007199254740881, dtype=np.uint64)
        near = np.linspace(-40, 40, 100_003)
        x = np.concatenate([bits.view(np.float64), near])
    info = np.finfo(x.dtype)
    edges = [
        0,
        info.smallest_subnormal,
        info.tiny,
        info.max,
        info.eps,
        0.625,
        1,
        9,
        88.8,
        104,
        745.2,
    ]
    x = np.concatenate([x[np.isfinite(x)], np.array(edges, x.dtype)])
    x = np.concatenate([x, -x])
    return x[: len(x) // 64 * 64]


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_are_within_two_ulps(activation, dtype, width):
    x = all_magnitudes(dtype)
    got = through_the_operator(torch.from_numpy(x), activation, width).numpy()
    error = ulps(got, correctly_rounded(activation, x))
    worst = np.argmax(error)
    assert error.max() <= 2, f"{activation}({x[worst]!r}) = {got[worst]!r}: {error[worst]:.2f} ulps"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_of_narrow_types(activation, dtype, isa):
    """All 2^16 values. Two ulps of float32 may tip the rounding to storage: one ulp of that."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    tiny = torch.finfo(dtype).smallest_normal
    flushes = isa == "avx512_bf16" and dtype == torch.bfloat16  # subnormal numbers to zeros
    if flushes:
        x = x[x.abs() >= tiny]
    got = through_the_operator(x, activation).double()
    exact = torch.from_numpy(correctly_rounded(activation, x.double().numpy()).astype(np.float64))
    if flushes:
        exact[exact.abs() < tiny] = 0
    spacing = torch.finfo(dtype).eps * 2 ** torch.floor(torch.log2(exact.abs()))
    spacing = spacing.clamp(min=tiny * torch.finfo(dtype).eps)
    error = (got - exact.to(dtype).double()).abs() / spacing
    assert error.max() <= 1, f"at {x[error.argmax()]}: {error.max()} ulps"


@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
@pytest.mark.parametrize("activation", list(reference.activations))
def test_activations_keep_nan_and_know_infinity(activation, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0], dtype=dtype, device="cpu")
    value, _ = reference.activations[activation]
    same_bits(activation, through_the_operator(x, activation), value(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", list(reference.activations))
@pytest.mark.parametrize("case", [Case(), Case(H=65), Case(B=1), Case(**EVERYTHING)], ids=str)
def test_what_is_not_finite_spreads_as_in_the_loop(case, activation, bad):
    """NaN and infinity in x reach the same entries as in a loop of matrix products, and no
    others.
    """
    p = problem(case.but(activation=activation), torch.float32)
    p.x.flatten(0, -2)[5 if case.B > 1 else 1, 1] = bad
    states = forward(reference, p)
    expected = solve(reference, p, states["h"], states["f"])
    got = solve(OPERATORS, p, states["h"], states["f"])
    for name in expected:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            same_bits(f"{kind.__name__} of {name}", kind(got[name]), kind(expected[name]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", list(reference.activations))
@pytest.mark.parametrize(
    "case", [Case(), Case(H=65), Case(alpha=0.3), Case(B=1), Case(**EVERYTHING)], ids=str
)
def test_gradients_that_are_not_finite_spread_as_in_the_loop(case, activation, bad):
    """They arrive at units whose slope is zero: relu's stops them, in backward and in both scans,
    and those of the other activations do not.
    """
    p = problem(case.but(activation=activation), torch.float32)
    states = forward(reference, p)
    off = (states["h"] if p.alpha is None else states["f"]) == 0
    off[..., 0] = True  # of an activation that is never zero, too
    p = dataclasses.replace(p, grad_h=torch.where(off, bad, p.grad_h), gate=p.gate * ~off)
    stops = activation in reference.STOPPING

    def results(operators):
        options = dict(gate_stops=stops)
        adjoint, tangent = p.adjoint_options | options, p.tangent_options | options
        return {
            **backward(operators, p, states["h"], states["f"]),
            **dict(
                zip(
                    ("d", "d0", "d_restart"),
                    operators.adjoint_scan(p.grad_h, p.gate, p.weight_hh, **adjoint),
                    strict=True,
                )
            ),
            "q": operators.tangent_scan(p.grad_h, p.grad_h_n, p.gate, p.weight_hh, **tangent),
        }

    expected, got = results(reference), results(OPERATORS)
    for name in expected:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            same_bits(f"{kind.__name__} of {name}", kind(got[name]), kind(expected[name]))


# --- same inputs, same bits -----------------------------------------------------------------------

SHAPES = [
    Case(T=20, B=1, I=64, H=257),
    Case(T=20, B=3, I=40, H=300),
    Case(T=20, B=5, I=40, H=300, **EVERYTHING),
    Case(T=20, B=61, I=10, H=33),
    Case(T=20, B=24, I=70, H=150, **EVERYTHING),
    Case(T=1, B=400, I=64, H=128),
    Case(T=1, B=13, I=416, H=1100),
    # Several chunks of packed rows, whose places in the scratch of one another differ.
    Case(T=400, B=61, I=3, H=130, packed=True),
]


@pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_bits_depend_on_neither_run_nor_threads(case, dtype):
    p = problem(case, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(solve(OPERATORS, p))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert other.keys() == first.keys()
        for name in first:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("case", [Case(), Case(alpha=0.3), Case(**EVERYTHING)], ids=str)
def test_only_wanted_gradients_come_and_they_are_the_same(case):
    p = problem(case, torch.float32)
    states = forward(OPERATORS, p)
    whole = backward(OPERATORS, p, states["h"], states["f"])
    for flags in itertools.product((False, True), repeat=len(GRADIENTS)):
        wanted = [flag and possible for flag, possible in zip(flags, all_of(p), strict=True)]
        part = backward(OPERATORS, p, states["h"], states["f"], wanted)
        for want, name in zip(wanted, GRADIENTS, strict=True):
            if want:
                assert torch.equal(part[name], whole[name]), name
            else:
                assert part[name].shape == (0,), name


@pytest.mark.parametrize("given", ["grad_h", "grad_h_n", "neither"])
@pytest.mark.parametrize("case", [Case(), Case(**EVERYTHING)], ids=str)
def test_an_absent_gradient_is_zero(case, given):
    p = problem(case, torch.float32)
    states = forward(OPERATORS, p)
    absent = [name for name in ("grad_h", "grad_h_n") if name != given]
    for name in absent:
        setattr(p, name, torch.zeros_like(getattr(p, name)))
    expected = backward(OPERATORS, p, states["h"], states["f"])
    for name in absent:
        setattr(p, name, None)
    got = backward(OPERATORS, p, states["h"], states["f"])
    for name in GRADIENTS:
        assert torch.equal(got[name], expected[name]), name


def test_an_absent_q0_is_zero():
    p = problem(Case(), torch.float32)
    tangent = OPERATORS.tangent_scan
    none = tangent(p.grad_h, None, p.gate, p.weight_hh)
    assert torch.equal(none, tangent(p.grad_h, torch.zeros_like(p.grad_h_n), p.gate, p.weight_hh))


@pytest.mark.parametrize("case", [Case(), Case(T=1), Case(**EVERYTHING)], ids=str)
def test_inputs_stay_as_they_are_and_results_share_no_memory(case):
    p = problem(case, torch.float32)
    tensors = [getattr(p, name) for name in p.TENSORS if getattr(p, name) is not None]
    before = [t.clone() for t in tensors]
    results = solve(OPERATORS, p)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    addresses = [t.untyped_storage().data_ptr() for t in (*tensors, *results.values()) if t.numel()]
    assert len(set(addresses)) == len(addresses)


# --- any strides ----------------------------------------------------------------------------------


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t):
    spread = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), -1 if t.dtype != torch.bool else 1)
    spread[..., 1::2] = t
    return spread[..., 1::2]


def offset(t):
    """Contiguous, but starting in the middle of its storage, aligned to nothing but its own
    size.
    """
    storage = t.new_ones(t.numel() + 3)
    storage[3:] = t.flatten()
    return storage[3:].view(t.shape)


LAYOUTS = [transposed, sliced, offset]
EXPANDED = [*Problem.TENSORS, "keep"]


def same_numbers(name, got, expected, case):
    """Of two runs on the same numbers at other addresses: the same bits.

    But on a GPU the products of whole sequences are cuBLAS's, and on path gemm those of each step
    are a library's on the CPU, too. It chooses a kernel by the alignment of its operands, and
    another kernel is another order of the same sums: each of the two as in tolerances.py (b), in
    every step anew, in networks that do not amplify.
    """
    if got.device.type == "cpu" and os.environ.get("TORCH_BPTT_CUDA_PATH") != "gemm":
        return same_bits(name, got, expected)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    if got.numel():
        terms = max(case.I + case.H + 3, case.T * case.B)
        limit = 2 * (case.T + 1) * floor(got.dtype, terms, expected.abs().max().item())
        assert largest_error(got, expected) <= limit, name


def assert_same_as_contiguous(p, contiguous):
    state = forward(OPERATORS, contiguous)
    got = solve(OPERATORS, p, state["h"], state["f"])
    expected = solve(OPERATORS, contiguous, state["h"], state["f"])
    for name in expected:
        same_numbers(name, got[name], expected[name], p.case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [Case(keep=True), Case(B=1, H=64, I=64), Case(**EVERYTHING)], ids=str
)
def test_strides(case, dtype, layout):
    """Every tensor at once, states given to backward and the keep mask included."""
    p = problem(case, dtype)
    q = p.map(layout)
    q.keep = None if p.keep is None else layout(p.keep)
    assert_same_as_contiguous(q, p)
    state = forward(OPERATORS, p)
    f = state["f"] if case.alpha == 1 else layout(state["f"])
    got = backward(OPERATORS, q, layout(state["h"]), f)
    for name, expected in backward(OPERATORS, p, state["h"], state["f"]).items():
        same_numbers(name, got[name], expected, case)


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("case", [Case(), Case(packed=True, H=64)], ids=str)
def test_expanded(case, name):
    """One row or one number seen everywhere with stride 0, as the gradient of a sum is."""
    case = case.but(keep=True, alpha=0.3, extra=True)
    for dims in (slice(0, 1), slice(None)):
        p, q = problem(case, torch.float32), problem(case, torch.float32)
        tensor = getattr(p, name)
        start = (
            tensor[:1] if dims == slice(0, 1) else tensor.flatten()[:1].view((1,) * tensor.dim())
        )
        setattr(p, name, start.expand_as(tensor))
        setattr(q, name, start.expand_as(tensor).clone(memory_format=torch.contiguous_format))
        assert_same_as_contiguous(p, q)


def test_strided_batch_sizes():
    case = Case(**EVERYTHING)
    p, q = problem(case, torch.float32), problem(case, torch.float32)
    q.batch_sizes = sliced(p.batch_sizes)
    assert_same_as_contiguous(q, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"h0": False, "bias": False}, {"alpha": 0.3, "keep": True, "extra": True}]
)
def test_one_step_without_a_dimension_for_time(options, dtype):
    p = problem(Case(T=1, **options), dtype)
    expected, got = solve(OPERATORS, p), solve(OPERATORS, one_step(p))
    for name, tensor in expected.items():
        has_time = tensor.dim() == 3 or name == "norms"
        same_numbers(name, got[name], tensor.squeeze(0) if has_time else tensor, p.case)
    for name, tensor in solve(reference, one_step(p)).items():
        assert got[name].shape == tensor.shape


# --- nothing to do --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"h0": False}, {"keep": True, "alpha": 0.3, "extra": True}], ids=str
)
def test_no_steps(options):
    """T = 0: no output, the state passes through, and so does its gradient."""
    p = problem(Case(T=0, B=3, **options), torch.float32)
    expected, got = solve(reference, p), solve(OPERATORS, p)
    for name in expected:
        same_bits(name, got[name], expected[name])
    if p.h0 is not None:
        assert got["h_n"].data_ptr() != p.h0.data_ptr()


def test_no_inputs():
    """I = 0: the network runs on its state alone."""
    p = problem(Case(I=0), torch.float32)
    expected, got = solve(reference, p), solve(OPERATORS, p)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


# --- wrong input ----------------------------------------------------------------------------------

WRONG = {
    # argument: (value from the problem, further words that the message must hold)
    "x": [
        (lambda p: p.x[0, 0], ""),
        (lambda p: p.x.long(), "Long|int64"),
    ],
    "h0": [
        (lambda p: p.h0[:, :-1], "6"),
        (lambda p: p.h0[..., :-1], "16"),
        (lambda p: p.h0[0], ""),
        (lambda p: p.h0.double(), "Double|float64"),
    ],
    "weight_ih": [
        (lambda p: p.weight_ih[:-1], "16"),
        (lambda p: p.weight_ih[:, :-1], "2"),
        (lambda p: p.weight_ih.T, ""),
        (lambda p: p.weight_ih.double(), "Double|float64"),
    ],
    "weight_hh": [
        (lambda p: p.weight_hh[:, :-1], "16"),
        (lambda p: p.weight_hh[0], ""),
        (lambda p: p.weight_hh.half(), "Half|float16"),
    ],
    "bias_ih": [
        (lambda p: p.bias_ih[:-1], "16"),
        (lambda p: p.bias_ih[None], ""),
        (lambda p: p.bias_ih.double(), ""),
    ],
    "bias_hh": [
        (lambda p: p.bias_hh[:-1], "16"),
        (lambda p: p.bias_hh[None], ""),
        (lambda p: p.bias_hh.double(), ""),
    ],
    "keep": [
        (lambda p: torch.ones(5, 6, dtype=torch.bool), "6"),
        (lambda p: torch.ones(7, 5, dtype=torch.bool), ""),
        (lambda p: torch.ones(5, 7), "Float|float32"),
        (lambda p: torch.ones(5, dtype=torch.bool), ""),
    ],
    "activation": [(lambda p: "softplus", "softplus")],
    "alpha": [
        (lambda p: torch.ones(16), "16"),
        (lambda p: torch.tensor(0.5), ""),
        (lambda p: torch.ones(17, dtype=torch.float64), "Double|float64"),
    ],
    "restart": [(lambda p: p.h0[:, :-1], "6"), (lambda p: p.h0.double(), "Double|float64")],
    "mask": [(lambda p: p.h0[0], ""), (lambda p: p.h0.double(), "Double|float64")],
    "noise": [(lambda p: p.grad_h[1:], "4"), (lambda p: p.grad_h.double(), "Double|float64")],
}

WRONG_PACKED = {
    "batch_sizes": [
        (lambda p: p.batch_sizes - 8, "-"),
        (lambda p: p.batch_sizes.flip(0), ""),
        (lambda p: p.batch_sizes[:-1], ""),
        (lambda p: torch.cat([p.batch_sizes, p.batch_sizes.new_zeros(1)]), "0"),
        (lambda p: p.batch_sizes.int(), "Int|int32"),
        (lambda p: p.batch_sizes[None], ""),
        (lambda p: p.batch_sizes.new_full((4,), 2**62), ""),
    ],
    "h0": [(lambda p: p.h0[:-1], "6")],
    "x": [(lambda p: p.x[None], ""), (lambda p: p.x[:-1], "")],
}

WRONG_BACKWARD = {
    "grad_h": [(lambda p: p.grad_h[:-1], ""), (lambda p: p.grad_h.double(), "Double|float64")],
    "grad_h_n": [(lambda p: p.grad_h_n[None], ""), (lambda p: p.grad_h_n.double(), "")],
    "h": [(lambda p: p.grad_h[:-1], ""), (lambda p: p.grad_h.double(), "")],
    "truncate": [(lambda p: -1, "-1")],
    "clip": [(lambda p: -0.5, "-0.5"), (lambda p: float("nan"), "nan")],
    "alpha": [*WRONG["alpha"], (lambda p: None, "None")],
    "restart": WRONG["restart"],
    "mask": WRONG["mask"],
}

WRONG_SCANS = {
    "gate": [(lambda p: p.gate[:-1], ""), (lambda p: p.gate.double(), "Double|float64")],
    "weight_hh": [(lambda p: p.weight_hh[:, :-1], ""), (lambda p: p.weight_hh.double(), "")],
    "keep": WRONG["keep"],
    "alpha": WRONG["alpha"],
    "mask": WRONG["mask"],
}


def every(*tables):
    return [
        pytest.param(name, change, words, id=f"{name}-{i}")
        for table in tables
        for name, entries in table.items()
        for i, (change, words) in enumerate(entries)
    ]


def assert_refused(call, name, words):
    """An error of the right kind that names the argument, what was expected and what came."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        call()
    message = str(error.value)
    assert re.search(rf"\b{name}\b", message), message
    assert re.search(r"expected|must (be|have)", message, re.IGNORECASE), message
    assert re.search(r"\bgot\b", message), message
    assert re.search(words, message), message


def forward_call(p, name, value):
    inputs = [value if name == n else t for n, t in zip(p.OPERANDS, p.operands, strict=True)]
    options = p.forward_options | ({} if name in p.OPERANDS else {name: value})
    return lambda: OPERATORS.rnn_forward(*inputs, **options)


@pytest.mark.parametrize(("name", "change", "words"), every(WRONG))
def test_wrong_input_of_forward(name, change, words):
    p = problem(Case(keep=True), torch.float32)
    assert_refused(forward_call(p, name, change(p)), name, words)


@pytest.mark.parametrize(("name", "change", "words"), every(WRONG_PACKED))
def test_wrong_packed_input_of_forward(name, change, words):
    p = problem(Case(packed=True), torch.float32)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        forward_call(p, name, change(p))()
    assert re.search(r"\b(x|h0|batch_sizes)\b", str(error.value)), str(error.value)
    assert re.search(words, str(error.value)), str(error.value)


@pytest.mark.parametrize(("sizes", "got"), [([4, 4, 1], 9), ([3, 2, 2], 7)])
def test_batch_sizes_that_do_not_add_up_are_counted(sizes, got):
    x, weight_ih, weight_hh = torch.randn(8, 2), torch.randn(3, 2), torch.randn(3, 3)
    operands = x, None, weight_ih, weight_hh, None, None, "tanh", torch.tensor(sizes, device="cpu")
    with pytest.raises(ValueError, match=f"batch_sizes .* expected 8, got {got}$"):
        torch.ops.torch_bptt.rnn_forward(*operands)


@pytest.mark.parametrize(("name", "change", "words"), every(WRONG_BACKWARD))
def test_wrong_input_of_backward(name, change, words):
    p = problem(Case(alpha=0.3), torch.float32)
    state = forward(OPERATORS, p)
    given = {
        "grad_h": p.grad_h,
        "grad_h_n": p.grad_h_n,
        "x": p.x,
        "h0": p.h0,
        "h": state["h"],
        "f": state["f"],
        "weight_ih": p.weight_ih,
        "weight_hh": p.weight_hh,
        **p.backward_options,
        "wanted": [True] * 8,
        name: change(p),
    }
    assert_refused(lambda: OPERATORS.rnn_backward(**given), name, words)


@pytest.mark.parametrize(("name", "change", "words"), every(WRONG_SCANS))
@pytest.mark.parametrize("operator", ["adjoint_scan", "tangent_scan"])
def test_wrong_input_of_the_scans(operator, name, change, words):
    p = problem(Case(keep=True), torch.float32)
    first = {"g": p.grad_h} if operator == "adjoint_scan" else {"c": p.grad_h, "q0": p.grad_h_n}
    given = {**first, "gate": p.gate, "weight_hh": p.weight_hh, **p.layout, name: change(p)}
    assert_refused(lambda: getattr(OPERATORS, operator)(**given), name, words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes_without_kernels_are_refused(dtype):
    p = problem(Case()).map(lambda t: t.to(dtype))
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError), match=r"\bx\b"):
        OPERATORS.rnn_forward(*p.operands, **p.forward_options)


@pytest.mark.parametrize("f", [torch.empty(0), None], ids=["empty", "None"])
def test_state_without_f_is_refused_where_alpha_needs_it(f):
    p = problem(Case(alpha=0.3), torch.float32)
    state = forward(OPERATORS, p)
    call = lambda: backward(OPERATORS, p, state["h"], f)  # noqa: E731
    assert_refused(call, "f", "")


# --- what the dispatcher expects ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rnn_forward", "rnn_backward", "adjoint_scan", "tangent_scan"])
def test_reference_has_the_signature_of_the_operator(name):
    absent = inspect.Parameter.empty
    schema = [
        (a.name, a.default_value if a.has_default_value() else absent, a.kwarg_only)
        for a in getattr(OPERATORS, name).default._schema.arguments
    ]
    signature = inspect.signature(getattr(reference, name)).parameters.values()
    assert schema == [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in signature]


@pytest.mark.parametrize("case", [Case(), Case(**EVERYTHING), Case(T=0, B=2)], ids=str)
def test_schemas_and_meta_kernels_are_true(case):
    check_schemas_and_meta_kernels(problem(case, torch.float32))


def test_schemas_and_meta_kernels_of_one_step_are_true():
    check_schemas_and_meta_kernels(one_step(problem(Case(T=1), torch.float32)))


def check_schemas_and_meta_kernels(p):
    """PyTorch's own check: nothing is mutated or aliased, and shapes are known without running."""
    state = forward(OPERATORS, p)
    given = (p.grad_h, p.grad_h_n, p.x, p.h0, state["h"], state["f"], p.weight_ih, p.weight_hh)
    wanted = {"wanted": [True, False, True, True, False, p.alpha is not None, False, True]}
    tests = ("test_schema", "test_faketensor")
    for operator, arguments, options in [
        (OPERATORS.rnn, p.operands, p.layer_options),
        (OPERATORS.rnn_forward, p.operands, p.forward_options),
        (OPERATORS.rnn_backward, given, p.backward_options | wanted),
        (OPERATORS.adjoint_scan, (p.grad_h, p.gate, p.weight_hh), p.adjoint_options),
        (OPERATORS.tangent_scan, (p.grad_h, p.grad_h_n, p.gate, p.weight_hh), p.tangent_options),
    ]:
        torch.library.opcheck(operator.default, arguments, options, test_utils=tests)
