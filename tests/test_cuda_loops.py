"""The kernels of the paths cluster and grid on the host of tests/cuda_on_host: what they compute
against loops over the definition, and their exchange of states between blocks in random orders."""

import ctypes

import numpy as np
import pytest
from cuda_loop import (
    ADJOINT,
    FORWARD,
    KINDS,
    RELU,
    TANGENT,
    TANH,
    Call,
    adjoint,
    broken,
    forward,
    integers,
    library,
    needs_compiler,
    objects,
    run,
    sparse,
    tangent,
)

SHARED_BYTES = 227 * 1024  # of a block of an H200

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return objects(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def loops(tmp_path_factory, parts):
    return library(tmp_path_factory.mktemp("loops"), parts)


def clusters_of(cluster, rows):
    """Tiles of path cluster."""
    return {"cluster": cluster, "rows": rows}


def grid_of(cluster, clusters, rows, tiles):
    return {"grid": 1, "cluster": cluster, "clusters": clusters, "rows": rows, "tiles": tiles}


# ---- small integers are exact -------------------------------------------------------------------

# H with and without a remainder in tiles of 16 units and in blocks; B with one in tiles of rows and
# in the rows of a launch.
SIZES = [
    (5, 3, 40, clusters_of(2, 8)),
    (5, 20, 64, clusters_of(4, 16)),
    (5, 7, 64, clusters_of(4, 3)),
    (3, 9, 131, clusters_of(8, 8)),
    (4, 2, 260, clusters_of(16, 8)),
    (1, 1, 1, clusters_of(2, 8)),
    (5, 3, 40, grid_of(2, 2, 3, 1)),
    (5, 20, 64, grid_of(4, 4, 20, 1)),
    (4, 20, 131, grid_of(2, 3, 7, 3)),
    (3, 33, 70, grid_of(8, 2, 16, 2)),
    (3, 70, 70, grid_of(2, 1, 70, 1)),
    (1, 1, 1, grid_of(2, 1, 1, 1)),
]


def test_these_sizes_cut_a_grid_in_every_way(loops):
    layouts = [
        grid_layout(loops, 2, T=T, B=B, H=H, **tiles) for T, B, H, tiles in SIZES if "grid" in tiles
    ]
    for cut in ("passes", "stages", "parts", "across"):
        assert {layout[cut] > 1 for layout in layouts} == {False, True}, cut


def name_of(tiles):
    if not isinstance(tiles, dict):
        return None
    return "-".join(["grid" if "grid" in tiles else "cluster", *map(str, list(tiles.values()))])


def possible_tiles(tensor, tiles):
    """Without tensor cores a warp of a grid has one tile."""
    return tiles if tensor or "tiles" not in tiles else {**tiles, "tiles": 1}


@pytest.mark.parametrize(("T", "B", "H", "tiles"), SIZES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_integers_is_exact(loops, kind, T, B, H, tiles):
    dtype, tensor = KINDS[kind]
    tiles = possible_tiles(tensor, tiles)
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
            **tiles, seed=seed, wanted=("state", "h_n"),
        )  # fmt: skip
        assert np.array_equal(result["state"], expected["state"])
        assert np.array_equal(result["h_n"], expected["h_n"])


@pytest.mark.parametrize(("T", "B", "H", "tiles"), SIZES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_of_integers_is_exact(loops, kind, T, B, H, tiles):
    dtype, tensor = KINDS[kind]
    tiles = possible_tiles(tensor, tiles)
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
        **tiles, wanted=("state", "d", "d0"),
    )  # fmt: skip
    for name in ("state", "d", "d0"):
        assert np.array_equal(result[name], expected[name]), name


@pytest.mark.parametrize(("T", "B", "H", "tiles"), SIZES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_tangent_of_integers_is_exact(loops, kind, T, B, H, tiles):
    dtype, tensor = KINDS[kind]
    tiles = possible_tiles(tensor, tiles)
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
        **tiles,
    )  # fmt: skip
    assert np.array_equal(result["state"], expected["state"])


@pytest.mark.parametrize("H", [40, 41])
@pytest.mark.parametrize("tiles", [clusters_of(2, 8), grid_of(2, 2, 5, 1)], ids=name_of)
def test_weights_that_lie_between_words(loops, tiles, H):
    """As those of a view do that begins at an odd element."""
    random = np.random.default_rng(4)
    sizes = {"T": 3, "B": 5, "H": H}
    arrays = {"weight": sparse(random, H), "c": integers(random, 3, 5, H)}
    expected = forward(arrays, activation=RELU, **sizes)
    result = run(
        loops, FORWARD, arrays, dtype="bfloat16", tensor=1, activation=RELU, **sizes, **tiles,
        misaligned=True, wanted=("state", "h_n"),
    )  # fmt: skip
    assert np.array_equal(result["state"], expected["state"])


# ---- weights that do not fit in registers -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "H", "tiles"),
    [
        ("bfloat16", 640, clusters_of(8, 8)),
        ("float32", 320, clusters_of(4, 8)),
        ("tf32", 320, clusters_of(4, 8)),
        ("bfloat16", 1280, grid_of(4, 9, 11, 2)),
        ("float32", 640, grid_of(2, 5, 11, 1)),
        ("tf32", 640, grid_of(4, 4, 11, 2)),
    ],
    ids=name_of,
)
def test_weights_beyond_the_registers(loops, kind, H, tiles):
    dtype, tensor = KINDS[kind]
    sizes = {"T": 3, "B": 11, "H": H}
    size = 2 if dtype == "bfloat16" else 4
    if "grid" in tiles:
        assert grid_layout(loops, size, **sizes, **tiles)["shared_chunks"] > 0
    else:
        _, chunks, _, fits = cluster_layout(loops, H, size, tiles["cluster"], tiles["rows"])
        assert chunks > 32  # Tiles::kRegisterChunks
        assert fits
    random = np.random.default_rng(3)
    arrays = {"weight": sparse(random, H), "c": integers(random, 3, 11, H)}
    expected = forward(arrays, activation=RELU, **sizes)
    result = run(
        loops, FORWARD, arrays, dtype=dtype, tensor=tensor, activation=RELU, **sizes, **tiles,
        wanted=("state", "h_n"),
    )  # fmt: skip
    assert np.array_equal(result["state"], expected["state"])


