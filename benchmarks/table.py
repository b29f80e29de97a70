"""The results as a CSV file, one row for each combination of KEY."""

import csv
import os
from pathlib import Path

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
