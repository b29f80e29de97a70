"""The memory that one training step takes, measured in a process of its own. Linux only.

    python benchmarks/memory.py CASE PROVIDER [--dtype DTYPE] [--threads N]

prints the bytes that were held at most, beyond inputs, outputs and gradients, and the bytes of the
output: the peak of the resident memory during a step of forward and backward, less what was
resident before it, less what the step returns. A step on a tiny problem goes before.
"""

import argparse
import ctypes
import re
from pathlib import Path

import threads
import torch
from cases import TINY, find
from providers import PROVIDERS

from torch_bptt.bench import Problem


def resident(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, the most since `forget_peak`. Bytes."""
    kib = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kib[1])


def forget_peak() -> None:
    """Count VmHWM anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case")
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    threads.limit(options.threads)
    dtype = getattr(torch, options.dtype)
    _, case = find(options.case)[0]
    provider = PROVIDERS[options.provider]

    provider.prepare(Problem.of(TINY, dtype), backward=True)()
    step = provider.prepare(Problem.of(case, dtype), backward=True)
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps could hide what the step takes
    before = resident("VmRSS")
    forget_peak()
    results = step()
    peak = resident("VmHWM")
    print(peak - before - sum(array.nbytes for array in results), results[0].nbytes)


if __name__ == "__main__":
    main()