def grid_layout(loops, size, **options):
    figures = (ctypes.c_int64 * 5)()
    loops.grid_layout(ctypes.byref(Call(**options)), size, figures)
    names = ("passes", "stages", "parts", "across", "shared_chunks")
    return dict(zip(names, figures, strict=True))


def cluster_layout(loops, H, size, cluster, rows):
    """threads, chunks, bytes of shared memory, whether it fits"""
    figures = (ctypes.c_int64 * 4)()
    loops.cluster_layout(
        ctypes.c_int64(H), size, cluster, rows, ctypes.c_int64(SHARED_BYTES), figures
    )
    return tuple(figures)


# ---- the plan -----------------------------------------------------------------------------------


def plan(loops, dtype, B, H, *, tf32=False, largest_cluster=16):
    """cluster, rows, blocks, threads, bytes; None where this path cannot do it"""
    figures = (ctypes.c_int64 * 5)()
    index = ["float32", "float64", "bfloat16", "float16"].index(dtype)
    sizes = map(ctypes.c_int64, (B, H))
    found = loops.cluster_plan(largest_cluster, index, tf32, *sizes, figures)
    return tuple(figures) if found else None


@pytest.mark.parametrize("H", [17, 64, 100, 256, 257, 512, 768, 1000, 1024])
@pytest.mark.parametrize("B", [1, 8, 33, 128, 1000])
def test_a_plan_covers_units_and_rows_and_fits(loops, B, H):
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        for tf32 in (False, True):
            found = plan(loops, dtype, B, H, tf32=tf32)
            cluster, rows, blocks, threads, shared = found
            planned_threads, _, planned_shared, fits = cluster_layout(loops, H, size, cluster, rows)
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
PATHS = {"cluster": clusters_of(2, 8), "grid": grid_of(2, 3, 8, 1)}  # grid: 8 rows, then 3


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def tiles(request):
    return request.param


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
def test_forward_with_options(loops, tiles, extras, reverse):
    arrays = chosen(numbers(4), "weight", "c", *extras)
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "activation": RELU}
    wanted = ("state", "h_n", "f") if "alpha" in extras else ("state", "h_n")
    result = run(loops, FORWARD, arrays, **sizes, **tiles, seed=5, wanted=wanted)
    assert_equal(result, forward(arrays, **sizes))


