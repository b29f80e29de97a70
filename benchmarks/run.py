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
import threads
import torch
from cases import GROUPS, TINY, find, gflop
from peak import gflops
from providers import DEFAULT, PROVIDERS
from tqdm import tqdm

import torch_bptt
from torch_bptt._extension import _C
from torch_bptt.bench import DTYPES, Case, Problem, Provider, cpu_name, measure

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


def facts() -> dict[str, object]:
    """What every row says about how it came about."""
    return {
        "torch_bptt": torch_bptt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": _C.isa(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def memory(case: str, provider: str, dtype: str, threads: int) -> tuple[float, float]:
    """MiB of one training step beyond inputs, outputs and gradients, and MiB of the output."""
    command = [sys.executable, HERE / "memory.py", case, provider]
    command += ["--dtype", dtype, "--threads", str(threads)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    extra, output = (int(word) / 2**20 for word in out.split())
    return extra, output


def usable(names: list[str] | None, device: str) -> list[Provider]:
    """The providers with these names that can run here; of the others it is said why not."""
    default = [name for name in DEFAULT if PROVIDERS[name].device == device]
    found = []
    for provider in (PROVIDERS[name] for name in names or default):
        on_other = provider.device != device and f"it runs on {provider.device} only"
        reason = on_other or provider.missing()
        if reason:
            print(f"{provider.name} is left out: {reason}")
        else:
            found.append(provider)
    if not found:
        raise SystemExit("none of the providers can run here")
    return found


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
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help=f"of {', '.join(map(repr, PROVIDERS))} (all of the device but torch.compile)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--threads", default="1", help="a number or 'all' (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        help="for each pass of each provider (%(default)s); five calls are made in any case",
    )
    parser.add_argument("--csv", type=Path, help="where to (benchmarks/results/MACHINE.csv)")
    options = parser.parse_args()

    every = len(os.sched_getaffinity(0))
    count = every if options.threads == "all" else int(options.threads)
    threads.limit(count)
    dtype = getattr(torch, options.dtype)
    path = options.csv or HERE / "results" / f"{machine()}.csv"
    chosen = dict.fromkeys(found for pattern in options.cases for found in find(pattern))
    providers = usable(options.providers, options.device)
    always = {
        "device": options.device,
        "dtype": options.dtype,
        "threads": count,
        **facts(),
    }

    def record(group: str, case: Case, provider: str, name: str, **values: object) -> None:
        which = {"group": group, "case": case.name, "provider": provider, "pass": name}
        sizes = {"T": case.T, "B": case.B, "I": case.I, "H": case.H}
        version = {"version": PROVIDERS[provider].version}
        table.write(path, always | which | sizes | version | values)

    for provider in providers:
        if not provider.unable(TINY, dtype, backward=False):
            provider.prepare(Problem.of(TINY, dtype).to(options.device), backward=False)()
    reasons = set()
    progress = tqdm(chosen, unit="case")
    for group, case in progress:
        progress.set_description(f"{case.name}, threads: {count}")
        if group == "memory":
            for provider in providers:
                # What is measured is the memory of the process, which says nothing of a GPU's.
                if provider.device == "cpu" and not provider.unable(case, dtype, backward=True):
                    extra, output = memory(case.name, provider.name, options.dtype, count)
                    values = {"extra_mib": f"{extra:.1f}", "output_mib": f"{output:.1f}"}
                    record(group, case, provider.name, "memory", **values)
            continue
        peak = f"{gflops(options.dtype, count):.1f}" if options.device == "cpu" else ""
        for found in measure(case, dtype, providers, options.seconds, options.device):
            for provider, reason in found.reasons.items():
                # Once for each reason, not for each case; but where it was wrong, that.
                if reason.startswith("wrong") or (provider, reason) not in reasons:
                    tqdm.write(f"{case.name}, {found.name}: {provider} not timed: {reason}")
                reasons.add((provider, reason))
            for provider, seconds in found.times.items():
                record(
                    group,
                    case,
                    provider,
                    found.name,
                    **table.of_times(seconds),
                    first_s=f"{found.first[provider]:.3g}",
                    gflop=f"{gflop(case, found.name != 'forward'):.4g}",
                    peak_gflops=peak,
                )
    print(f"results are in {path}")
    sys.exit(any(reason.startswith("wrong") for _, reason in reasons))


if __name__ == "__main__":
    main()
