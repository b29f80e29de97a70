"""What only a GPU can show: pytest --device cuda tests/test_cuda.py

What holds on every device is tested by the other files, with the same option.
"""

import copy
import subprocess
import sys

import pytest
import torch
from cases import EVERYTHING, Case, Problem, problem
from test_kernels import (
    FLOATS,
    NARROW,
    OPERATORS,
    SUMS,
    assert_refused,
    compare_with_reference,
    forward_call,
    solve,
)
from tolerances import TF32_EPS, close_to_truth, largest_error, same_bits

import torch_bptt
from torch_bptt import RNN
from torch_bptt._extension import _C

if torch.get_default_device().type != "cuda":
    pytest.skip("needs --device cuda", allow_module_level=True)

# One size for each way in which the state can be kept: in a block, in a cluster of blocks, in all
# blocks, in memory, with products of our own and with a library's; and options and sizes that no
# tile fits.
SIZES = {
    "small": Case(T=9, B=5, I=7, H=64),
    "middle": Case(T=9, B=17, I=31, H=384),
    "large": Case(T=5, B=7, I=5, H=1100),
    "largest": Case(T=5, B=20, I=5, H=1700),
    "many rows": Case(T=3, B=600, I=5, H=1100),
    "odd": Case(T=9, B=17, I=3, H=257),
    "one row": Case(T=20, B=1, I=40, H=300),
    "everything": Case(T=7, B=9, I=5, H=65, **EVERYTHING),
    "dense everything": Case(T=7, B=9, I=5, H=130, **EVERYTHING | {"packed": False}),
}
sizes = pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
dtypes = pytest.mark.parametrize("dtype", FLOATS + NARROW, ids=str)
DENSE = [case for case in SIZES.values() if not case.packed]


