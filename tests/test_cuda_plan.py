"""Which path the CUDA backend takes where: the plan is arithmetic, so no device is needed."""

import itertools
import re
from pathlib import Path

import pytest

from torch_bptt._C import cuda_plan

# (compute capability x 10, multiprocessors, bytes of shared memory of a block, largest cluster),
# as NVIDIA's tables of compute capabilities and product pages have them.
H200 = (90, 132, 227 * 1024, 16)
A100 = (80, 108, 163 * 1024, 0)
T4 = (75, 40, 64 * 1024, 0)
DEVICES = {"H200": H200, "A100": A100, "T4": T4}
SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
HIDDEN = (1, 16, 33, 64, 65, 128, 129, 256, 257, 512, 1000, 1024, 2048, 2560, 10_000)
BATCH = (1, 8, 16, 60, 133, 1000, 100_000)
REGISTER_BYTES = 256 * 1024  # of a multiprocessor


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("operation", ["forward", "adjoint", "tangent"])
@pytest.mark.parametrize("dtype", SIZE)
def test_a_plan_fits_the_device_and_covers_the_batch(device, dtype, operation):
    capability, multiprocessors, shared_bytes, largest_cluster = device
    for H, B, T, tf32 in itertools.product(HIDDEN, BATCH, (1, 100), (False, True)):
        plan = cuda_plan(device, operation, dtype, T, B, H, tf32)
        case = f"{H=} {B=} {T=} {tf32=}: {plan}"
        assert plan["shared_bytes"] <= shared_bytes, case
        assert plan["threads"] in range(32, 1025, 32), case
        assert plan["estimated_step_ns"] > 0, case
        tiles_of_batch = -(-B // plan["rows"])
        if plan["path"] == "block":
            assert plan["blocks"] == tiles_of_batch, case
            # The weight is in registers, in the type that it is multiplied in.
            computed = max(SIZE[dtype], 2 if plan["tensor_cores"] else 4)
            assert H * H * computed < REGISTER_BYTES, case
            assert T > 1, case
        elif plan["path"] == "cluster":
            assert 2 <= plan["cluster"] <= largest_cluster, case
            assert plan["blocks"] == tiles_of_batch * plan["cluster"], case
            weight = H * H * SIZE[dtype]
            assert weight < plan["cluster"] * (REGISTER_BYTES + shared_bytes), case
        elif plan["path"] == "grid":
            # All blocks run at a time, each with a multiprocessor to itself.
            assert 2 <= plan["cluster"] <= largest_cluster, case
            assert plan["blocks"] % plan["cluster"] == 0, case
            assert plan["blocks"] <= multiprocessors, case
            weight = H * H * SIZE[dtype]
            assert weight < plan["blocks"] * (REGISTER_BYTES + shared_bytes), case
        else:
            assert plan["blocks"] % tiles_of_batch == 0, case
        if plan["tensor_cores"]:
            least = {"float16": 75, "bfloat16": 80, "float32": 80}
            assert capability >= least[dtype], case
            assert tf32 or dtype != "float32", case


def test_float64_is_multiplied_exactly(device):
    for H, B in itertools.product(HIDDEN, BATCH):
        plan = cuda_plan(device, "forward", "float64", 100, B, H, tf32=True)
        assert not plan["tensor_cores"]
        assert plan["path"] not in ("cluster", "grid")


@pytest.mark.parametrize(
    ("device", "dtype", "B", "H", "path"),
    [
        (H200, "float32", 32, 64, "block"),
        (H200, "bfloat16", 64, 128, "block"),
        (H200, "bfloat16", 16, 512, "cluster"),
        (H200, "bfloat16", 16, 768, "cluster"),
        (H200, "bfloat16", 16, 2048, "grid"),
        (H200, "bfloat16", 16, 4096, "step"),
        (H200, "float64", 16, 512, "step"),
        (H200, "bfloat16", 4096, 2048, "gemm"),
        (H200, "bfloat16", 512, 2048, "gemm"),
        (H200, "float32", 4096, 1024, "gemm"),
        (H200, "float64", 256, 1024, "gemm"),
        (A100, "float64", 4096, 2048, "gemm"),
        (A100, "bfloat16", 16, 512, "step"),
        (A100, "float32", 16, 128, "block"),
        (T4, "float16", 8, 256, "block"),
        (T4, "bfloat16", 8, 64, "step"),  # no tensor cores for it
        (T4, "bfloat16", 4096, 2048, "step"),
    ],
)
def test_the_path_of_well_known_sizes(device, dtype, B, H, path):
    assert cuda_plan(device, "forward", dtype, 100, B, H)["path"] == path


def test_the_estimates_in_the_documentation():
    page = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (`.*) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for H, B, cells in rows:
        plans = [
            cuda_plan(H200, "forward", dtype, 1000, int(B), int(H), tf32)
            for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False))
        ]
        expected = [f"`{plan['path']}` {plan['estimated_step_ns'] / 1000:.2f}" for plan in plans]
        assert cells.split(" | ") == expected, f"H={H}, B={B}"


def test_the_largest_weights_in_the_documentation():
    def largest(wish, dtype, tf32):
        path = {
            H: cuda_plan(H200, "forward", dtype, 1000, 16, H, tf32, path=wish)["path"]
            for H in range(16, 4240, 16)
        }
        return max(H for H in path if path[H] == wish)

    for path, narrow, wide in (("cluster", 1408, 1024), ("grid", 4096, 2976)):
        assert largest(path, "bfloat16", False) == largest(path, "float16", False) == narrow
        assert largest(path, "float32", True) == largest(path, "float32", False) == wide


def test_a_path_can_be_forced_where_it_can_do_it():
    for path in ("step", "block", "cluster", "grid", "gemm"):
        assert cuda_plan(H200, "forward", "bfloat16", 100, 16, 128, path=path)["path"] == path
    for path in ("cluster", "grid"):
        assert cuda_plan(H200, "forward", "float64", 100, 16, 512, path=path)["path"] == "step"


def test_a_librarys_product_is_taken_only_where_it_rounds_as_a_loops_does(device):
    for dtype, tf32, path in itertools.product(SIZE, (False, True), (None, "gemm")):
        plan = cuda_plan(device, "adjoint", dtype, 100, 4096, 2048, tf32, path, library=False)
        assert plan["path"] != "gemm"


def test_the_more_rows_a_product_has_the_more_a_library_gains():
    """From some batch on it is gemm, whatever H is: never back to step."""
    for dtype, H in itertools.product(SIZE, (1024, 1408, 2048, 2560, 4096)):
        taken = [
            cuda_plan(H200, "forward", dtype, 100, 2**k, H)["path"] == "gemm" for k in range(18)
        ]
        assert taken == sorted(taken), f"{dtype} {H=}"
        assert not taken[0] or H > 2048
        assert taken[13:] == [True] * 5


def test_a_small_batch_still_occupies_the_device():
    """H = 2048, B = 16: tiles of 16 units, so that nearly every multiprocessor has one."""
    plan = cuda_plan(H200, "forward", "bfloat16", 100, 16, 2048, path="step")
    assert plan["blocks"] == 128
    # And a large one takes larger tiles: fewer reads for each multiply-add.
    large = cuda_plan(H200, "forward", "bfloat16", 100, 256, 2048, path="step")
    assert large["rows"] > plan["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "sideways"}, "cuda_plan: operation is unknown, got sideways"),
        ({"dtype": "int8"}, "cuda_plan: dtype is unknown, got int8"),
        ({"path": "tunnel"}, "cuda_plan: path is unknown, got tunnel"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    arguments = {"operation": "forward", "dtype": "float32", "T": 2, "B": 2, "H": 2}
    with pytest.raises(ValueError, match=message):
        cuda_plan(H200, **(arguments | changes))
