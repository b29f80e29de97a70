"""The peak of the processor's arithmetic, measured by peak.cpp."""

import ctypes
from pathlib import Path

import native


def gflops(dtype: str, threads: int, seconds: float = 0.05) -> float:
    """Billions of multiplications and additions in a second, with vectors of this machine's widest.

    float16 counts as float32, in which it is computed.
    """
    library = native.load(Path(__file__).with_suffix(".cpp"))
    function = getattr(library, f"peak_{'float32' if dtype == 'float16' else dtype}")
    function.restype = ctypes.c_double
    return function(ctypes.c_int(threads), ctypes.c_double(seconds))
