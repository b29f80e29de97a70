"""How fast torch_bptt.RNN is next to torch.nn.RNN on this machine: python -m torch_bptt bench.

What is measured is a call of the module as users make it, Python included, in two passes:

    forward             output and h_n, under no_grad
    forward+backward    also the gradients of input, h0 and every weight and bias

The implementations solve the same problem, are checked against a float64 run of torch.nn.RNN before
the clock starts, and take turns of some milliseconds, so that ratios survive a machine whose speed
changes. The suite in benchmarks/ measures more cases and peers with these same functions.
"""

import abc
import argparse
import dataclasses
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import torch_bptt
from torch_bptt._extension import _C

PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "float64", "bfloat16", "float16")

# A provider's problem made ready: each call solves it once and returns output, h_n and, in the pass
# forward+backward, the gradients of x, h0 and the parameters, these in the order of nn.RNN's. They
# are arrays of the provider's own kind, which its `tensors` turns into tensors.
Step = Callable[[], tuple]


@dataclasses.dataclass(frozen=True)
class Case:
    """A size to measure: T steps, B rows, I input features, H hidden units, and what varies it.

    uneven: rows of all lengths from T down to T/B steps, packed.
    """

    T: int
    B: int
    I: int  # noqa: E741 - the input size is called so everywhere
    H: int
    nonlinearity: str = "tanh"
    num_layers: int = 1
    bidirectional: bool = False
    uneven: bool = False

    @property
    def name(self) -> str:
        """Sizes, then whatever is not the default: T100-B32-I16-H64-relu."""
        words = [f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        if self.nonlinearity != "tanh":
            words.append(self.nonlinearity)
        if self.num_layers > 1:
            words.append(f"{self.num_layers}layers")
        if self.bidirectional:
            words.append("bidirectional")
        if self.uneven:
            words.append("uneven")
        return "-".join(words)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        """Steps of each row, none longer than the one before."""
        if not self.uneven:
            return [self.T] * self.B
        return [max(1, self.T * (self.B - b) // self.B) for b in range(self.B)]


# From one short sequence on a small network to a large batch on a large one.
CASES = (
    Case(100, 1, 16, 64),
    Case(100, 32, 16, 64),
    Case(100, 32, 64, 128),
    Case(100, 32, 128, 256),
    Case(100, 64, 256, 512),
    Case(1000, 1, 128, 256),
    Case(1000, 16, 64, 128),
    Case(200, 128, 128, 256),
)


@dataclasses.dataclass
class Problem:
    """A case as tensors: what every provider is given.

    x is (T, B, I), h0 (layers * directions, B, H), grad_output (T, B, directions * H); x and
    grad_output are packed, (N, ...), when batch_sizes is there. state holds the weights under the
    names of nn.RNN.
    """

    case: Case
    state: dict[str, Tensor]
    x: Tensor
    h0: Tensor
    grad_output: Tensor
    batch_sizes: Tensor | None

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> "Problem":
        """The same numbers every time, drawn in float32 and rounded to dtype."""
        batch_sizes, rows = None, (case.T, case.B)
        if case.uneven:
            sizes = [sum(length > t for length in case.lengths) for t in range(case.T)]
            batch_sizes, rows = torch.tensor(sizes), (sum(sizes),)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            problem = cls(
                case,
                module(nn.RNN, case, torch.float32).state_dict(),
                torch.randn(*rows, case.I),
                torch.randn(case.num_layers * case.directions, case.B, case.H),
                torch.randn(*rows, case.directions * case.H),
                batch_sizes,
            )
        return problem.to(dtype)

    def to(self, to: torch.dtype | str) -> "Problem":
        """The same problem in another dtype or on another device."""
        return dataclasses.replace(
            self,
            state={name: tensor.to(to) for name, tensor in self.state.items()},
            x=self.x.to(to),
            h0=self.h0.to(to),
            grad_output=self.grad_output.to(to),
        )


def module(cls: type[nn.Module], case: Case, dtype: torch.dtype) -> nn.Module:
    """An nn.RNN, or a class with its signature, for a case."""
    return cls(
        case.I,
        case.H,
        num_layers=case.num_layers,
        nonlinearity=case.nonlinearity,
        bidirectional=case.bidirectional,
        dtype=dtype,
    )


class Provider(abc.ABC):
    """One of the implementations to compare."""

    name: str  # as it stands in the results, as do the two below
    version: str
    device = "cpu"

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, as what it needs is not there."""
        return None

    def unable(self, case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        """Why it cannot solve a problem; None when it can."""
        return None

    @abc.abstractmethod
    def prepare(self, problem: Problem, backward: bool) -> Step:
        """The problem as a function to call again and again. backward: with all gradients."""

    def tensors(self, results: tuple) -> tuple[Tensor, ...]:
        """What a step returned, as tensors. Outside of what is timed."""
        return results


@dataclasses.dataclass(frozen=True)
class ModuleProvider(Provider):
    """A module with the signature of nn.RNN."""

    name: str
    cls: Callable[..., nn.Module]
    version: str
    device: str = "cpu"

    def missing(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        return None

    def prepare(self, problem: Problem, backward: bool) -> Step:
        """The problem as a function to call again and again. backward: with all gradients."""
        model = module(self.cls, problem.case, problem.x.dtype).to(problem.x.device)
        model.load_state_dict(problem.state)
        x = problem.x.detach().requires_grad_(backward)
        h0 = problem.h0.detach().requires_grad_(backward)
        packed = problem.batch_sizes is not None

        def forward() -> tuple[Tensor, Tensor]:
            output, h_n = model(PackedSequence(x, problem.batch_sizes) if packed else x, h0)
            return (output.data if packed else output), h_n

        @torch.no_grad()
        def infer() -> tuple[Tensor, ...]:
            return forward()

        wanted = (x, h0, *model.parameters())

        def train() -> tuple[Tensor, ...]:
            output, h_n = forward()
            return output, h_n, *torch.autograd.grad(output, wanted, problem.grad_output)

        step = train if backward else infer

        def finished() -> tuple[Tensor, ...]:
            results = step()
            torch.cuda.synchronize()
            return results

        return finished if self.device == "cuda" else step


BASELINE = ModuleProvider("torch.nn.RNN", nn.RNN, torch.__version__)
OURS = ModuleProvider("torch_bptt.RNN", torch_bptt.RNN, torch_bptt.__version__)


def distances(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """For each result, max |result - exact| over max |exact|."""
    return [
        ((result.double() - right).abs().max() / right.abs().max()).item()
        for result, right in zip(results, exact, strict=True)
    ]


def disagreement(
    results: tuple[Tensor, ...], baseline: tuple[Tensor, ...], exact: tuple[Tensor, ...], case: Case
) -> str | None:
    """Why results are not right, None when they are: all finite, and near the float64 run.

    Near: at most twice as far as nn.RNN in the same dtype, plus a rounding of the longest sum, of
    K = T * B + I + H terms: 8 eps (1 + ceil(log2 K)). The derivative of relu jumps at zero, where a
    state within rounding of it falls on either side; each such step moves a gradient by about one
    part in T * B, so relu's gradients are given the square root of eps instead of eps.
    """
    eps = torch.finfo(baseline[0].dtype).eps
    rounding = 8 * (1 + math.ceil(math.log2(case.T * case.B + case.I + case.H)))
    pairs = zip(distances(results, exact), distances(baseline, exact), strict=True)
    for index, (error, error_of_baseline) in enumerate(pairs):
        kinks = case.nonlinearity == "relu" and index >= 2
        allowed = 2 * error_of_baseline + rounding * (math.sqrt(eps) if kinks else eps)
        if not error <= allowed:
            names = ("output", "h_n", "the gradient of x", "the gradient of h0")
            name = names[index] if index < len(names) else "a parameter's gradient"
            return f"wrong: {name} is off by {error:.1e} of its maximum, {allowed:.1e} is allowed"
    return None


def take_turns(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call of each step.

    They take turns, in an order that rotates, until `seconds` for each of them are spent and each
    had at least five. A turn is as many calls as fit in 10 ms, at least one; in one that has
    several, the first is not counted: it finds the caches full of the others' data.
    """
    calls, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(3):
            start = time.perf_counter()
            step()
            last = time.perf_counter() - start
        calls[name] = max(1, min(1000, int(0.010 / last)))
    order = list(steps)
    end = time.perf_counter() + seconds * len(steps)
    gc.collect()
    gc.disable()
    try:
        turn = 0
        while turn < 5 or time.perf_counter() < end:
            for name in order:
                step = steps[name]
                if calls[name] > 1:
                    step()
                for _ in range(calls[name]):
                    start = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - start)
            order = order[1:] + order[:1]
            turn += 1
    finally:
        gc.enable()
    return times


class Measurement(NamedTuple):
    """One pass on one case, by provider."""

    name: str  # of the pass
    times: dict[str, list[float]]  # seconds of each call
    first: dict[str, float]  # seconds to get ready and call once: with what compiles, that
    reasons: dict[str, str]  # why one was not timed


def measure(
    case: Case,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    seconds: float,
    device: str = "cpu",
) -> Iterator[Measurement]:
    """Check and time providers on one case, both passes.

    Arguments:
        seconds: to spend on each pass of each provider.
    """
    problem = Problem.of(case, dtype).to(device)
    exact = BASELINE.prepare(problem.to(torch.float64), backward=True)()
    for name in PASSES:
        backward = name == "forward+backward"
        baseline = BASELINE.prepare(problem, backward)()
        steps, first, reasons = {}, {}, {}
        for provider in providers:
            reason = provider.unable(case, dtype, backward)
            if not reason:
                start = time.perf_counter()
                step = provider.prepare(problem, backward)
                results = step()
                first[provider.name] = time.perf_counter() - start
                results = provider.tensors(results)
                reason = disagreement(results, baseline, exact[: len(baseline)], case)
            if reason:
                reasons[provider.name] = reason
            else:
                steps[provider.name] = step
        yield Measurement(name, take_turns(steps, seconds), first, reasons)


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1, linear between neighbours."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    """Print a table of the eight cases, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_bptt bench", description="torch_bptt.RNN against torch.nn.RNN, here."
    )
    parser.add_argument("--seconds", type=float, default=60, help="about how long (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (as many as torch takes)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    # Checks and warm-ups take about a third of the time.
    seconds = options.seconds * 0.65 / (len(CASES) * len(PASSES) * 2)

    print(f"{cpu_name()}, {_C.isa()}, threads: {torch.get_num_threads()}, {options.dtype}")
    print(f"torch {torch.__version__}, torch_bptt {torch_bptt.__version__}")
    print("median milliseconds of a call\n")
    print(" " * 22 + "".join(f"{name:>32}" for name in PASSES))
    print(f"{'case':22}" + f"{'nn.RNN':>10}{'torch_bptt':>12}{'speed-up':>10}" * len(PASSES))
    ratios = {name: [] for name in PASSES}
    for case in CASES:
        print(f"{case.name:22}", end="", flush=True)
        for found in measure(case, dtype, (BASELINE, OURS), seconds):
            for provider, reason in found.reasons.items():
                raise SystemExit(f"\n{found.name}: {provider} was not timed: {reason}")
            theirs, ours = (1e3 * quantile(found.times[p.name], 0.5) for p in (BASELINE, OURS))
            ratios[found.name].append(theirs / ours)
            print(f"{theirs:10.3f}{ours:12.3f}{theirs / ours:9.1f}x", end="", flush=True)
        print()
    print(
        f"{'geometric mean':22}"
        + "".join(f"{statistics.geometric_mean(r):31.1f}x" for r in ratios.values())
    )
