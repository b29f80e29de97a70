"""The host that runs CUDA kernels without a GPU (tests/cuda_on_host): it computes what a GPU would,
and it finds the mistakes it is there to find."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "tests/cuda_on_host" / name for name in ("self_test.cpp", "fibers.cpp")]
CXX = os.environ.get("CXX", "c++")
SEEDS = range(1, 9)  # of random orders; 0 is the fixed one

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None or os.uname().sysname != "Linux",
    reason="needs Linux and a C++ compiler",
)


def compiled(folder, *flags):
    program = folder / "self_test"
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-DTORCH_BPTT_CUDA_ON_HOST"]
    strict = ["-std=c++20", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([CXX, *strict, *include, *flags, *SOURCES, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("host"), "-O1")


def output(program, name, seed=0):
    """The text that a test of self_test.cpp prints."""
    # Fibers that a fault leaves behind never free what they hold.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("TORCH_BPTT_SCHEDULE_SEED", None)
    command = [program, name, str(seed)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def numbers(text):
    """{name: numbers of that line}"""
    lines = (line.split() for line in text.splitlines())
    return {name: [float(value) for value in values] for name, *values in lines}


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_a_barrier_orders_what_is_written_and_read(program, seed):
    expected = [(i + 1) % 64 for _ in range(2) for i in range(64)]
    assert numbers(output(program, "barrier", seed))["out"] == expected


def test_a_race_shows(program):
    expected = [(i + 1) % 64 for _ in range(2) for i in range(64)]
    results = {output(program, "race", seed) for seed in SEEDS}
    assert len(results) > 1
    assert all(numbers(result)["out"] != expected for result in results)


def test_a_seed_repeats_its_order(program):
    assert output(program, "race", 3) == output(program, "race", 3)


def test_the_environment_sets_the_seed(program):
    def run(seed):
        environment = {**os.environ, "TORCH_BPTT_SCHEDULE_SEED": seed}
        return subprocess.check_output([program, "race"], env=environment, text=True)

    assert run("3") == output(program, "race", 3) != run("0") == output(program, "race", 0)


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_parts_of_a_block_meet_by_themselves(program, seed):
    expected = [200 + i // 64 * 64 + (i + 1) % 64 for i in range(128)]
    assert numbers(output(program, "parts", seed))["out"] == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffles(program, seed):
    sums = [sum(range(1 + first, 33 + first)) for first in (0, 32) for _ in range(32)]
    # And a double from lane 5 of either warp.
    assert numbers(output(program, "warp", seed))["out"] == [*sums, 5, 37]


@pytest.mark.parametrize("seed", [0, 1])
def test_matrix_products_equal_three_loops(program, seed):
    differences = numbers(output(program, "products", seed))
    assert set(differences) == {"bfloat16", "float16", "tf32"}
    assert all(worst == [0] for worst in differences.values())


def test_rounding_of_every_narrow_number(program):
    wrong = numbers(output(program, "rounding"))
    assert wrong["bfloat16"] == wrong["float16"] == [0]
    # Ten bits of mantissa; the middle goes away from zero.
    assert np.float32(wrong["tf32"]).tolist() == [1 + 2**-10, 1, -1 - 2**-10]


def test_shared_memory_starts_as_nan(program):
    values = numbers(output(program, "uninitialised"))["out"]
    assert len(values) == 32
    assert all(map(math.isnan, values))


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_copies_arrive_at_the_wait(program, seed):
    result = numbers(output(program, "copies", seed))
    rows = [value for i in range(0, 128, 4) for value in (i + 1, i + 2, 0, 0)]
    assert result["waited"] == rows + list(range(1, 33))
    late = result["not_waited"][:128]
    assert any(map(math.isnan, late))
    assert all(math.isnan(got) or got == right for got, right in zip(late, rows, strict=True))


def exchanged(steps=25):
    """What the test `exchange` computes: (cluster, block, thread), as floats."""
    i = np.arange(64)
    number = 100 * np.arange(4)[:, None] + i
    for _ in range(steps):
        came = [number[sender, (i + sender) % 64] * (sender + 1) % 1009 for sender in range(4)]
        number = np.tile(sum(came), (4, 1))
    return np.tile(number, (2, 1)).ravel().tolist()


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_blocks_of_a_cluster_exchange_letters(program, seed):
    assert numbers(output(program, "exchange", seed))["out"] == exchanged()


def test_a_place_that_is_written_too_early_shows(program):
    results = [numbers(output(program, "exchange_one_place", seed))["out"] for seed in SEEDS]
    assert all(result != exchanged() for result in results)


def circulated(clusters, ranks, threads, steps):
    """What the tests `circulate` compute: (cluster, rank, thread), as floats."""
    i, cluster = np.arange(threads), np.arange(clusters)[:, None, None]
    number = 100 * np.arange(clusters * ranks).reshape(clusters, ranks, 1) + i
    for _ in range(steps):
        letters = [number[:, r, (i + r) % threads] * (r + 1) % 1009 for r in range(ranks)]
        number = sum(letters)[:, None] + np.arange(ranks)[:, None]
        read = [number[c][:, (i + c) % threads] * (c + 1) % 1009 for c in range(clusters)]
        number = sum(read) + 10 * cluster
    return number.ravel().tolist()


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_clusters_of_a_grid_pass_numbers_through_global_memory(program, seed):
    assert numbers(output(program, "circulate", seed))["out"] == circulated(3, 2, 64, 25)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_grid_of_thousands_of_threads(program, seed):
    assert numbers(output(program, "circulate_large", seed))["out"] == circulated(8, 4, 256, 3)


@pytest.mark.parametrize("flaw", ["forgets_to_wait", "publishes_early", "reuses_early"])
def test_a_number_that_is_read_at_the_wrong_time_shows(program, flaw):
    right = circulated(3, 2, 64, 25)
    results = [numbers(output(program, f"circulate_{flaw}", seed))["out"] for seed in SEEDS]
    assert all(result != right for result in results)


@pytest.mark.parametrize("seed", [0, *SEEDS])
def test_who_sees_a_number_sees_what_was_published_before(program, seed):
    assert numbers(output(program, "publish_in_turn", seed)) == {
        "missed": [0] * 128,
        "flags": [20] * 129,
    }


def test_what_is_written_after_publishing_shows(program):
    stale = [numbers(output(program, "write_too_late", seed))["stale"][0] for seed in SEEDS]
    assert all(0 < count < 1000 for count in stale)


def test_a_grid_runs_as_a_whole_or_not_at_all(program):
    first, *refused, alone, pairs, largest = output(program, "whole_grids").splitlines()
    assert numbers(first)["out"] == [1] * 93 + [0]
    assert refused == [
        "refused: the host runs no more than 24000 threads at a time",
        *["refused: too many blocks in cooperative launch"] * 2,
    ]
    # One block of 200 KiB on each of 132 multiprocessors, two of 100 KiB or of 1024 threads; 5% of
    # the places are in no cluster.
    assert numbers(alone)["clusters"] == [132]
    assert numbers(pairs)["clusters"] == [264 * 95 // 100 // 2]
    assert numbers(largest)["clusters"] == [264 * 95 // 100 // 16]


FAULTS = {
    "one_does_not_come": [
        "deadlock",
        "block (0, 0, 0) threads 0 to 39: sync_block at self_test.cpp:",
        "threads 40 to 40: ended",
    ],
    "wait_for_each_other": [
        "deadlock",
        "threads 0 to 31: sync_part",
        "threads 32 to 63: sync_part",
    ],
    "lanes_part": ["some lanes are at", "warp_sync", "warp_shuffle_xor"],
    "misaligned": ["self_test.cpp:", "a misaligned address (block (0, 0, 0) thread 0)"],
    "beyond": ["an address outside of shared memory"],
    "exchange_no_wait": ["a mailbox with more arrivals in a phase than it was made for"],
    "exchange_expects_too_much": ["deadlock", "block (3, 0, 0) threads 0 to 63: wait_for_mail"],
    "exchange_leaves_early": ["the block it goes to has ended"],
    "uninitialised_mailbox": ["a mailbox that was not initialised"],
    "missed_phase": ["deadlock", "threads 32 to 32: wait_for_mail"],
    "circulate_waits_for_nobody": [
        "deadlock",
        *[f"block ({i}, 0, 0) threads 0 to 2: wait_for_flag at self_test.cpp:" for i in range(6)],
    ],
    # Without Launch::whole_grid: the second cluster has not begun.
    "circulate_apart": ["deadlock", "block (0, 0, 0) threads 1 to 2: wait_for_flag"],
    "flag_in_shared_memory": ["self_test.cpp:", "a flag in shared memory (block (0, 0, 0)"],
    "misaligned_flag": ["self_test.cpp:", "a misaligned address (block (0, 0, 0) thread 0)"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_says_where(program, name):
    text = output(program, name)
    assert text.startswith("fault: ")
    for part in FAULTS[name]:
        assert part in text


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_random_orders_too(program, name):
    assert all(output(program, name, seed).startswith("fault: ") for seed in SEEDS)


def test_launches_run_every_block_once_and_refuse_what_a_gpu_refuses(program):
    first, *refused = output(program, "launches").splitlines()
    assert numbers(first)["out"] == [1] * 24
    assert [line.split(":")[0] for line in refused] == ["refused"] * 4


# Fibers on what the C library offers, as on processors other than x86-64; and with sanitizers,
# which have to be told of every switch.
@pytest.mark.parametrize(
    "flags",
    [
        ("-O1", "-DTORCH_BPTT_PORTABLE_FIBERS"),
        ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ],
    ids=["portable", "sanitized"],
)
def test_other_builds_say_the_same(program, tmp_path, flags):
    other = compiled(tmp_path, *flags)
    names = ["barrier", "race", "products", "copies", "exchange", "circulate", "publish_in_turn"]
    for name in [*names, "circulate_large", *FAULTS]:
        assert output(other, name, 1) == output(program, name, 1)
