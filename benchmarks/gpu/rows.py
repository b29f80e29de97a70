"""CSV files to which rows are only added, each on the disk before the next is measured."""

import csv
import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

SIZES = ("T", "B", "I", "H", "layers", "directions", "packed", "nonlinearity", "math")
NETWORK_COLUMNS = (
    "group",
    "case",
    "implementation",
    "forced_path",  # TORCH_BPTT_CUDA_PATH; empty: the plan's choice
    "pass",
    *SIZES,
    "median_us",  # of single calls, as are the two quantiles
    "p20_us",
    "p80_us",
    "calls",
    "error",  # |output - float64's| / |float64's|, of the shortest T
    "status",  # ok, or why there is no time
    "kernels",  # those that took most time, in one call
    "sm_mhz",  # the clock just after the measurement
)
DEVICE_COLUMNS = (
    "device", "driver", "cuda", "cudnn", "torch", "torch_bptt", "python", "commit", "date",
)  # fmt: skip


class Rows:
    """A CSV file for rows: ``write(a=1, b=2)``; columns that are not given stay empty.

    A file that is there already is continued, if it has the same columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], always: dict[str, object]):
        path.parent.mkdir(parents=True, exist_ok=True)
        header = path.read_text().partition("\n")[0] if path.exists() else ""
        if header and header != ",".join(columns):
            raise SystemExit(f"{path} has other columns than this program writes: move it away")
        self._path, self._columns, self._always = path, columns, always
        if not header:
            path.write_text(",".join(columns) + "\n")

    def write(self, **values: object) -> None:
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(self._always | values)
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def smi(field: str) -> str:
    """One fact from nvidia-smi, or nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def device_facts(commit: str) -> dict[str, str]:
    """DEVICE_COLUMNS of this machine; without a GPU its name is "none"."""
    gpu = torch.cuda.is_available()
    facts = {
        "device": torch.cuda.get_device_name() if gpu else "none",
        "driver": smi("driver_version"),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    assert set(facts) | {"torch_bptt"} == set(DEVICE_COLUMNS)
    return facts


def clock_reader() -> Callable[[], str]:
    """A function that reads the clock of the multiprocessors, in MHz; it may return nothing.

    By NVML, which takes microseconds, or else by nvidia-smi, which takes tens of milliseconds.
    """
    if not torch.cuda.is_available():
        return lambda: ""
    try:
        torch.cuda.clock_rate()
    except Exception as error:  # NVML's are of a class that only its own package knows
        print(f"clocks are read by nvidia-smi: NVML is not to be had: {error}")
        return lambda: smi("clocks.sm")
    return lambda: str(torch.cuda.clock_rate())
