"""Compiles constants.cu and runs it: latencies and limits of the device.

python -m gpu.constants --out FILE.csv
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import rows

SOURCE = Path(__file__).with_name("constants.cu")
COLUMNS = ("what", "parameters", "value", "unit", "missing")
# A warning is an error, and so is a register that went to memory: it would be what is measured.
FLAGS = (
    "-O3", "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a",
    "-Werror", "all-warnings", "-Xptxas", "-warn-spills",
    "-Xcompiler", "-Wall,-Wextra,-Werror",
)  # fmt: skip


def compile_to(program: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("gpu.constants: nvcc must be on the PATH, got none")
    subprocess.run([nvcc, *FLAGS, str(SOURCE), "-o", str(program)], check=True)


def keep(lines, file: rows.Rows) -> int:
    """Write the rows that a program prints as they come; how many there were."""
    count = 0
    for row in csv.DictReader(lines):
        if tuple(row) != COLUMNS:
            raise ValueError(f"constants: expected the columns {COLUMNS}, got {tuple(row)}")
        file.write(**row)
        count += 1
    return count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--seconds", type=float, default=60.0, help="(%(default)s)")
    parser.add_argument("--commit", default="", help="what to write into the rows")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print(f"  {SOURCE.name}: compiled in about 5 s, then at most {options.seconds:.0f} s")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "constants"
        compile_to(program)
        always = rows.device_facts(options.commit)
        file = rows.Rows(options.out, (*COLUMNS, *rows.DEVICE_COLUMNS), always)
        command = [str(program), str(options.seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            count = keep(process.stdout, file)
    print(f"{count} rows: {options.out}")
    return int(process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
