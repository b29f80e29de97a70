"""csrc/cuda/cluster_path.cu on the host of tests/cuda_on_host: what it computes against loops over
the definition, and its exchange of states between blocks in random orders."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
HOST = ROOT / "tests/cuda_on_host"
CXX = os.environ.get("CXX", "c++")
FORWARD, ADJOINT, TANGENT = range(3)
RELU, IDENTITY, TANH = 1, 3, 0
SHARED_BYTES = 227 * 1024  # of a block of an H200

pytestmark = pytest.mark.skipif(
    shutil.which(CXX) is None or os.uname().sysname != "Linux",
    reason="needs Linux and a C++ compiler",
)

INTEGERS = [
    "pass_", "activation", "tensor", "reverse", "truncate", "gate_given",
    "T", "B", "H", "cluster", "rows", "begin", "end", "seed",
]  # fmt: skip
POINTERS = [
    "weight", "mask", "c", "noise", "bias", "g", "gate", "first", "restart", "g_n", "alpha", "keep",
    "state", "f", "h_n", "d", "d_exact", "d0", "restart_sum", "carried",
]  # fmt: skip


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("clip", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


def compiled(target, *arguments):
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([CXX, *flags, *arguments, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def fibers(tmp_path_factory):
    target = tmp_path_factory.mktemp("fibers") / "fibers.o"
    return compiled(target, "-c", HOST / "fibers.cpp")


def library(folder, fibers, cluster_path=None):
    """The loop for this machine; `cluster_path` takes the place of the file of that name."""
    include = ["-DTORCH_BPTT_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    if cluster_path is not None:
        (folder / "cuda").mkdir()
        (folder / "cuda/cluster_path.cu").write_text(cluster_path)
        # Its neighbours are where they were.
        include = [f"-I{folder}", *include, f"-I{ROOT / 'csrc/cuda'}"]
    shared = folder / "cluster_loop.so"
    loaded = ctypes.CDLL(compiled(shared, *include, "-shared", HOST / "cluster_loop.cpp", fibers))
    for name in ("run_float", "run_bfloat16", "run_float16"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.plan.restype = ctypes.c_bool
    return loaded


@pytest.fixture(scope="module")
def loops(tmp_path_factory, fibers):
    return library(tmp_path_factory.mktemp("cluster"), fibers)


# ---- numbers ------------------------------------------------------------------------------------


def narrow(values, dtype):
    """As the type is stored."""
    if dtype == "bfloat16":  # values that it has exactly
        bits = np.asarray(values, np.float32).view(np.uint32)
        assert not np.any(bits & 0xFFFF)
        return (bits >> 16).astype(np.uint16)
    return np.asarray(values, np.float16 if dtype == "float16" else np.float32)


def wide(stored, dtype):
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


EXACT = {"c", "alpha", "d_exact", "restart_sum", "carried"}  # in the type that is computed in


def run(
    loops, pass_, arrays, *, dtype="float32", wanted=("state",), state=None, B, T, H, **options
):
    """{name: what the loop wrote}. `arrays` are numbers; NaN is what nobody has written."""
    shapes = {"h_n": (B, H), "d0": (B, H), "restart_sum": (B, H), "carried": (B, H)}
    held = {}
    for name, values in arrays.items():
        if name == "keep":
            held[name] = np.ascontiguousarray(values, np.bool_)
        else:
            held[name] = np.ascontiguousarray(narrow(values, "float32" if name in EXACT else dtype))
    for name in wanted:
        start = 0 if name == "restart_sum" else np.nan
        values = np.full(shapes.get(name, (T, B, H)), start)
        held[name] = np.ascontiguousarray(narrow(values, "float32" if name in EXACT else dtype))
    if state is not None:
        held["state"] = state
    call = Call(pass_=pass_, B=B, T=T, H=H, clip=options.pop("clip", -1))
    settings = {"activation": IDENTITY, "tensor": 0, "cluster": 2, "rows": 8, "end": -1, **options}
    for name, value in settings.items():
        assert name in INTEGERS
        setattr(call, name, int(value))
    for name, array in held.items():
        setattr(call, name, array.ctypes.data)
    functions = {"float32": loops.run_float, "bfloat16": loops.run_bfloat16}
    error = functions.get(dtype, loops.run_float16)(ctypes.byref(call))
    if error is not None:
        raise RuntimeError(error.decode())
    return {name: wide(held[name], "float32" if name in EXACT else dtype) for name in wanted}


# ---- the definition -----------------------------------------------------------------------------

VALUE = {RELU: lambda z: np.maximum(z, 0), IDENTITY: lambda z: z, TANH: np.tanh}
SLOPE = {RELU: lambda y: (y > 0) * 1.0, IDENTITY: np.ones_like, TANH: lambda y: 1 - y * y}


def order_of(T, reverse):
    return range(T - 1, -1, -1) if reverse else range(T)


def linked(keep, t, T, reverse, truncate):
    own = T - 1 - t if reverse else t
    cut = truncate > 0 and own > 0 and own % truncate == 0
    return keep[t] & (not cut)


def defaults(a, B, T, H):
    ones = {"keep": np.ones((T, B), bool), "mask": np.ones((B, H)), "alpha": np.ones(H)}
    return {**ones, **a}


def forward(a, *, activation, B, T, H, reverse=False):
    a = defaults(a, B, T, H)
    h, f = np.empty((2, T, B, H))
    state = a.get("first", np.zeros((B, H)))
    for t in order_of(T, reverse):
        p = np.where(a["keep"][t][:, None], state, a.get("restart", 0))
        drive = a["c"][t] + a.get("bias", 0)
        if "noise" in a:
            drive = drive + a["noise"][t]
        f[t] = VALUE[activation](drive + (a["mask"] * p) @ a["weight"].T)
        state = h[t] = (1 - a["alpha"]) * p + a["alpha"] * f[t]
    return {"state": h, "f": f, "h_n": state}


def adjoint(a, *, activation, B, T, H, reverse=False, truncate=0, clip=-1, restarts=False):
    """The weight is W_hh^T."""
    a = defaults(a, B, T, H)
    d, du = np.zeros((2, T, B, H))
    restart_sum = np.zeros((B, H))
    back = None  # what goes back over the link to the step after
    for t in reversed(order_of(T, reverse)):
        after = t - 1 if reverse else t + 1
        d[t] = a["g"][t]
        if back is None:
            d[t] += a.get("g_n", 0)
        else:
            kept = a["keep"][after][:, None]
            if restarts:
                restart_sum += np.where(kept, 0, back)
            d[t] += np.where(linked(a["keep"], after, T, reverse, truncate)[:, None], back, 0)
        if clip >= 0:
            d[t] = np.clip(d[t], -clip, clip)
        du[t] = a["alpha"] * SLOPE[activation](a["gate"][t]) * d[t]
        back = (1 - a["alpha"]) * d[t] + a["mask"] * (du[t] @ a["weight"].T)
    first = a["keep"][order_of(T, reverse)[0]][:, None]
    if restarts:
        restart_sum += np.where(first, 0, back)
    d0 = np.where(first, back, 0)
    return {"state": du, "d": d, "d_exact": d, "d0": d0, "restart_sum": restart_sum}


def tangent(a, *, B, T, H, reverse=False, truncate=0):
    """gate is alpha f'(z_t)."""
    a = defaults(a, B, T, H)
    q = np.empty((T, B, H))
    state = a.get("first", np.zeros((B, H)))
    for t in order_of(T, reverse):
        link = linked(a["keep"], t, T, reverse, truncate)[:, None]
        p = np.where(a["keep"][t][:, None], np.where(link, state, 0), a.get("restart", 0))
        product = (a["mask"] * p) @ a["weight"].T
        state = q[t] = a["g"][t] + (1 - a["alpha"]) * p + a["gate"][t] * product
    return {"state": q}


