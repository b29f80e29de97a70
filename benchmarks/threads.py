"""One number of threads for all providers."""

import os

import torch


def limit(threads: int) -> None:
    """Torch's number of threads, and as many processors for the whole process.

    The processors are for XLA, which has no setting: it starts one thread for each that it may use.
    To be called before any provider has started threads.
    """
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(usable):
        raise SystemExit(f"--threads {threads}: there are {len(usable)} processors")
    os.sched_setaffinity(0, usable[-threads:])
    torch.set_num_threads(threads)
