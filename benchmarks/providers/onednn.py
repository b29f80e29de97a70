"""oneDNN's vanilla RNN through onednn.cpp, one primitive for each layer.

Its bfloat16 has the biases and all gradients in float32; so they are given, so they are returned.
"""

import ctypes
import functools
import sysconfig
from pathlib import Path

import native
import torch
from torch import Tensor

from providers.peer import Peer
from torch_bptt.bench import Case, Problem, Step

PREFIX = Path(sysconfig.get_path("data"))


@functools.cache
def library() -> ctypes.CDLL:
    """onednn.cpp, compiled and loaded."""
    lib = native.load(
        Path(__file__).with_suffix(".cpp"),
        f"-I{PREFIX / 'include'}",
        f"-L{PREFIX / 'lib'}",
        f"-Wl,-rpath,{PREFIX / 'lib'}",
        "-ldnnl",
    )
    lib.rnn_error.restype = ctypes.c_char_p
    lib.rnn_create.restype = ctypes.c_void_p
    lib.rnn_create.argtypes = [ctypes.c_int] * 5 + [ctypes.c_char_p] + [ctypes.c_bool] * 2
    lib.rnn_destroy.argtypes = [ctypes.c_void_p]
    for run in (lib.rnn_forward, lib.rnn_backward):
        run.restype = ctypes.c_bool
        run.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
    # With a second OpenMP in the process, torch.set_num_threads would not reach this one.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    shared = lib.rnn_threads() == threads + 1
    torch.set_num_threads(threads)
    if not shared:
        raise RuntimeError("oneDNN and torch are not in the same OpenMP runtime")
    return lib


class Layer:
    """One layer in one or both directions: primitives and their memory, made once."""

    def __init__(self, problem: Problem, features: int, backward: bool) -> None:
        case = problem.case
        self.lib = library()
        self.rnn = self.lib.rnn_create(
            *(case.T, case.B, features, case.H, case.directions),
            case.nonlinearity.encode(),
            problem.x.dtype == torch.bfloat16,
            backward,
        )
        self.check(self.rnn is not None)

    def __del__(self) -> None:
        self.lib.rnn_destroy(self.rnn)

    def check(self, done: bool) -> None:
        if not done:
            raise RuntimeError(f"oneDNN: {self.lib.rnn_error().decode()}")

    def forward(self, *tensors: Tensor) -> None:
        self.check(self.lib.rnn_forward(self.rnn, addresses(tensors)))

    def backward(self, *tensors: Tensor) -> None:
        self.check(self.lib.rnn_backward(self.rnn, addresses(tensors)))


def addresses(tensors: tuple[Tensor, ...]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def join(directions: tuple[Tensor, ...]) -> Tensor:
    """One tensor for both directions; a single one as it is."""
    return directions[0] if len(directions) == 1 else torch.cat(directions)


class OneDNN(Peer):
    name = "oneDNN"
    needs = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")

    def unable(self, case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        if case.uneven:
            return "no packed sequences"
        if dtype not in (torch.float32, torch.bfloat16):
            return "float32 and bfloat16 only"
        return None

    def prepare(self, problem: Problem, backward: bool) -> Step:
        case, D = problem.case, problem.case.directions
        layers = [
            Layer(problem, D * case.H if index else case.I, backward)
            for index in range(case.num_layers)
        ]
        # By layer: w_ih, w_hh, b_ih, b_hh, each a tuple of directions.
        parameters = [
            tensor.float() if name.startswith("bias") else tensor
            for name, tensor in problem.state.items()
        ]
        weights = [
            tuple(zip(*(parameters[at + 4 * d : at + 4 * d + 4] for d in range(D)), strict=True))
            for at in range(0, len(parameters), 4 * D)
        ]
        states = problem.h0.split(D)

        def forward() -> tuple[list[tuple[Tensor, ...]], Tensor]:
            """What each layer was given and gave, and h_n."""
            x, h_n, tape = problem.x, torch.empty_like(problem.h0), []
            for layer, h0, h, (w_ih, w_hh, b_ih, b_hh) in zip(
                layers, states, h_n.split(D), weights, strict=True
            ):
                output = x.new_empty(case.T, case.B, D * case.H)
                bias = join(b_ih) + join(b_hh)
                tape.append((x, h0, join(w_ih), join(w_hh), bias, output, h))
                layer.forward(*tape[-1])
                x = output
            return tape, h_n

        def infer() -> tuple[Tensor, ...]:
            tape, h_n = forward()
            return tape[-1][5], h_n

        def train() -> tuple[Tensor, ...]:
            tape, h_n = forward()
            grad, grad_h0, grads = problem.grad_output.float(), [], []
            for layer, tensors in zip(reversed(layers), reversed(tape), strict=True):
                results = [torch.empty_like(tensor, dtype=grad.dtype) for tensor in tensors[:5]]
                layer.backward(*tensors, grad, *results)
                grad, grad_h, w_ih, w_hh, bias = results
                by_direction = zip(*(t.chunk(D) for t in (w_ih, w_hh, bias, bias)), strict=True)
                grads = [tensor for direction in by_direction for tensor in direction] + grads
                grad_h0.insert(0, grad_h)
            return tape[-1][5], h_n, grad, join(tuple(grad_h0)), *grads

        return train if backward else infer
