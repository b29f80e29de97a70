"""The benchmark suite from end to end, on problems too small to say anything."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torch_bptt
from torch_bptt.bench import BASELINE, OURS

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# run.py with cases of these tests and three providers more: one that is wrong in its gradients, one
# that is not installed, and one during whose second case somebody interrupts.
DRIVER = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import cases, providers
from providers.peer import Peer
from torch_bptt.bench import OURS, Case, Provider

class Wrong(Provider):
    name, version = "wrong", "1"
    def prepare(self, problem, backward):
        step = OURS.prepare(problem, backward)
        return lambda: [step()[0], *(2 * tensor for tensor in step()[1:])]

class Absent(Peer):
    name, needs = "absent", ("torch-bptt-absent-peer",)
    def prepare(self, problem, backward):
        raise AssertionError

class Interrupted(Provider):
    name, version = "interrupted", "1"
    def prepare(self, problem, backward):
        if problem.case.T == 2:
            raise KeyboardInterrupt
        return OURS.prepare(problem, backward)

providers.PROVIDERS.update({{p.name: p for p in (Wrong(), Absent(), Interrupted())}})
cases.GROUPS.clear()
cases.GROUPS.update({{
    "main": (Case(3, 2, 4, 5), Case(3, 2, 4, 5, nonlinearity="relu", uneven=True)),
    "sweep-T": tuple(Case(T, 2, 4, 5) for T in (1, 2)),
}})
import run
run.main()
"""


def python(*arguments, **options):
    """In a process of its own, with the torch_bptt of these tests."""
    environment = os.environ | {"PYTHONPATH": str(Path(torch_bptt.__file__).parent.parent)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def run(path, *arguments, cases=("main", "sweep-T")):
    return python("-c", DRIVER, "--seconds", 0, "--csv", path, "--cases", *cases, *arguments)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A CSV of both modules, in two dtypes, one row for each case and pass."""
    path = tmp_path_factory.mktemp("results") / "machine.csv"
    for dtype in ("float32", "bfloat16"):
        done = run(path, "--dtype", dtype, "--providers", BASELINE.name, OURS.name)
        assert done.returncode == 0, done.stderr
    return path


def test_rows(results):
    rows = read(results)
    key = ("group", "case", "provider", "device", "dtype", "threads", "pass")
    assert len({tuple(row[column] for column in key) for row in rows}) == len(rows) == 4 * 2 * 2 * 2
    assert {row["provider"] for row in rows} == {BASELINE.name, OURS.name}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["calls"]) >= 5
        assert all(float(row[column]) > 0 for column in ("first_s", "gflop", "peak_gflops"))
        assert all(row[c] for c in ("version", "torch_bptt", "torch", "python", "isa", "date"))


def test_operations_counted(results):
    """2 N H (I + H), for the forward pass; three times that with the gradients."""
    counted = {(row["case"], row["pass"]): float(row["gflop"]) for row in read(results)}
    assert counted["T3-B2-I4-H5", "forward"] == pytest.approx(1e-9 * 2 * (3 * 2) * 5 * (4 + 5))
    assert counted["T3-B2-I4-H5", "forward+backward"] == pytest.approx(1e-9 * 3 * 2 * 6 * 5 * 9)
    # Packed, the second row has only one step.
    assert counted["T3-B2-I4-H5-relu-uneven", "forward"] == pytest.approx(1e-9 * 2 * 4 * 5 * 9)


def test_what_is_wrong_is_not_timed_and_what_is_absent_is_said(tmp_path):
    path = tmp_path / "machine.csv"
    done = run(path, "--providers", "wrong", "absent", OURS.name, cases=["main"])
    assert done.returncode == 1
    assert "absent is left out: not installed: pip install torch-bptt-absent-peer" in done.stdout
    assert "T3-B2-I4-H5, forward: wrong not timed: wrong: h_n is off by" in done.stdout
    assert {row["provider"] for row in read(path)} == {OURS.name}


def test_nothing_to_measure_is_an_error(tmp_path):
    done = run(tmp_path / "machine.csv", "--providers", "absent")
    assert done.returncode == 1
    assert "none of the providers can run here" in done.stderr


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    path = tmp_path / "machine.csv"
    done = run(path, "--providers", OURS.name, "interrupted", cases=["sweep-T"])
    assert done.returncode != 0
    assert {row["case"] for row in read(path)} == {"T1-B2-I4-H5"}
    assert len(read(path)) == 4


def test_report(results, tmp_path):
    printed = python(BENCHMARKS / "report.py", results, "--plots", tmp_path, check=True).stdout
    assert "| case | torch_bptt.RNN | torch.nn.RNN |" in printed
    times = {
        tuple(row[c] for c in ("group", "case", "dtype", "provider", "pass")): row["median_ms"]
        for row in read(results)
    }
    ratio = [
        float(times["main", "T3-B2-I4-H5", "float32", provider, "forward"])
        for provider in (BASELINE.name, OURS.name)
    ]
    [line] = [line for line in printed.splitlines() if line.startswith("| T3-B2-I4-H5 |")][:1]
    assert f", {ratio[0] / ratio[1]:.2f}x / " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{kind}-{dtype}-threads1.png"
        for kind in ("ratio-main", "peak-main", "time-cpu")
        for dtype in ("float32", "bfloat16")
    )


def test_memory_of_a_step():
    printed = python(BENCHMARKS / "memory.py", "T1-B1-I8-H8", OURS.name, check=True).stdout
    extra, output = map(int, printed.split())
    assert output == 8 * 4
    assert extra < 2**20


@pytest.mark.parametrize("group", ["ensemble", "samples", "second"])  # compile takes a minute
def test_transforms(group, tmp_path):
    path = tmp_path / "machine.csv"
    command = ("transforms.py", "--groups", group, "--seconds", 0, "--csv", path)
    python(BENCHMARKS / command[0], *command[1:], check=True)
    rows = read(path)
    assert {row["group"] for row in rows} == {group}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])


def test_checkpointing(tmp_path):
    path = tmp_path / "machine.csv"
    sizes = ("--sizes", 400, 2, 3, 4)
    way = "torch_bptt.RNN, checkpoint, no output"
    command = (BENCHMARKS / "checkpoint.py", *sizes, "--ways", way, "--calls", 2, "--csv", path)
    assert f"{way}  " in python(*command, check=True).stdout
    [row] = read(path)
    assert (row["case"], row["provider"]) == ("T400-B2-I3-H4", way)
    assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    assert float(row["extra_mib"]) < 4
