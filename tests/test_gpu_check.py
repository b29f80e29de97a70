"""The scripts that measure on a GPU, without one: arithmetic with a clock that the tests turn, rows
on the CPU, and constants.cu as far as a compiler goes."""

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402
from gpu import cases, constants, layers, networks, report, rows  # noqa: E402
from gpu.clock import LEAST, MOST, Spread, Wall, line_through, take_turns  # noqa: E402


class Turned:
    """A clock that only moves when a call moves it: by the microseconds that the call returns."""

    def __init__(self):
        self.now = 0.0

    def times(self, call, count):
        times = [float(call()) for _ in range(count)]
        self.now += 1e-6 * sum(times)
        return times

    def seconds(self):
        return self.now


# ---- clock


def test_turns_rotate_and_drop_the_first_call_of_each():
    order = []

    def call(name, microseconds):
        def measured():
            if not order or order[-1] != name:
                order.append(name)
                return 1e5  # waits for the host
            return microseconds

        return measured

    calls = {"a": call("a", 1000.0), "b": call("b", 2000.0)}
    times = take_turns(calls, Turned(), 1.0)
    assert set(times["a"]) == {1000.0}
    assert set(times["b"]) == {2000.0}
    # Warm-up and the count of calls, then a b, b a, a b, ...: neighbours merge.
    assert order[:4] == ["a", "b", "a", "b"]
    assert order[4:10] == ["a", "b", "a", "b", "a", "b"]
    assert len(times["a"]) >= LEAST


def test_turns_end_after_the_seconds_or_enough_calls():
    clock = Turned()
    times = take_turns({"slow": lambda: 1e6}, clock, 2.0)
    assert len(times["slow"]) == LEAST
    clock = Turned()
    times = take_turns({"quick": lambda: 10.0}, clock, 1e9)
    assert MOST <= len(times["quick"]) < MOST + 50
    assert take_turns({}, clock, 1.0) == {}


def test_spread():
    assert Spread.of([4.0]) == (4, 4, 4)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2, 5)


def test_slope():
    line = line_through([(64, 100 + 3 * 64), (256, 100 + 3 * 256), (1024, 100 + 3 * 1024)])
    assert line == pytest.approx((3, 100))
    points = [(10, 20.0), (20, 33.0), (1000, 1111.0)]
    steps, times = np.array(points).T
    assert line_through(points) == pytest.approx(tuple(np.polyfit(steps, times, 1, w=1 / times)))
    with pytest.raises(ValueError, match="two different T"):
        line_through([(5, 1.0), (5, 2.0)])


def test_the_clock_of_the_cpu_measures():
    times = Wall().times(lambda: time.sleep(2e-3), 3)
    assert len(times) == 3
    assert all(2000 <= t < 1e6 for t in times)


# ---- cases and networks


def test_operations_and_lengths():
    case = cases.Case(5, 3, layers=2, bidirectional=True, packed=True, I=7, steps=(4, 8))
    assert case.lengths(9) == [9, 6, 3]
    # Layer 0: 7 + 5 inputs, layer 1: 10 + 5, two directions, 2 operations each.
    assert case.operations(9, False) == 2 * 18 * 2 * 5 * (12 + 15)
    assert case.operations(9, True) == 3 * case.operations(9, False)
    assert case.name == "H5-B3-bfloat16-2layers-bidirectional-packed-I7"


def test_names_are_distinct_and_batches_fit_a_gpu():
    every = [case for _, case in cases.find(list(cases.GROUPS))]
    assert len({case.name for case in every}) == len(every) > 150
    assert max(case.gigabytes(T) for case in every for T in case.steps) < 10
    deepbench = [c for c in cases.GROUPS["deepbench"] if c.math == "float16"]
    assert len(deepbench) == 12
    assert {(c.nonlinearity, max(c.steps)) for c in deepbench} == {("relu", 50)}


def test_long_lengths_are_left_out_but_two_stay():
    case = cases.Case(2560, 256, "float64")
    assert case.steps_within(1e9) == (64, 256, 1024)
    assert case.steps_within(0.0) == (64, 256)


def test_tf32_is_on_in_its_case_alone_and_put_back():
    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = flags()
    for name in cases.MATHS:
        with networks.arithmetic(name):
            assert flags() == (name == "tf32",) * 2
    with pytest.raises(ZeroDivisionError), networks.arithmetic("tf32"):
        raise ZeroDivisionError
    assert flags() == before


