"""Times implementations of RNN layers, in turns, on every case and length, row by row.

    python -m gpu.layers --out FILE.csv --implementations torch.nn.RNN
    python -m gpu.layers --out FILE.csv --implementations torch.nn.RNN torch_bptt.RNN --check

A row is begun only while ``--seconds`` are not over. What cannot run, for want of memory or because
an implementation refuses it, leaves a row that says so.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch

from . import rows
from .cases import GROUPS, MATHS, Case, find
from .cases import PASSES as PLAIN_PASSES
from .clock import Events, Spread, Wall, take_turns
from .networks import (
    IMPLEMENTATIONS,
    PASSES,
    Problem,
    allowed,
    arithmetic,
    error,
    network,
    prepare,
    truth,
    yardstick,
)

LONGEST = 0.5  # seconds of a call
AWAKE = 0.5  # seconds of work ahead of the first row: an idle device has slow clocks
KERNELS_SHARE = 0.15  # of the time, where kernels are asked for
SETUP = 0.02  # seconds to make a problem; a guess, for the prediction alone


class Stuck(Exception):
    """The device answers every call with an error: no measurement can follow."""


def is_wrong(columns: dict) -> bool:
    return columns.get("status", "").startswith("wrong")


def describe(group: str, case: Case, T: int, pass_name: str) -> dict[str, object]:
    return {
        "group": group,
        "case": case.name,
        "pass": pass_name,
        "T": T,
        "B": case.B,
        "I": case.inputs,
        "H": case.H,
        "layers": case.layers,
        "directions": 2 if case.bidirectional else 1,
        "packed": int(case.packed),
        "nonlinearity": case.nonlinearity,
        "math": case.math,
    }


def reason(failure: Exception) -> str:
    """One line of it. Raises Stuck where the device has to be given up."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as again:
            raise Stuck(str(again)) from failure
        torch.cuda.empty_cache()
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:200]}"


def check(case: Case, names: list[str], pass_name: str, device: str) -> dict[str, dict]:
    """Columns ``error`` and ``status`` of each implementation, on the shortest length.

    torch.nn.RNN is the yardstick. Where a graph is replayed or rows are reset there is nothing to
    compare with here: the tests do.
    """
    problem = Problem.of(case, min(case.steps), device)
    try:
        expected = truth(case, problem, pass_name, device)
        plain = prepare(yardstick(pass_name), network(case, device), problem, pass_name)
        plain = error(plain(), expected)
    except RuntimeError as failure:
        return {name: {"error": f"not checked: {reason(failure)}"} for name in names}
    found = {}
    for name in names:
        if not IMPLEMENTATIONS[name].comparable:
            continue
        try:
            own = error(prepare(name, network(case, device), problem, pass_name)(), expected)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as failure:
            found[name] = {"status": reason(failure)}
            continue
        limit = allowed(case, plain)
        right = own <= limit
        status = "ok" if right else f"wrong: error {own:.2e}, allowed {limit:.2e}"
        found[name] = {"error": f"{own:.2e}", "status": status}
    return found


def time_case(case, T, names, pass_name, device, clock, seconds):
    """(columns of each implementation) for one length."""
    problem, calls, columns = Problem.of(case, T, device), {}, {}
    for name in names:
        try:
            calls[name] = prepare(name, network(case, device), problem, pass_name)
            calls[name]()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as failure:
            calls.pop(name, None)
            columns[name] = {"status": reason(failure)}
    try:
        times = take_turns(calls, clock, seconds) if calls else {}
    except RuntimeError as failure:
        why = reason(failure)
        return columns | {name: {"status": why} for name in calls}
    for name, own in times.items():
        median, p20, p80 = (f"{value:.2f}" for value in Spread.of(own))
        columns[name] = {
            "status": "ok", "median_us": median, "p20_us": p20, "p80_us": p80, "calls": len(own),
        }  # fmt: skip
    return columns


