"""Measure and write the results, row by row as they come: an interrupted run keeps its rows.

    python benchmarks/run.py --threads 1                        everything
    python benchmarks/run.py --threads all --cases main 'T1-*'  some of it

Before the clock starts every provider is checked against a float64 run of torch.nn.RNN; one that
is wrong is not timed, and the exit status is 1.
"""

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import table
import torch
from cases import GROUPS, find
from providers import PROVIDERS
from tqdm import tqdm

import torch_bptt
from torch_bptt._extension import _C
from torch_bptt.bench import cpu_name, measure, quantile

HERE = Path(__file__).parent


def commit() -> str:
    """The commit that is measured, with a + when files other than results differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """A file name for this machine: amd-epyc-2cpus-avx2."""
    words = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return f"{words}-{os.cpu_count()}cpus-{_C.isa()}"


def memory(case: str, provider: str, dtype: str, threads: int) -> tuple[float, float]:
    """MiB of one training step beyond inputs, outputs and gradients, and MiB of the output."""
    command = [sys.executable, HERE / "memory.py", case, provider]
    command += ["--dtype", dtype, "--threads", str(threads)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    extra, output = (int(word) / 2**20 for word in out.split())
    return extra, output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(GROUPS),
        metavar="PATTERN",
        help="groups or names, * allowed (%(default)s)",
    )
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), metavar="NAME"
    )
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--threads", default="1", help="a number or 'all' (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        help="for each pass of each provider (%(default)s); five calls are made in any case",
    )
    parser.add_argument("--csv", type=Path, help="where to (benchmarks/results/MACHINE.csv)")
    options = parser.parse_args()

    threads = os.cpu_count() if options.threads == "all" else int(options.threads)
    torch.set_num_threads(threads)
    dtype = getattr(torch, options.dtype)
    path = options.csv or HERE / "results" / f"{machine()}.csv"
    chosen = dict.fromkeys(found for pattern in options.cases for found in find(pattern))
    providers = [PROVIDERS[name] for name in options.providers]
    always = {
        "device": "cpu",
        "dtype": options.dtype,
        "threads": threads,
        "torch_bptt": torch_bptt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": _C.isa(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    wrong = False

    def record(group: str, case: str, provider: str, name: str, **values: object) -> None:
        which = {"group": group, "case": case, "provider": provider, "pass": name}
        version = {"version": PROVIDERS[provider].version}
        table.write(path, always | which | version | values)

    progress = tqdm(chosen, unit="case")
    for group, case in progress:
        progress.set_description(f"{case.name}, threads: {threads}")
        if group == "memory":
            for provider in options.providers:
                extra, output = memory(case.name, provider, options.dtype, threads)
                values = {"extra_mib": f"{extra:.1f}", "output_mib": f"{output:.1f}"}
                record(group, case.name, provider, "memory", **values)
            continue
        for name, times, reasons in measure(case, dtype, providers, options.seconds):
            for provider, reason in reasons.items():
                tqdm.write(f"{case.name}, {name}: {provider} not timed: {reason}")
                wrong = wrong or reason.startswith("wrong")
            for provider, seconds in times.items():
                median, p20, p80 = (f"{1e3 * quantile(seconds, q):.4g}" for q in (0.5, 0.2, 0.8))
                values = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
                record(group, case.name, provider, name, calls=len(seconds), **values)
    print(f"results are in {path}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
