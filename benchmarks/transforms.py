"""What torch.func, torch.compile and second derivatives cost, next to what one writes without them.

    python benchmarks/transforms.py                       one thread
    python benchmarks/transforms.py --threads all

ensemble   16 small networks on one input: loops over the modules, and vmap over their weights
samples    the gradient of each sample: a loop, vmap over grad; and the gradient of their sum
compile    a training step as it is, and compiled
second     a Hessian times a vector, next to the gradient

In each case the ways are checked against each other, take turns within one process, and their times
are compared with the first one's.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import table
import threads
import torch
from run import facts, machine
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import torch_bptt
from torch_bptt.bench import Case, quantile, take_turns

NETWORKS = 16
Ways = dict[str, Callable[[], list[torch.Tensor]]]


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def networks(cls: type[nn.Module], case: Case) -> list[nn.Module]:
    torch.manual_seed(0)
    return [cls(case.I, case.H) for _ in range(NETWORKS)]


def gradients(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss_of(module(x)[0]), list(module.parameters()))


def ensemble(case: Case) -> dict[str, Ways]:
    ours, theirs = networks(torch_bptt.RNN, case), networks(nn.RNN, case)
    parameters, _ = stack_module_state(ours)
    x = torch.randn(case.T, case.B, case.I)

    def run(p, x):
        return functional_call(ours[0], p, (x,))[0]

    @torch.no_grad()
    def outputs(modules):
        return [torch.stack([module(x)[0] for module in modules])]

    def loop(modules):
        each = [gradients(module, x) for module in modules]
        return [torch.stack(same) for same in zip(*each, strict=True)]

    def backward():
        loss = vmap(run, (0, None))(parameters, x).square().mean((1, 2, 3)).sum()
        return list(torch.autograd.grad(loss, list(parameters.values())))

    return {
        "forward": {
            "loop over torch.nn.RNN": lambda: outputs(theirs),
            "loop over torch_bptt.RNN": lambda: outputs(ours),
            "vmap over weights": torch.no_grad()(
                lambda: [vmap(run, (0, None))(parameters, x)],
            ),
        },
        "forward+backward": {
            "loop over torch.nn.RNN": lambda: loop(theirs),
            "loop over torch_bptt.RNN": lambda: loop(ours),
            "vmap of grad": lambda: list(
                vmap(grad(lambda p, x: loss_of(run(p, x))), (0, None))(parameters, x).values()
            ),
            "backward of vmap": backward,
        },
    }


def samples(case: Case) -> dict[str, Ways]:
    module, x = networks(torch_bptt.RNN, case)[0], torch.randn(case.T, case.B, case.I)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(p, sample):
        return loss_of(functional_call(module, p, (sample[:, None],))[0])

    def loop():
        each = [grad(loss)(parameters, x[:, b]) for b in range(case.B)]
        return [torch.stack([g[name] for g in each]).mean(0) for name in parameters]

    def mapped():
        each = vmap(grad(loss), (None, 1))(parameters, x)
        return [each[name].mean(0) for name in parameters]

    return {
        "forward+backward": {
            "gradient of the mean": lambda: list(gradients(module, x)),
            "vmap of grad": mapped,
            "loop over samples": loop,
        }
    }


def compiled(case: Case) -> dict[str, Ways]:
    x, target = torch.randn(case.T, case.B, case.I), torch.randn(case.T, case.B, case.I)

    class Network(nn.Module):
        def __init__(self, cls):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = cls(case.I, case.H), nn.Linear(case.H, case.I)

        def forward(self, x):
            return nn.functional.mse_loss(self.head(self.rnn(x)[0]), target)

    def step(network, run):
        return lambda: list(torch.autograd.grad(run(x), list(network.parameters())))

    ours, theirs = Network(torch_bptt.RNN), Network(nn.RNN)
    return {
        "forward+backward": {
            "torch_bptt.RNN": step(ours, ours),
            "torch_bptt.RNN, compiled": step(ours, torch.compile(ours, fullgraph=True)),
            "torch.nn.RNN": step(theirs, theirs),
        }
    }


def second(case: Case) -> dict[str, Ways]:
    module, x = networks(torch_bptt.RNN, case)[0], torch.randn(case.T, case.B, case.I)
    parameters = list(module.parameters())
    vector = [torch.randn_like(p) for p in parameters]
    named = {name: p.detach() for name, p in module.named_parameters()}

    def autograd():
        first = torch.autograd.grad(loss_of(module(x)[0]), parameters, create_graph=True)
        return list(torch.autograd.grad(first, parameters, vector))

    tangent = dict(zip(named, vector, strict=True))

    def loss(p):
        return loss_of(functional_call(module, p, (x,))[0])

    def forward_over_reverse():
        return list(jvp(grad(loss), (named,), (tangent,))[1].values())

    def reverse_over_forward():
        return list(grad(lambda p: jvp(loss, (p,), (tangent,))[1])(named).values())

    return {
        "forward+backward": {
            "gradient": lambda: list(gradients(module, x)),
            "torch.func.grad": lambda: list(grad(loss)(named).values()),
        },
        "Hessian times vector": {
            "reverse over reverse": autograd,
            "forward over reverse": forward_over_reverse,
            "reverse over forward": reverse_over_forward,
        },
    }


GROUPS = {
    "ensemble": (ensemble, [Case(20, 4, 4, 16), Case(50, 8, 8, 32), Case(100, 16, 8, 64)]),
    "samples": (samples, [Case(50, 16, 8, 32), Case(100, 32, 16, 64), Case(100, 32, 64, 128)]),
    "compile": (compiled, [Case(100, 32, 64, 128)]),
    "second": (second, [Case(100, 32, 64, 128)]),
}


def check(ways: Ways) -> None:
    """All ways compute the same: relative to the largest entry, to float32 and 100s of terms."""
    first, *others = (way() for way in ways.values())
    for result in others:
        for got, expected in zip(result, first, strict=True):
            torch.testing.assert_close(
                got, expected, rtol=0, atol=1e-4 * float(expected.abs().max())
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1", help="a number or 'all' (%(default)s)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="(all)")
    parser.add_argument(
        "--seconds", type=float, default=2, help="for each way in each case (%(default)s)"
    )
    parser.add_argument(
        "--csv", type=Path, help="where to (benchmarks/results/transforms/MACHINE.csv)"
    )
    options = parser.parse_args()
    every = len(os.sched_getaffinity(0))
    count = every if options.threads == "all" else int(options.threads)
    threads.limit(count)
    here = Path(__file__).parent
    path = options.csv or here / "results" / "transforms" / f"{machine()}.csv"
    for group in options.groups:
        prepare, cases = GROUPS[group]
        for case in cases:
            passes = prepare(case)
            for ways in passes.values():
                check(ways)
            steps = {(name, way): run for name, ways in passes.items() for way, run in ways.items()}
            times = take_turns(steps, options.seconds)
            print(f"{group}, {case.name}, {table.count(str(count))}")
            for (name, way), found in times.items():
                median = quantile(found, 0.5)
                first = next(iter(steps)) if group == "second" else (name, next(iter(passes[name])))
                ratio = median / quantile(times[first], 0.5)
                print(f"  {name:22} {way:26} {1e3 * median:9.3g} ms  {ratio:5.2f}x")
                row = {
                    "group": group,
                    "case": case.name,
                    "provider": way,
                    "device": "cpu",
                    "dtype": "float32",
                    "threads": count,
                    "pass": name,
                    "T": case.T,
                    "B": case.B,
                    "I": case.I,
                    "H": case.H,
                    **table.of_times(found),
                    "version": torch_bptt.__version__,
                    **facts(),
                }
                table.write(path, row)
    print(f"results are in {path}")


if __name__ == "__main__":
    main()
