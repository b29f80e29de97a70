"""The results as a CSV file, one row for each combination of KEY."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

from torch_bptt.bench import OURS, quantile

KEY = ("group", "case", "provider", "device", "dtype", "threads", "pass")
COLUMNS = (
    *KEY,
    "T",
    "B",
    "I",
    "H",
    "median_ms",  # of the calls, as are the two quantiles
    "p20_ms",
    "p80_ms",
    "calls",
    "first_s",  # to get ready and call once: with what compiles, the time to compile
    "gflop",  # of one call, 1e9 multiplications and additions in matrix products
    "peak_gflops",  # of the machine with so many threads and this dtype, just before the case
    "extra_mib",  # pass memory: most that was held beyond inputs, outputs and gradients
    "output_mib",  # pass memory: the output itself
    "version",  # of the provider
    "torch_bptt",
    "torch",
    "python",
    "isa",  # the instruction set that torch_bptt chose
    "cpu",
    "cpus",
    "commit",  # of this repository; + when files were changed since
    "date",
)

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """All rows, in the order of the file; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_times(seconds: list[float]) -> dict[str, object]:
    """The columns that hold the times of calls."""
    quantiles = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8}
    columns = {name: f"{1e3 * quantile(seconds, q):.4g}" for name, q in quantiles.items()}
    return {**columns, "calls": len(seconds)}


def write(path: Path, row: dict[str, object]) -> None:
    """Put one row in its place, or at the end. The file is whole at every moment."""
    new = {column: str(row.get(column, "")) for column in COLUMNS}
    rows = {tuple(old[column] for column in KEY): old for old in read(path)}
    rows[tuple(new[column] for column in KEY)] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    os.replace(unfinished, path)


def distinct(rows: list[Row], column: str) -> list[str]:
    """The values of a column, in the order of their first appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def settings(rows: list[Row]) -> list[tuple[str, str, str]]:
    """The combinations of device, dtype and threads, in the same order."""
    return list(dict.fromkeys((row["device"], row["dtype"], row["threads"]) for row in rows))


def count(threads: str) -> str:
    return "1 thread" if threads == "1" else f"{threads} threads"


def select(rows: list[Row], **wanted: str) -> list[Row]:
    """Rows with these values; `pass_` is the column pass."""
    wanted = {column.rstrip("_"): value for column, value in wanted.items()}
    return [row for row in rows if all(row[c] == value for c, value in wanted.items())]


class Ratio(NamedTuple):
    """Of two medians, and the least and the most that the quantiles allow."""

    median: float
    low: float
    high: float


def ratio(rows: list[Row], provider: str, name: str) -> Ratio | None:
    """A provider's time over OURS in a pass on one case; None when either is missing."""
    found = [select(rows, provider=who, pass_=name) for who in (provider, OURS.name)]
    if not all(found):
        return None
    theirs, ours = (row for [row] in found)
    pairs = (("median_ms", "median_ms"), ("p20_ms", "p80_ms"), ("p80_ms", "p20_ms"))
    return Ratio(*(float(theirs[over]) / float(ours[under]) for over, under in pairs))