def same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def poison():
    """Fill what the allocator will hand out next with NaN."""
    blocks = [torch.full((2**k // 4,), torch.nan) for k in range(9, 25) for _ in range(4)]
    del blocks


@sizes
@dtypes
def test_every_path_on_small_cases(case, dtype):
    """Also what compute-sanitizer runs: `make gpu-check ARGS="--parts sanitizer"`."""
    poison()
    compare_with_reference(case, dtype)


@sizes
@dtypes
def test_every_run_has_the_same_bits(case, dtype):
    p = problem(case, dtype)
    first = solve(OPERATORS, p)
    for _ in range(20):
        poison()
        same(solve(OPERATORS, p), first)


# ---- streams


@sizes
def test_work_is_done_on_the_stream_of_the_caller(case):
    """A stream is kept busy before x arrives: whoever does not wait for it reads zeros."""
    p = problem(case, torch.float32)
    expected = solve(OPERATORS, p)
    x, p.x = p.x, torch.zeros_like(p.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        p.x.copy_(x)
        got = solve(OPERATORS, p)
    torch.cuda.current_stream().wait_stream(stream)
    same(got, expected)


def test_two_models_on_two_streams():
    problems = [problem(SIZES[name], torch.float32, seed=i) for i, name in enumerate(SIZES)] * 2
    expected = [solve(OPERATORS, p) for p in problems]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = []
    for repeat in range(10):
        for i, p in enumerate(problems):
            with torch.cuda.stream(streams[(i + repeat) % 2]):
                got.append(solve(OPERATORS, p))
    torch.cuda.synchronize()
    for i, results in enumerate(got):
        same(results, expected[i % len(problems)])


# ---- CUDA graphs


def captured(function):
    """The graph of a call, and what the call returns, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("case", DENSE, ids=str)
@dtypes
def test_a_graph_replays_with_other_numbers(case, dtype):
    p, other = problem(case, dtype), problem(case, dtype, seed=1)
    expected = solve(OPERATORS, p), solve(OPERATORS, other)
    held = problem(case, dtype)
    graph, results = captured(lambda: solve(OPERATORS, held))
    for turn in range(6):
        source = (p, other)[turn % 2]
        for name in (*Problem.TENSORS, "keep"):
            if getattr(held, name) is not None:
                getattr(held, name).copy_(getattr(source, name))
        for tensor in results.values():
            tensor.fill_(torch.nan)
        graph.replay()
        same(results, expected[turn % 2])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_a_training_step_as_a_graph(options):
    torch.manual_seed(0)
    rnn = RNN(7, 65, learn_h0=True, alpha=0.3, **options)
    x, reset = torch.randn(11, 9, 7), torch.rand(11, 9) < 0.1
    parameters = list(rnn.parameters())

    def step():
        output, h_n = rnn(x, reset=reset)
        return dict(enumerate(torch.autograd.grad(output.square().sum() + h_n.sum(), parameters)))

    graph, results = captured(step)
    for _ in range(3):
        x.normal_()
        reset.copy_(torch.rand(11, 9) < 0.1)
        graph.replay()
        same(results, step())


def test_make_graphed_callables():
    torch.manual_seed(0)
    rnn = RNN(5, 40, 2)
    plain = copy.deepcopy(rnn)
    sample = torch.randn(6, 3, 5, requires_grad=True), torch.randn(2, 3, 40, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(rnn, sample)
    x, h0 = torch.randn(6, 3, 5, requires_grad=True), torch.randn(2, 3, 40, requires_grad=True)
    results = []
    for module in (graphed, plain):
        output, h_n = module(x, h0)
        loss = output.square().sum() + h_n.sum()
        results.append((output, h_n, *torch.autograd.grad(loss, (x, h0, *module.parameters()))))
    for got, expected in zip(*results, strict=True):
        same_bits("graphed", got.detach().clone(), expected.detach())


# ---- numbers


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["x", "h0", "weight_hh", "grad_h"])
@sizes
def test_nothing_waits_for_a_number_that_never_comes(case, name, bad):
    """Blocks that exchange states must not take NaN for a state that is not there yet, and the next
    call must not find it. Where it spreads to is tested in test_kernels.py.
    """
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(case, dtype)
        expected = solve(OPERATORS, p)
        spoilt = problem(case, dtype)
        getattr(spoilt, name).view(-1)[0] = bad
        solve(OPERATORS, spoilt)
        torch.cuda.synchronize()
        same(solve(OPERATORS, p), expected)


@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.float32, False), (torch.float32, True), *((dtype, False) for dtype in NARROW)],
    ids=str,
)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [33, 128, 512])
def test_as_exact_as_cudnn(hidden, nonlinearity, dtype, tf32):
    """tolerances.py (c), with TF32 and without: switched off, errors are float32's."""
    torch.manual_seed(0)
    theirs = torch.nn.RNN(16, hidden, nonlinearity=nonlinearity, dtype=dtype)
    ours, exact = RNN.from_torch(theirs), copy.deepcopy(theirs).double()
    x, h0 = torch.randn(50, 8, 16, dtype=dtype), torch.randn(1, 8, hidden, dtype=dtype)
    weigh = torch.randn(50, 8, hidden, dtype=dtype)

    def run(module):
        kind = module.weight_ih_l0.dtype
        leaves = [t.to(kind).requires_grad_() for t in (x, h0)]
        output, _ = module(*leaves)
        gradients = torch.autograd.grad(output, [*leaves, *module.parameters()], weigh.to(kind))
        return [output.detach(), *gradients]

    truth = run(exact)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            theirs.flatten_parameters()  # as it would have been when it was made
            plain, got = run(theirs), run(ours)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    names = ("output", "grad_x", "grad_h0", "grad_weight_ih", "grad_weight_hh", "grad_bias")
    for name, mine, other, exactly in zip(names, got, plain, truth, strict=False):
        terms = 400 if name in SUMS else 16 + hidden + 2
        eps = TF32_EPS if tf32 else None
        error = largest_error(other, exactly)
        close_to_truth(name, mine, exactly, error, K=terms, steps=name == "output", eps=eps)


def test_autocast():
    rnn = RNN(5, 40)
    x = torch.randn(6, 3, 5)
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = rnn(x)
        expected, _ = copy.deepcopy(rnn).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert rnn.weight_hh_l0.grad.dtype == torch.float32


# ---- what cuDNN refuses


def test_backward_in_eval_mode():
    rnn = RNN(5, 40)
    x = torch.randn(6, 3, 5)
    expected = torch.autograd.grad(rnn(x)[0].sum(), list(rnn.parameters()))
    rnn.eval()
    got = torch.autograd.grad(rnn(x)[0].sum(), list(rnn.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---- errors


@pytest.mark.parametrize("name", [*Problem.OPERANDS, "keep", "alpha", "restart", "mask", "noise"])
def test_a_tensor_on_another_device_is_refused_by_name(name):
    p = problem(Case(alpha=0.3, keep=True, extra=True), torch.float32)
    value = getattr(p, name).cpu()
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=r"cpu|CPU"):
        forward_call(p, name, value)()
    if name != "x":  # x says where; another argument that differs is the one that is wrong
        assert_refused(forward_call(p, name, value), name, "cpu")


def test_batch_sizes_belong_on_the_cpu():
    p = problem(Case(packed=True), torch.float32)
    assert_refused(forward_call(p, "batch_sizes", p.batch_sizes.cuda()), "batch_sizes", "cpu|CPU")


def test_an_hx_on_another_device():
    rnn = RNN(3, 4)
    with pytest.raises(RuntimeError, match="device"):
        rnn(torch.randn(5, 2, 3), torch.zeros(1, 2, 4, device="cpu"))


# ---- sizes


def test_more_than_two_to_the_31_elements():
    """Two segments far apart, cut by resets, against runs of their own."""
    T, B, H = 1056, 2048, 1024
    assert T * B * H > 2**31
    if torch.cuda.get_device_properties().total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB on the GPU")
    torch.manual_seed(0)
    rnn = RNN(1, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, 1, dtype=torch.bfloat16, requires_grad=True)
    grad_output = torch.randn(1, B, H, dtype=torch.bfloat16).expand(T, B, H)
    reset = torch.zeros(T, B, dtype=torch.bool)
    first, last = 4, T - 4
    reset[first] = reset[last] = True
    output, _ = rnn(x, reset=reset)
    (grad_x,) = torch.autograd.grad(output, x, grad_output)
    for part in (slice(0, first), slice(last, T)):
        own = x[part].detach().requires_grad_()
        expected, _ = rnn(own)
        (expected_grad,) = torch.autograd.grad(expected, own, grad_output[part])
        # Four steps of bfloat16, each rounded once in another order of the same sums.
        for got, wanted in ((output[part], expected), (grad_x[part], expected_grad)):
            limit = 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max().item()
            assert largest_error(got, wanted) <= limit


def test_the_build_knows_its_cuda():
    facts = torch_bptt._extension._C.build_info()
    assert facts["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


# --- the device, and settings ---------------------------------------------------------------------


def test_the_plan_finds_what_the_device_has():
    """Where a query fails the plan would leave out paths without a word."""
    facts = _C.cuda_facts(torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability()
    assert facts["capability"] == 10 * major + minor
    if facts["capability"] == 90:
        assert facts["largest_cluster"] == 16
        assert facts["whole_grid"]
        for size, clusters in zip((2, 4, 8, 16), facts["resident_clusters"], strict=True):
            assert 0.7 * facts["multiprocessors"] <= size * clusters <= facts["multiprocessors"]


@pytest.mark.parametrize("setting", ["matmul", "cudnn.rnn", "all"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_newer_settings_of_precision(setting, precision):
    """In a process of its own: PyTorch refuses the older flags once these were used."""
    where = {"matmul": "cuda.matmul.", "cudnn.rnn": "cudnn.rnn.", "all": ""}[setting]
    program = f"""
import torch, torch_bptt
torch.backends.{where}fp32_precision = "{precision}"
rnn = torch_bptt.RNN(64, 1100, device="cuda")
output, _ = rnn(torch.randn(5, 600, 64, device="cuda"))
output.sum().backward()
assert rnn.weight_hh_l0.grad.isfinite().all()
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
