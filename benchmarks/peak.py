"""The peak of the processor's arithmetic, measured by peak.cpp."""

import ctypes
from pathlib import Path

import native


def gflops(dtype: str, threads: int) -> float:
    """Billions of multiplications and additions in a second, in vectors of this machine's widest.

    The best of a few short measurements: others who use the machine do not raise the peak.
    float16 counts as float32, in which it is computed.
    """
    library = native.load(Path(__file__).with_suffix(".cpp"))
    function = getattr(library, f"peak_{'float32' if dtype == 'float16' else dtype}")
    function.argtypes = [ctypes.c_int, ctypes.c_double]
    function.restype = ctypes.c_double
    return max(function(threads, 0.01) for _ in range(5))