@pytest.mark.parametrize("truncate", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("clip", [-1, 1.5])
@pytest.mark.parametrize(
    "extras", [(), ("g_n",), ("keep",), ("mask",), ("alpha", "mask", "keep", "g_n")], ids="+".join
)
def test_adjoint_with_options(loops, tiles, extras, clip, reverse, truncate):
    arrays = chosen(numbers(6), "weight", "g", "gate", *extras)
    restarts = "keep" in extras
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "truncate": truncate, "clip": clip}
    wanted = ["state", "d", "d_exact", "d0"]
    wanted += ["restart_sum"] * restarts + ["carried"] * ("alpha" in extras)
    result = run(loops, ADJOINT, arrays, **sizes, **tiles, activation=RELU, seed=7, wanted=wanted)
    result.pop("carried", None)
    assert_equal(result, adjoint(arrays, **sizes, activation=RELU, restarts=restarts))


@pytest.mark.parametrize("truncate", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "extras",
    [(), ("first",), ("keep", "restart"), ("first", "alpha", "mask", "keep")],
    ids="+".join,
)
def test_tangent_with_options(loops, tiles, extras, reverse, truncate):
    arrays = chosen(numbers(8), "weight", "g", "gate", *extras)
    sizes = {"T": T, "B": B, "H": H, "reverse": reverse, "truncate": truncate}
    result = run(loops, TANGENT, arrays, **sizes, **tiles, gate_given=1, seed=9)
    assert_equal(result, tangent(arrays, **sizes))


def test_a_loop_in_two_launches(loops, tiles):
    arrays = chosen(numbers(10), "weight", "c", "first", "alpha", "mask")
    sizes = {"T": T, "B": B, "H": H, "activation": RELU}
    expected = forward(arrays, **sizes)
    state = np.full((T, B, H), np.nan, np.float32)
    common = {**sizes, **tiles, "wanted": ("f", "h_n"), "kept": {"state": state}}
    run(loops, FORWARD, arrays, **common, end=2)
    assert np.array_equal(state[:2], expected["state"][:2])
    assert np.isnan(state[2:]).all()
    run(loops, FORWARD, arrays, **common, begin=2)
    assert np.array_equal(state, expected["state"])


@pytest.mark.parametrize("reverse", [False, True])
def test_an_adjoint_in_three_launches(loops, tiles, reverse):
    """With a leak, d of the step before goes over from one to the next."""
    arrays = chosen(numbers(13), "weight", "g", "g_n", "gate", "alpha", "mask", "keep")
    sizes = {"T": T, "B": B, "H": H, "activation": RELU, "reverse": reverse}
    expected = adjoint(arrays, **sizes)
    kept = {
        "state": np.full((T, B, H), np.nan, np.float32),
        "carried": np.full((B, H), np.nan, np.float32),
    }
    common = {**sizes, **tiles, "kept": kept, "wanted": ("d0",)}
    run(loops, ADJOINT, arrays, **common, end=1)
    run(loops, ADJOINT, arrays, **common, begin=1, end=T)
    last = run(loops, ADJOINT, arrays, **common, begin=T)
    assert_equal({"state": kept["state"], "d0": last["d0"]}, expected)


