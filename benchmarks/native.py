"""C++ sources of the benchmarks, compiled when they are first needed."""

import ctypes
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build" / "benchmarks"


def load(source: Path, *flags: str) -> ctypes.CDLL:
    """The functions of one source file as a library; it is compiled again when either changes."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-fopenmp"]
    command += [str(source), *flags]
    content = source.read_bytes() + " ".join(command).encode()
    library = BUILD / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", unfinished], check=True)
        os.replace(unfinished, library)
    return ctypes.CDLL(library)
