"""Cases as tensors, and what is timed on them, as calls without arguments.

To add an implementation or a pass, add it to IMPLEMENTATIONS or PASSES.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case
from .clock import Call

DTYPES = {"tf32": torch.float32} | {
    name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")
}
# Half the spacing of numbers at 1 is the error of one rounding of an operand.
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()} | {"tf32": 2.0**-10}
RESET_SHARE = 0.03


@contextlib.contextmanager
def cudnn(**changed: bool) -> Iterator[None]:
    """cuDNN's flags, changed for a while."""
    flags = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic", "allow_tf32")
    with flags.flags(**{name: getattr(flags, name) for name in names} | changed):
        yield


@contextlib.contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """TF32 in float32 products, torch.nn.RNN's and the others, exactly where the case says so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        with cudnn(allow_tf32=name == "tf32"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Problem(NamedTuple):
    """One batch, with the gradients that backward starts from; ``reset`` is of 3 % of the steps."""

    x: Tensor  # (T, B, I), or packed (N, I)
    batch_sizes: Tensor | None
    h0: Tensor
    grad_output: Tensor
    grad_h_n: Tensor
    reset: Tensor  # (T, B) bool

    @classmethod
    def of(cls, case: Case, T: int, device: str) -> "Problem":
        dtype, directions = DTYPES[case.math], 2 if case.bidirectional else 1
        torch.manual_seed(0)
        x = torch.randn(T, case.B, case.inputs, device=device, dtype=dtype)
        batch_sizes, rows = None, (T, case.B)
        if case.packed:
            x, batch_sizes, *_ = pack_padded_sequence(x, case.lengths(T))
            rows = (len(x),)
        h0 = torch.randn(case.layers * directions, case.B, case.H, device=device, dtype=dtype)
        grad_output = torch.randn(*rows, directions * case.H, device=device, dtype=dtype)
        reset = torch.rand(T, case.B, device=device) < RESET_SHARE
        return cls(x, batch_sizes, h0, grad_output, torch.randn_like(h0), reset)

    def to(self, dtype: torch.dtype) -> "Problem":
        changed = ("x", "h0", "grad_output", "grad_h_n")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in changed})

    def rows(self, x: Tensor) -> Tensor | PackedSequence:
        return x if self.batch_sizes is None else PackedSequence(x, self.batch_sizes)


def network(case: Case, device: str) -> nn.RNN:
    torch.manual_seed(1)
    return nn.RNN(
        case.inputs, case.H, case.layers, case.nonlinearity, bidirectional=case.bidirectional,
        device=device, dtype=DTYPES[case.math],
    )  # fmt: skip


def ours(module: nn.RNN) -> nn.Module:
    """With weights of its own: those of ``module`` lie as cuDNN wants them, one behind another."""
    import torch_bptt

    converted = torch_bptt.RNN.from_torch(module)
    for parameter in converted.parameters():
        parameter.data = parameter.data.clone()
    return converted


class Implementation(NamedTuple):
    """How a network runs.

    module: what runs in the place of nn.RNN.
    reset: 3 % of the steps start anew.
    replay: as a CUDA graph, captured once.
    cudnn: whether PyTorch may use it; its own loop over time takes the place.
    """

    module: Callable[[nn.RNN], nn.Module]
    reset: bool = False
    replay: bool = False
    cudnn: bool = True

    @property
    def comparable(self) -> bool:
        """Whether the call returns what torch.nn.RNN would."""
        return not (self.reset or self.replay)


IMPLEMENTATIONS = {
    "torch.nn.RNN": Implementation(lambda module: module),
    "torch_bptt.RNN": Implementation(ours),
    "torch.nn.RNN without cuDNN": Implementation(lambda module: module, cudnn=False),
    "torch.nn.RNN in a graph": Implementation(lambda module: module, replay=True),
    "torch_bptt.RNN in a graph": Implementation(ours, replay=True),
    "torch_bptt.RNN with resets": Implementation(ours, reset=True),
}


def forward(module, problem, options):
    def call():
        with torch.no_grad():
            output, h_n = module(problem.rows(problem.x), problem.h0, **options)
        return [output if problem.batch_sizes is None else output.data, h_n]

    return call


def forward_and_backward(module, problem, options):
    x, h0 = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.h0))
    leaves = [x, h0, *module.parameters()]

    def call():
        output, h_n = module(problem.rows(x), h0, **options)
        flat = output if problem.batch_sizes is None else output.data
        given = (problem.grad_output, problem.grad_h_n)
        return list(torch.autograd.grad((flat, h_n), leaves, given))

    return call


def second_derivative(module, problem, options):
    """The gradient of a gradient penalty: |dL/dx|^2, for every leaf."""
    x = problem.x.detach().requires_grad_()
    leaves = [x, *module.parameters()]

    def call():
        output, _ = module(problem.rows(x), problem.h0, **options)
        flat = output if problem.batch_sizes is None else output.data
        (grad_x,) = torch.autograd.grad(flat, x, problem.grad_output, create_graph=True)
        return list(torch.autograd.grad(grad_x.square().sum(), leaves, materialize_grads=True))

    return call


PASSES = {
    "forward": forward,
    "forward+backward": forward_and_backward,
    "double backward": second_derivative,
}


def without_cudnn(call: Call) -> Call:
    def native():
        with cudnn(enabled=False):
            return call()

    return native


def captured(call: Call) -> Call:
    """The call as a CUDA graph's replay; what it would return stays in the graph's memory.

    A graph does not keep what it reads, so the replay keeps the call, which does.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(reads=call):
        graph.replay()

    return replay


def prepare(name: str, module: nn.RNN, problem: Problem, pass_name: str) -> Call:
    """The call of an implementation; everything that is done once is done."""
    implementation = IMPLEMENTATIONS[name]
    options = {"reset": problem.reset} if implementation.reset else {}
    call = PASSES[pass_name](implementation.module(module), problem, options)
    call = call if implementation.cudnn else without_cudnn(call)
    return captured(call) if implementation.replay else call


def yardstick(pass_name: str) -> str:
    """The implementation whose error is the measure of others'; cuDNN has no second derivatives."""
    return "torch.nn.RNN without cuDNN" if pass_name == "double backward" else "torch.nn.RNN"


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest |got - truth| / |truth| of all tensors; infinite for what is not finite."""
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        distance = (a.double() - b).norm() / b.norm().clamp(min=1e-300)
        worst = max(worst, distance.nan_to_num(math.inf, math.inf).item())
    return worst


def truth(case: Case, problem: Problem, pass_name: str, device: str) -> list[Tensor]:
    """The results of torch.nn.RNN in float64 on the same numbers, by PyTorch's own loop."""
    module = network(case, device).double()
    return without_cudnn(PASSES[pass_name](module, problem.to(torch.float64), {}))()


def allowed(case: Case, plain_error: float) -> float:
    """The error that a right implementation may have: see tests/tolerances.py, (c).

    Relative errors of whole tensors stand here for those of the largest entries there.
    """
    terms = case.inputs + case.H + 2
    return 2 * plain_error + EPS[case.math] * (1 + math.ceil(math.log2(terms)))
