"""What is measured, each case under the name that stands in the results: T100-B32-I16-H64-relu.

To add a case, add a line here.
"""

from fnmatch import fnmatch

from torch_bptt.bench import CASES, Case

GROUPS = {
    "main": CASES,
    # Sizes that fit no register tile, and shapes and options off the beaten track: where a fast
    # path ends, the time must not jump.
    "odd": (
        Case(100, 32, 16, 20),
        Case(100, 32, 32, 32),
        Case(100, 3, 64, 100),
        Case(100, 17, 40, 257),
        Case(50, 32, 128, 650),
        Case(20, 32, 256, 1760),
        Case(50, 512, 64, 128),
        Case(1, 1, 8, 8),
        Case(1, 64, 128, 256),
        Case(5000, 4, 16, 64),
        Case(100, 32, 64, 128, nonlinearity="relu"),
        Case(100, 32, 64, 128, num_layers=2),
        Case(100, 32, 64, 128, bidirectional=True),
        Case(100, 32, 64, 128, uneven=True),
        Case(100, 32, 64, 128, num_layers=2, bidirectional=True, uneven=True),
    ),
    # Along one size at a time.
    "sweep-H": tuple(Case(100, 32, H, H) for H in (16, 32, 64, 128, 256, 512, 1024)),
    "sweep-T": tuple(Case(T, 32, 64, 128) for T in (1, 3, 10, 30, 100, 300, 1000)),
    "sweep-B": tuple(Case(100, B, 64, 128) for B in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    # A sequence so long that whatever is kept for every step shows in the memory.
    "memory": (Case(2000, 64, 64, 256),),
}


# Solved once before anything is measured, so that libraries and threads are there already.
TINY = Case(4, 2, 8, 8)


def find(pattern: str) -> list[tuple[str, Case]]:
    """(group, case) for each case whose name, or whose group's name, matches a shell pattern."""
    found = [
        (group, case)
        for group, cases in GROUPS.items()
        for case in cases
        if fnmatch(group, pattern) or fnmatch(case.name, pattern)
    ]
    if not found:
        names = [case.name for cases in GROUPS.values() for case in cases]
        raise SystemExit(f"no case matches {pattern!r}; there are {', '.join([*GROUPS, *names])}")
    return found


def gflop(case: Case, backward: bool) -> float:
    """Billions of multiplications and additions in the matrix products of one call."""
    above = (case.num_layers - 1) * (case.directions + 1) * case.H  # inputs and states, as below
    products = case.I + case.H + above
    forward = 2e-9 * sum(case.lengths) * case.directions * case.H * products
    return 3 * forward if backward else forward