def kernels(call) -> str:
    """The kernels that take most of the time of a call: name x launches, by time."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    events = [event for event in record.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return "; ".join(f"{event.key[:90]} x {event.count}" for event in events[:4])


def wake(clock) -> None:
    a = torch.ones(2048, 2048, device="cuda")
    end = clock.seconds() + AWAKE
    while clock.seconds() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


def lengths(case: Case) -> tuple[int, ...]:
    return case.steps_within(LONGEST)


def plan(options) -> list[tuple[str, Case, str]]:
    """(group, case, pass), in the order of the measurement."""
    chosen = [(g, case) for g, case in find(options.groups) if case.math in options.maths]
    return [(group, case, name) for group, case in chosen for name in options.passes]


def predicted(case: Case, pass_name: str, options) -> float:
    """Seconds, from a model of the device that no measurement stands behind."""
    backward = pass_name != "forward"
    count = len(options.implementations)
    turns = [
        SETUP + count * max(options.row_seconds, 10 * case.predicted(T, backward))
        for T in lengths(case)
    ]
    return sum(turns)


def dry_run(options) -> None:
    total = 0.0
    for group, work in itertools.groupby(plan(options), key=lambda entry: entry[0]):
        work = list(work)
        seconds = sum(predicted(case, name, options) for _, case, name in work)
        total += seconds
        count = sum(len(lengths(case)) for _, case, _ in work) * len(options.implementations)
        within = "" if total <= options.seconds else f"  beyond the {options.seconds:.0f} s given"
        print(f"  {group:<14} {count:5} rows {seconds:7.0f} s, {total:5.0f} s so far{within}")


def main(arguments: list[str] | None = None, clock=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [name for name in GROUPS if name != "smoke"]
    parser.add_argument("--out", type=Path, required=True, help="the CSV file, which is continued")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PLAIN_PASSES))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=every)
    parser.add_argument("--maths", nargs="+", choices=MATHS, default=MATHS)
    parser.add_argument("--seconds", type=float, default=240.0, help="in all (%(default)s)")
    parser.add_argument(
        "--row-seconds", type=float, default=0.04, help="for each row (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="compare the results with float64")
    parser.add_argument("--kernels", action="store_true", help="name the kernels that ran")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", default="", help="what to write into the rows")
    parser.add_argument("--dry-run", action="store_true", help="predict, measure nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        dry_run(options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.layers: torch sees no GPU here, expected one for --device cuda")
        return 1

    clock = clock or (Events() if options.device == "cuda" else Wall())
    always = rows.device_facts(options.commit)
    always["forced_path"] = os.environ.get("TORCH_BPTT_CUDA_PATH", "")
    if any("torch_bptt" in name for name in options.implementations):
        import torch_bptt

        always["torch_bptt"] = torch_bptt.__version__
    mhz = rows.clock_reader()
    file = rows.Rows(options.out, (*rows.NETWORK_COLUMNS, *rows.DEVICE_COLUMNS), always)
    if options.device == "cuda":
        wake(clock)
    begin, work = clock.seconds(), plan(options)
    share = 1 - KERNELS_SHARE if options.kernels else 1
    measured, wrong = 0, False

    def left(share: float = 1.0) -> bool:
        return clock.seconds() - begin < share * options.seconds

    try:
        for group, case, name in work:
            with arithmetic(case.math):
                names = options.implementations
                judged = check(case, names, name, options.device) if options.check else {}
                for T in lengths(case):
                    if not left(share):
                        break
                    timed = [n for n in names if not is_wrong(judged.get(n, {}))]
                    columns = time_case(
                        case, T, timed, name, options.device, clock, options.row_seconds
                    )
                    for who in names:
                        own = judged.get(who, {}) | columns.get(who, {})
                        wrong |= is_wrong(own)
                        about = describe(group, case, T, name)
                        file.write(**about, implementation=who, sm_mhz=mhz(), **own)
                    measured += 1
            if not left(share):
                break
        for group, case, name in work if options.kernels and options.device == "cuda" else []:
            if not left():
                break
            T = min(case.steps)
            with arithmetic(case.math):
                problem = Problem.of(case, T, options.device)
                for who in options.implementations:
                    try:
                        found = kernels(prepare(who, network(case, options.device), problem, name))
                        status = "kernels"
                    except RuntimeError as failure:
                        found, status = "", reason(failure)
                    about = describe(group, case, T, name)
                    file.write(**about, implementation=who, kernels=found, status=status)
    except Stuck as failure:
        print(f"gpu.layers: the device is given up: {failure}")
        return 1
    every = sum(len(lengths(case)) for _, case, _ in work)
    print(f"{measured} of {every} measurements in {clock.seconds() - begin:.0f} s: {options.out}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
