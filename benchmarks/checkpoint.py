"""What checkpoint= takes and gives: time and memory of a training step on one very long sequence.

    python benchmarks/checkpoint.py                       one thread
    python benchmarks/checkpoint.py --threads all

The loss is of h_n alone, many to one. Time is the median of calls that take turns within one
process. Memory is measured in a process for each way: the most that was resident during a step,
less what was before it, so without the input; the output counts, where there is one. Linux only.
"""

import argparse
import ctypes
import gc
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import table
import threads
import torch
from memory import forget_peak, resident
from run import facts, machine
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import torch_bptt
from torch_bptt.bench import OURS, Case, quantile

PLAIN = OURS.name


def plain(rnn, x):
    return rnn(x)[1]


def with_output(rnn, x):
    rnn.checkpoint = True
    return rnn(x)[1]


def without_output(rnn, x):
    rnn.checkpoint = True
    return rnn(x, need_output=False)[1]


def by_torch(rnn, x):
    """torch.utils.checkpoint around stretches of as many steps, each of which is one kernel: there
    is nothing in it to stop early at."""
    state = None
    with set_checkpoint_early_stop(False):
        for part in x.split(math.ceil(math.sqrt(len(x)))):
            state = checkpoint(last, rnn, part, state, use_reentrant=False)
    return state


def last(rnn, x, state):
    return rnn(x, state)[1]


WAYS = {
    PLAIN: plain,
    f"{PLAIN}, checkpoint": with_output,
    f"{PLAIN}, checkpoint, no output": without_output,
    f"{PLAIN}, torch.utils.checkpoint": by_torch,
}


def prepare(way: str, case: Case) -> Callable[[], None]:
    """A training step, up to the gradients of the weights."""
    torch.manual_seed(0)
    rnn, x = torch_bptt.RNN(case.I, case.H), torch.randn(case.T, case.B, case.I)

    def step():
        rnn.zero_grad()
        rnn.checkpoint = None
        WAYS[way](rnn, x).sum().backward()

    return step


def print_memory(way: str, case: Case) -> None:
    """Bytes beyond what was there before the step."""
    prepare(way, Case(100, case.B, case.I, case.H))()
    step = prepare(way, case)
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps could hide what the step takes
    before = resident("VmRSS")
    forget_peak()
    step()
    print(resident("VmHWM") - before)


def memory(way: str, case: Case, count: int) -> float:
    """MiB, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", way, "--threads", str(count)]
    command += ["--sizes", *(str(size) for size in (case.T, case.B, case.I, case.H))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(out) / 2**20


def seconds(case: Case, ways: list[str], calls: int) -> dict[str, list[float]]:
    """Of single calls of every way, taking turns in an order that rotates."""
    steps = {way: prepare(way, case) for way in ways}
    times = {way: [] for way in ways}
    gc.disable()
    for turn in range(calls + 1):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            start = time.perf_counter()
            steps[way]()
            if turn:  # the first round is not counted
                times[way].append(time.perf_counter() - start)
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1", help="a number or 'all' (%(default)s)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=4,
        default=(100_000, 16, 16, 128),
        metavar=("T", "B", "I", "H"),
        help="(%(default)s)",
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
        help=f"of {', '.join(map(repr, WAYS))} (all)",
    )  # fmt: skip
    parser.add_argument("--calls", type=int, default=9, help="of each way (%(default)s)")
    parser.add_argument(
        "--csv", type=Path, help="where to (benchmarks/results/checkpoint/MACHINE.csv)"
    )
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = len(os.sched_getaffinity(0))
    count = every if options.threads == "all" else int(options.threads)
    threads.limit(count)
    case = Case(*options.sizes)
    if options.memory_of:
        print_memory(options.memory_of, case)
        return

    here = Path(__file__).parent
    path = options.csv or here / "results" / "checkpoint" / f"{machine()}.csv"
    times = seconds(case, options.ways, options.calls)
    print(f"{case.name}, {table.count(str(count))}")
    for way, found in times.items():
        extra = memory(way, case, count)
        median = quantile(found, 0.5)
        ratio = median / quantile(times[options.ways[0]], 0.5)
        print(f"{way:44} {median:7.3g} s  {ratio:5.2f}x  {extra:8.1f} MiB")
        row = {
            "group": "checkpoint",
            "case": case.name,
            "provider": way,
            "device": "cpu",
            "dtype": "float32",
            "threads": count,
            "pass": "forward+backward",
            "T": case.T,
            "B": case.B,
            "I": case.I,
            "H": case.H,
            **table.of_times(found),
            "extra_mib": f"{extra:.1f}",
            "output_mib": f"{4 * case.T * case.B * case.H / 2**20:.1f}",
            "version": torch_bptt.__version__,
            **facts(),
        }
        table.write(path, row)
    print(f"results are in {path}")


if __name__ == "__main__":
    main()
