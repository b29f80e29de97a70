"""What DistributedDataParallel adds to a training step of torch_bptt.RNN, process by process.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/ddp.py

A step with and without the exchange of gradients (no_sync), in turn; medians. B is the rows of one
process, and I = H. docs/distributed.md has the arithmetic that this goes with.
"""

import statistics
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torch_bptt

CASES = [(20, 32, 64), (100, 8, 128), (100, 32, 128), (100, 128, 128), (100, 32, 512)]  # T, B, H
REPEATS = 30


def seconds(step) -> float:
    dist.barrier()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def measure(T: int, B: int, H: int) -> tuple[float, float]:
    """Median seconds of a step with and without the exchange."""
    model = DistributedDataParallel(torch_bptt.RNN(H, H))
    x = torch.randn(T, B, H)

    def step() -> None:
        model.zero_grad()
        model(x)[1].sum().backward()

    def alone() -> None:
        with model.no_sync():
            step()

    for _ in range(5):
        step(), alone()
    pairs = [(seconds(step), seconds(alone)) for _ in range(REPEATS)]
    return tuple(map(statistics.median, zip(*pairs, strict=True)))


def main() -> None:
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    if first:
        print(f"{dist.get_world_size()} processes, {torch.get_num_threads()} threads each, gloo")
        print(f"{'T':>5}{'B':>5}{'H':>5}{'gradient':>12}{'alone':>10}{'exchanged':>11}{'share':>8}")
    for T, B, H in CASES:
        together, alone = measure(T, B, H)
        size = 4 * H * (2 * H + 2) / 2**20
        if first:
            print(
                f"{T:5}{B:5}{H:5}{size:8.2f} MiB{1e3 * alone:7.2f} ms{1e3 * together:8.2f} ms"
                f"{alone / together:8.0%}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