# ---- exact: small integers ----------------------------------------------------------------------
#
# Sums of integers below 2^8 are exact in every type, whatever their order.


def integers(random, *shape, low=-2, high=3):
    return random.integers(low, high, shape).astype(float)


def sparse(random, H):
    """Two of each row are 1 or -1, so that states stay small."""
    weight = np.zeros((H, H))
    for row in weight:
        row[random.integers(0, H, 2)] = random.choice([-1, 1], 2)
    return weight


KINDS = {
    "bfloat16": ("bfloat16", 1),
    "float16": ("float16", 1),
    "tf32": ("float32", 1),
    "float32": ("float32", 0),
}
# H with and without a remainder in tiles of 16 units and in blocks; B with one in tiles of rows.
SIZES = [
    (5, 3, 40, 2, 8),
    (5, 20, 64, 4, 16),
    (3, 9, 131, 8, 8),
    (4, 2, 260, 16, 8),
    (1, 1, 1, 2, 8),
]


@pytest.mark.parametrize(("T", "B", "H", "cluster", "rows"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_integers_is_exact(loops, kind, T, B, H, cluster, rows):
    dtype, tensor = KINDS[kind]
    random = np.random.default_rng(0)
    arrays = {
        "weight": sparse(random, H), "c": integers(random, T, B, H),
        "first": integers(random, B, H), "bias": integers(random, H),
    }  # fmt: skip
    sizes = {"T": T, "B": B, "H": H}
    expected = forward(arrays, activation=RELU, **sizes)
    assert np.abs(expected["state"]).max() < 256
    for seed in (0, 1):
        result = run(
            loops, FORWARD, arrays, dtype=dtype, tensor=tensor, activation=RELU, **sizes,
            cluster=cluster, rows=rows, seed=seed, wanted=("state", "h_n"),
        )  # fmt: skip
        assert np.array_equal(result["state"], expected["state"])
        assert np.array_equal(result["h_n"], expected["h_n"])


@pytest.mark.parametrize(("T", "B", "H", "cluster", "rows"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_of_integers_is_exact(loops, kind, T, B, H, cluster, rows):
    dtype, tensor = KINDS[kind]
    random = np.random.default_rng(1)
    arrays = {
        "weight": sparse(random, H), "g": integers(random, T, B, H),
        "g_n": integers(random, B, H), "gate": integers(random, T, B, H),
    }  # fmt: skip
    sizes = {"T": T, "B": B, "H": H}
    expected = adjoint(arrays, activation=RELU, **sizes)
    assert np.abs(expected["d"]).max() < 256
    result = run(
        loops, ADJOINT, arrays, dtype=dtype, tensor=tensor, activation=RELU, **sizes,
        cluster=cluster, rows=rows, wanted=("state", "d", "d0"),
    )  # fmt: skip
    for name in ("state", "d", "d0"):
        assert np.array_equal(result[name], expected[name]), name


@pytest.mark.parametrize(("T", "B", "H", "cluster", "rows"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_tangent_of_integers_is_exact(loops, kind, T, B, H, cluster, rows):
    dtype, tensor = KINDS[kind]
    random = np.random.default_rng(2)
    arrays = {
        "weight": sparse(random, H), "g": integers(random, T, B, H),
        "gate": integers(random, T, B, H, low=0, high=2), "first": integers(random, B, H),
    }  # fmt: skip
    sizes = {"T": T, "B": B, "H": H}
    expected = tangent(arrays, **sizes)
    assert np.abs(expected["state"]).max() < 256
    result = run(
        loops, TANGENT, arrays, dtype=dtype, tensor=tensor, gate_given=1, **sizes,
        cluster=cluster, rows=rows,
    )  # fmt: skip
    assert np.array_equal(result["state"], expected["state"])


# ---- weights that do not fit in registers -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "H", "cluster"), [("bfloat16", 640, 8), ("float32", 320, 4), ("tf32", 320, 4)]
)
def test_weights_beyond_the_registers(loops, kind, H, cluster):
    dtype, tensor = KINDS[kind]
    _, chunks, _, fits = layout(loops, H, 2 if dtype == "bfloat16" else 4, cluster, 8)
    assert chunks > 32  # ClusterLayout::kRegisterChunks
    assert fits
    random = np.random.default_rng(3)
    sizes = {"T": 3, "B": 2, "H": H}
    arrays = {"weight": sparse(random, H), "c": integers(random, 3, 2, H)}
    expected = forward(arrays, activation=RELU, **sizes)
    result = run(
        loops, FORWARD, arrays, dtype=dtype, tensor=tensor, activation=RELU, **sizes,
        cluster=cluster, wanted=("state", "h_n"),
    )  # fmt: skip
    assert np.array_equal(result["state"], expected["state"])


def layout(loops, H, size, cluster, rows):
    """threads, chunks, bytes of shared memory, whether it fits"""
    figures = (ctypes.c_int64 * 4)()
    loops.layout(ctypes.c_int64(H), size, cluster, rows, ctypes.c_int64(SHARED_BYTES), figures)
    return tuple(figures)


# ---- the plan -----------------------------------------------------------------------------------


def plan(loops, dtype, B, H, *, tf32=False, largest_cluster=16):
    """cluster, rows, blocks, threads, bytes; None where this path cannot do it"""
    figures = (ctypes.c_int64 * 5)()
    index = ["float32", "float64", "bfloat16", "float16"].index(dtype)
    sizes = map(ctypes.c_int64, (B, H))
    found = loops.plan(largest_cluster, index, tf32, *sizes, figures)
    return tuple(figures) if found else None


@pytest.mark.parametrize("H", [17, 64, 100, 256, 257, 512, 768, 1000, 1024])
@pytest.mark.parametrize("B", [1, 8, 33, 128, 1000])
def test_a_plan_covers_units_and_rows_and_fits(loops, B, H):
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        for tf32 in (False, True):
            found = plan(loops, dtype, B, H, tf32=tf32)
            cluster, rows, blocks, threads, shared = found
            planned_threads, _, planned_shared, fits = layout(loops, H, size, cluster, rows)
            assert fits
            assert (threads, shared) == (planned_threads, planned_shared)
            assert blocks // cluster * rows >= B > (blocks // cluster - 1) * rows


def test_what_has_no_plan(loops):
    assert plan(loops, "float64", 8, 64) is None
    assert plan(loops, "bfloat16", 8, 64, largest_cluster=0) is None  # before sm_90
    assert plan(loops, "bfloat16", 8, 2048) is None  # 8 MB of weights
    assert plan(loops, "bfloat16", 8, 1024, largest_cluster=8)[0] == 8


# ---- every option -------------------------------------------------------------------------------
#
# With alpha of 1/4, 1/2 and 1 four steps need eight bits behind the point: exact in float32.

T, B, H = 4, 11, 50


def numbers(seed):
    random = np.random.default_rng(seed)
    return {
        "weight": sparse(random, H), "c": integers(random, T, B, H),
        "noise": integers(random, T, B, H), "bias": integers(random, H),
        "g": integers(random, T, B, H), "g_n": integers(random, B, H),
        "first": integers(random, B, H), "restart": integers(random, B, H),
        "mask": integers(random, B, H, low=0, high=3), "keep": random.random((T, B)) > 0.3,
        "alpha": random.choice([0.25, 0.5, 1], H),
        "gate": integers(random, T, B, H, low=-1, high=2),
    }  # fmt: skip


def chosen(arrays, *names):
    return {name: arrays[name] for name in names}


def assert_equal(result, expected):
    for name, values in result.items():
        assert np.array_equal(np.float32(expected[name]), expected[name])  # it is exact
        assert np.array_equal(values, expected[name]), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "extras",
    [
        (),
        ("noise", "bias"),
        ("first", "keep"),
        ("first", "keep", "restart"),
        ("first", "mask"),
        ("first", "alpha"),
        ("first", "alpha", "mask", "keep", "restart", "noise", "bias"),
    ],
    ids="+".join,
)
def test_forward_with_options(loops, extras, reverse):
    arrays = chosen(numbers(4), "weight", "c", *extras)
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "activation": RELU}
    wanted = ("state", "h_n", "f") if "alpha" in extras else ("state", "h_n")
    result = run(loops, FORWARD, arrays, **sizes, seed=5, wanted=wanted)
    assert_equal(result, forward(arrays, **sizes))


@pytest.mark.parametrize("truncate", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("clip", [-1, 1.5])
@pytest.mark.parametrize(
    "extras", [(), ("g_n",), ("keep",), ("mask",), ("alpha", "mask", "keep", "g_n")], ids="+".join
)
def test_adjoint_with_options(loops, extras, clip, reverse, truncate):
    arrays = chosen(numbers(6), "weight", "g", "gate", *extras)
    restarts = "keep" in extras
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "truncate": truncate, "clip": clip}
    wanted = ["state", "d", "d_exact", "d0"]
    wanted += ["restart_sum"] * restarts + ["carried"] * ("alpha" in extras)
    result = run(loops, ADJOINT, arrays, **sizes, activation=RELU, seed=7, wanted=wanted)
    result.pop("carried", None)
    assert_equal(result, adjoint(arrays, **sizes, activation=RELU, restarts=restarts))


@pytest.mark.parametrize("truncate", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "extras",
    [(), ("first",), ("keep", "restart"), ("first", "alpha", "mask", "keep")],
    ids="+".join,
)
def test_tangent_with_options(loops, extras, reverse, truncate):
    arrays = chosen(numbers(8), "weight", "g", "gate", *extras)
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "truncate": truncate}
    result = run(loops, TANGENT, arrays, **sizes, gate_given=1, seed=9)
    assert_equal(result, tangent(arrays, **sizes))


def test_a_loop_in_two_launches(loops):
    arrays = chosen(numbers(10), "weight", "c", "first", "alpha", "mask")
    sizes = {"T": T, "B": B, "H": H, "activation": RELU}
    expected = forward(arrays, **sizes)
    state = np.full((T, B, H), np.nan, np.float32)
    common = {**sizes, "wanted": ("f", "h_n"), "state": state}
    run(loops, FORWARD, arrays, **common, end=2)
    assert np.array_equal(state[:2], expected["state"][:2])
    assert np.isnan(state[2:]).all()
    run(loops, FORWARD, arrays, **common, begin=2)
    assert np.array_equal(state, expected["state"])


@pytest.mark.parametrize(("kind", "bits"), [("float32", 24), ("tf32", 11)])
def test_one_step_of_real_numbers(loops, kind, bits):
    """Each of H products, with factors rounded to so many bits, and each of the sums is off by at
    most 2^-bits times what is added up, tanh by two units in the last place."""
    random = np.random.default_rng(12)
    arrays = {
        "weight": np.float32(random.normal(size=(H, H)) / np.sqrt(H)),
        "first": np.float32(random.normal(size=(B, H))),
        "c": np.float32(random.normal(size=(1, B, H))),
    }
    arrays = {name: values.astype(float) for name, values in arrays.items()}
    sizes = {"T": 1, "B": B, "H": H, "activation": TANH}
    terms = np.abs(arrays["first"]) @ np.abs(arrays["weight"]).T
    tolerance = (
        2 * 2.0**-bits * terms + (H + 2) * 2.0**-24 * (terms + np.abs(arrays["c"])) + 2.0**-22
    )
    result = run(loops, FORWARD, arrays, **sizes, tensor=KINDS[kind][1], wanted=("state", "h_n"))
    error = np.abs(result["state"] - forward(arrays, **sizes)["state"])
    assert (error <= tolerance).all()
    if kind == "tf32":
        assert error.max() > 2.0**-20  # it did round


# ---- the exchange -------------------------------------------------------------------------------


def exchange(loops, seed, *, T=12, B=8, H=64, cluster=4):
    random = np.random.default_rng(11)
    arrays = {"weight": sparse(random, H), "c": integers(random, T, B, H, low=0, high=2)}
    sizes = {"T": T, "B": B, "H": H, "activation": RELU}
    result = run(
        loops, FORWARD, arrays, **sizes, cluster=cluster, seed=seed, wanted=("state", "h_n")
    )
    return np.array_equal(result["state"], forward(arrays, **sizes)["state"])


@pytest.mark.parametrize(("cluster", "seeds"), [(2, 6), (3, 6), (4, 6), (8, 4), (16, 2)])
def test_states_arrive_in_any_order(loops, cluster, seeds):
    for seed in range(seeds):
        assert exchange(loops, seed, cluster=cluster)


# Each breaks one step of the argument at the head of cluster_path.cu.
BROKEN = {
    "one place": ("kPlaces + (s & 1) *", "kPlaces + 0 * (s & 1) *"),
    "no barrier before the sums are read": ("sync_block();\n\n    Elements<S", "Elements<S"),
    "no wait": ("if (s > 0) wait_for_mail", "if (s < 0) wait_for_mail"),
    "no meeting before the first letter": ("  sync_cluster();\n", "  sync_block();\n"),
}


@pytest.mark.parametrize("flaw", BROKEN)
def test_a_broken_exchange_shows(tmp_path, fibers, flaw):
    source = (ROOT / "csrc/cuda/cluster_path.cu").read_text()
    old, new = BROKEN[flaw]
    assert source.count(old) == 1
    loops = library(tmp_path, fibers, source.replace(old, new))

    def right(seed):
        try:
            return exchange(loops, seed)
        except RuntimeError:  # a fault that the host found
            return False

    assert not all(right(seed) for seed in range(40))