@pytest.mark.parametrize("case", cases.GROUPS["smoke"], ids=lambda case: case.name)
@pytest.mark.parametrize("name", networks.PASSES)
def test_both_implementations_do_the_same(case, name):
    problem = networks.Problem.of(case, 4, "cpu")
    truth = networks.truth(case, problem, name, "cpu")
    plain = networks.prepare("torch.nn.RNN", networks.network(case, "cpu"), problem, name)()
    ours = networks.prepare("torch_bptt.RNN", networks.network(case, "cpu"), problem, name)()
    assert len(truth) == len(plain) == len(ours)
    limit = networks.allowed(case, networks.error(plain, truth))
    assert networks.error(ours, truth) <= limit < 1e-4
    assert networks.error([t * (1 + 10 * limit) for t in ours], truth) > limit
    assert networks.error([*ours[:-1], ours[-1] * torch.nan], truth) == float("inf")


def test_a_truth_comes_without_cudnn_and_leaves_it_on():
    seen = []
    call = networks.without_cudnn(lambda: seen.append(torch.backends.cudnn.enabled))
    call()
    assert seen == [False]
    assert torch.backends.cudnn.enabled


# ---- rows


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(path, *arguments, implementations=("torch.nn.RNN", "torch_bptt.RNN"), **options):
    given = ["--out", path, "--groups", "smoke", "--device", "cpu", "--row-seconds", 0]
    given += ["--implementations", *implementations, *arguments]
    return layers.main(list(map(str, given)), **options)


def test_rows(tmp_path):
    path = tmp_path / "rows.csv"
    assert measure(path, "--check", "--commit", "abc") == 0
    table = read(path)
    assert len(table) == 2 * 2 * 2 * 2  # cases, passes, lengths, implementations
    for row in table:
        assert row["status"] == "ok"
        assert 0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert int(row["calls"]) >= LEAST
        assert float(row["error"]) < 1e-4
        assert (row["commit"], row["device"], row["torch"]) == ("abc", "none", torch.__version__)
    assert {row["packed"] for row in table} == {"0", "1"}


def test_a_run_that_is_over_keeps_its_rows_and_the_next_goes_on(tmp_path):
    path = tmp_path / "rows.csv"
    assert measure(path, "--seconds", 0) == 0
    assert read(path) == []
    assert measure(path, "--maths", "float32", "--passes", "forward") == 0
    before = len(read(path))
    assert before == 4
    assert measure(path, "--maths", "float64", "--passes", "forward") == 0
    assert len(read(path)) == 2 * before
    path.write_text("other,columns\n")
    with pytest.raises(SystemExit, match="other columns"):
        measure(path)


def test_every_row_is_on_the_disk_before_the_next_is_measured(tmp_path, monkeypatch):
    path, seen = tmp_path / "rows.csv", []
    real = layers.time_case

    def watched(*arguments):
        seen.append(len(read(path)))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(layers, "time_case", watched)
    with pytest.raises(KeyboardInterrupt):
        measure(path)
    assert seen == [0, 2, 4]
    assert len(read(path)) == 4


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def doubled(module):
        module.register_forward_hook(lambda *args: tuple(2 * t for t in args[2]))
        return module

    monkeypatch.setitem(networks.IMPLEMENTATIONS, "wrong", networks.Implementation(doubled))
    path = tmp_path / "rows.csv"
    chosen = ("torch.nn.RNN", "wrong")
    arguments = ("--check", "--maths", "float32", "--passes", "forward")
    assert measure(path, *arguments, implementations=chosen) == 1
    table = read(path)
    assert [row["status"][:12] for row in table] == ["ok", "wrong: error", "ok", "wrong: error"]
    assert [bool(row["median_us"]) for row in table] == [True, False, True, False]
    assert "wrong, forward: wrong: error" in report.troubles(table)[0]


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    def refused(module):
        raise NotImplementedError("not today\nnor tomorrow")

    monkeypatch.setitem(networks.IMPLEMENTATIONS, "refused", networks.Implementation(refused))
    path = tmp_path / "rows.csv"
    arguments = ("--maths", "float32", "--passes", "forward")
    assert measure(path, *arguments, implementations=("refused", "torch.nn.RNN")) == 0
    assert [row["status"] for row in read(path)] == ["NotImplementedError: not today", "ok"] * 2


def test_a_gpu_is_asked_for_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--out", str(tmp_path / "rows.csv"), "--implementations", "torch.nn.RNN"]
    assert layers.main(given) == 1
    assert "torch sees no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()


# ---- report


