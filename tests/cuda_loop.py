"""Runs one loop of the CUDA backend on the host of tests/cuda_on_host, with numpy arrays for its
arguments, and says what it should compute: loops over the definition."""

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

needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None or os.uname().sysname != "Linux",
    reason="needs Linux and a C++ compiler",
)

INTEGERS = [
    "pass_", "activation", "tensor", "reverse", "truncate", "gate_given",
    "T", "B", "H", "grid", "cluster", "clusters", "rows", "tiles", "begin", "end", "seed",
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


INCLUDE = ["-DTORCH_BPTT_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
SOURCES = [
    *(HOST / name for name in ("fibers.cpp", "one_loop.cpp")),
    *(HOST / f"on_host_{path}_path.cpp" for path in ("cluster", "grid")),
    *sorted((ROOT / "csrc/cuda").glob("*plan.cpp")),
]


def objects(folder):
    """{name of the source: its object file}"""
    return {
        source.stem: compiled(folder / f"{source.stem}.o", *INCLUDE, "-c", source)
        for source in SOURCES
    }


def library(folder, parts):
    """The loops for this machine, of such objects."""
    loaded = ctypes.CDLL(compiled(folder / "loops.so", "-shared", *parts.values()))
    for name in ("run_float", "run_bfloat16", "run_float16"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.cluster_plan.restype = ctypes.c_bool
    return loaded


def broken(folder, parts, path, old, new):
    """The same with other text in one kernel."""
    source = (ROOT / f"csrc/cuda/{path}_path.cu").read_text()
    assert source.count(old) == 1
    (folder / "cuda").mkdir()
    (folder / f"cuda/{path}_path.cu").write_text(source.replace(old, new))
    # Its neighbours are where they were.
    include = [f"-I{folder}", *INCLUDE, f"-I{ROOT / 'csrc/cuda'}"]
    name = f"on_host_{path}_path"
    changed = compiled(folder / "changed.o", *include, "-c", HOST / f"{name}.cpp")
    return library(folder, {**parts, name: changed})


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


def run(loops, pass_, arrays, *, dtype="float32", wanted=("state",), kept=None, B, T, H, **options):
    """{name: what the loop wrote}. `arrays` are numbers; NaN is what nobody has written. `kept` are
    arrays as the loop stores them, which it goes on with."""
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
    held.update(kept or {})
    if options.pop("misaligned", False):  # one element off
        held["weight"] = np.append(held["weight"][:1, :1], held["weight"])[1:]
    call = Call(pass_=pass_, B=B, T=T, H=H, clip=options.pop("clip", -1))
    settings = {"activation": IDENTITY, "end": -1, **options}
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


# ---- small integers -----------------------------------------------------------------------------
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