@pytest.mark.parametrize(("kind", "bits"), [("float32", 24), ("tf32", 11)])
def test_one_step_of_real_numbers(loops, tiles, kind, bits):
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
    wanted = ("state", "h_n")
    result = run(loops, FORWARD, arrays, **sizes, **tiles, tensor=KINDS[kind][1], wanted=wanted)
    error = np.abs(result["state"] - forward(arrays, **sizes)["state"])
    assert (error <= tolerance).all()
    if kind == "tf32":
        assert error.max() > 2.0**-20  # it did round


# ---- the exchange -------------------------------------------------------------------------------


def exchange(loops, seed, tiles, *, T=12, B=8, H=64):
    random = np.random.default_rng(11)
    arrays = {"weight": sparse(random, H), "c": integers(random, T, B, H, low=0, high=2)}
    sizes = {"T": T, "B": B, "H": H, "activation": RELU}
    result = run(loops, FORWARD, arrays, **sizes, **tiles, seed=seed, wanted=("state", "h_n"))
    return np.array_equal(result["state"], forward(arrays, **sizes)["state"])


@pytest.mark.parametrize(
    ("tiles", "B", "seeds"),
    [
        *((clusters_of(cluster, 8), 8, seeds) for cluster, seeds in
          ((2, 6), (3, 6), (4, 6), (8, 4), (16, 2))),
        (grid_of(2, 4, 8, 1), 8, 4),
        (grid_of(4, 4, 20, 1), 20, 3),
        (grid_of(2, 2, 40, 1), 40, 4),
    ],
    ids=name_of,
)  # fmt: skip
def test_states_arrive_in_any_order(loops, tiles, B, seeds):
    for seed in range(seeds):
        assert exchange(loops, seed, tiles, B=B, H=128 if "grid" in tiles else 64)


# Each breaks one step of the argument at the head of the file.
BARRIER = "sync_block();\n"
BROKEN = {
    "cluster": {
        "one place": ("kPlaces + (s & 1) *", "kPlaces + 0 * (s & 1) *"),
        "no barrier before the sums are read": (f"{BARRIER}\n    Finished<S", "Finished<S"),
        "no wait": ("if (s > 0) wait_for_mail", "if (s < 0) wait_for_mail"),
        "no meeting before the first letter": ("  sync_cluster();\n", f"  {BARRIER}"),
    },
    "grid": {
        "one place for states": ("states + (s & 1) *", "states + 0 * (s & 1) *"),
        "one place for letters": ("letters + (s & 1) *", "letters + 0 * (s & 1) *"),
        "no wait for the states": ("first_block + block, uint32_t(s) + 1)", "first_block, 0)"),
        "no wait for the letters": ("wait_for_mail(box(", "if (s < 0) wait_for_mail(box("),
        "waits for too few copies": ("(--pending)", "(pending--)"),
        "no barrier before rows are read": ("sync_part(1 + part, layout.across * kWarp);\n", ""),
        "no barrier before the sums are read": (
            f"{BARRIER}\n    for (int row = send",
            "for (int row = send",
        ),
        "no barrier before the flag": (
            f"{BARRIER}    if (thread == layout",
            "if (thread == layout",
        ),
        "no meeting before the first letter": ("  sync_cluster();\n", f"  {BARRIER}"),
    },
}


@pytest.mark.parametrize(
    ("path", "flaw"), [(path, flaw) for path in BROKEN for flaw in BROKEN[path]]
)
def test_a_broken_exchange_shows(tmp_path, parts, path, flaw):
    loops = broken(tmp_path, parts, path, *BROKEN[path][flaw])
    if path == "cluster":
        options = {"tiles": clusters_of(4, 8)}
    else:  # a block's slice is half of H, so that not all blocks wait for all
        options = {"tiles": grid_of(2, 2, 24, 1), "B": 24, "H": 128}

    def right(seed):
        try:
            return exchange(loops, seed, **options)
        except RuntimeError:  # a fault that the host found
            return False

    assert not all(right(seed) for seed in range(40))