def test_report(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    columns = (*rows.NETWORK_COLUMNS, *rows.DEVICE_COLUMNS)
    file = rows.Rows(path, columns, {"device": "A", "case": "c", "pass": "forward"})
    for T in (10, 20):
        file.write(implementation="torch.nn.RNN", T=T, median_us=5 + 4 * T, status="ok")
        file.write(implementation="torch_bptt.RNN", T=T, median_us=1000, status="ok")
        file.write(implementation="torch_bptt.RNN", T=T, median_us=7 + 2 * T, status="ok")
        file.write(implementation="other", T=T, status="OutOfMemoryError: no")
    file.write(implementation="torch.nn.RNN", T=30, kernels="gemm x 3", status="kernels")
    for T in (10, 20):
        forced = {"case": "d", "forced_path": "block", "status": "ok"}
        file.write(implementation="torch_bptt.RNN", T=T, median_us=T + 2, **forced)
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| c | forward | 4.000 + 5 | 2.000 + 7 |  | 2.00 |" in printed
    assert "torch_bptt.RNN by block, us/step" in printed
    assert "| d | forward |  |  | 1.000 + 2 |  |" in printed
    assert "- other, forward: OutOfMemoryError: no (2 rows, first c)" in printed


# ---- the command


def test_a_dry_run_lists_every_part_and_starts_nothing(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", "--out", tmp_path]
    parts = ("build", "tests", "paths", "cudnn", "sanitizer")
    command += ["--parts", ",".join(parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for part in parts:
        assert f"==> {part}, " in done.stdout
    assert "headline" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert sum(gpu_check.SECONDS[part] for part in gpu_check.DEFAULT) < 600


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "build,dance"], "expected some of build,.* got 'dance'"),
        (["--seconds", "build"], "expected PART=SECONDS, got 'build'"),
        (["--seconds", "dance=3"], "expected PART=SECONDS, got 'dance=3'"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert re.search(words, capsys.readouterr().err)


def test_a_command_that_runs_over_its_time_says_what_it_has_and_ends_with_its_children(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    log, alive = tmp_path / "log", tmp_path / "alive"
    child = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"time.sleep(3); open({str(alive)!r}, 'w')"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "try: time.sleep(9)\n"
        "except KeyboardInterrupt: print('so far', flush=True); time.sleep(9)\n"
    )
    begin = time.monotonic()
    assert gpu_check.run((sys.executable, "-c", parent), 0.7, log) == 124
    assert time.monotonic() - begin < 2.9
    assert log.read_text().endswith("so far\n")
    time.sleep(max(0, begin + 3.5 - time.monotonic()))
    assert not alive.exists()


def test_the_status_of_a_command_counts(tmp_path, capsys):
    assert gpu_check.run((sys.executable, "-c", "raise SystemExit(3)"), 30, tmp_path / "log") == 3
    assert gpu_check.run(("no-such-program",), 30, tmp_path / "log") == 127
    assert "no-such-program" in capsys.readouterr().out


def test_parts_that_fail_are_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    def steps(part, seconds, out):
        code = "raise SystemExit(2)" if part == "build" else "print('fine')"
        return [gpu_check.Step((sys.executable, "-c", code), seconds)]

    monkeypatch.setattr(gpu_check, "steps", steps)
    given = ["--parts", "build,tests", "--out", str(tmp_path)]
    assert gpu_check.main(given) == 1
    printed = capsys.readouterr().out
    assert "build      FAILED (2)" in printed
    assert "tests      passed" in printed
    assert "fine" in (tmp_path / "tests.log").read_text()
    assert gpu_check.main(["--parts", "tests", "--out", str(tmp_path)]) == 0


def test_tests_named_in_the_command_exist():
    here = Path(__file__).parent
    names = [name for run in gpu_check.TESTS for name in run]
    assert [name for name in names if not (here / name).exists()] == []


# ---- constants.cu


def test_rows_of_constants(tmp_path):
    path = tmp_path / "constants.csv"
    file = rows.Rows(path, (*constants.COLUMNS, *rows.DEVICE_COLUMNS), {"device": "A"})
    printed = ["what,parameters,value,unit,missing\n", "hop,blocks=2,512,ns,\n", "x,,,,why\n"]
    assert constants.keep(printed, file) == 2
    assert [(r["what"], r["value"], r["missing"], r["device"]) for r in read(path)] == [
        ("hop", "512", "", "A"),
        ("x", "", "why", "A"),
    ]
    with pytest.raises(ValueError, match="expected the columns"):
        constants.keep(["a,b\n", "1,2\n"], file)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_constants_compile_without_a_warning_or_a_spill(tmp_path):
    constants.compile_to(tmp_path / "constants")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [tmp_path / "constants"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1  # the first call into the driver fails, and says so in a row
    header, row = done.stdout.splitlines()
    assert header == ",".join(constants.COLUMNS)
    assert row.startswith("cudaGetDeviceProperties")
