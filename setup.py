"""Builds the compiled part, torch_bptt._C; the rest of the package is described in pyproject.toml.

Environment variables:
    DEBUG=1                                 no optimisation, debug symbols, assertions on
    TORCH_BPTT_SANITIZE=address,undefined   instrument with these sanitizers (`make sanitize`)
    TORCH_BPTT_WERROR=1                     our own warnings are errors (what CI does)
    CXX, MAX_JOBS                           the compiler; how many files it compiles at once

There is no -march here on purpose: one binary carries every instruction set, each source in
csrc/cpu says which ones it is compiled for, and the library chooses when it is loaded.
"""

import os
from glob import glob

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

sanitize = os.environ.get("TORCH_BPTT_SANITIZE", "")
debug = os.environ.get("DEBUG", "0") == "1"
werror = os.environ.get("TORCH_BPTT_WERROR", "0") == "1"
variant = "sanitize" if sanitize else "debug" if debug else "release"

# -fno-wrapv: Python's own flags may carry -fwrapv, which slows index arithmetic and blinds UBSan to
# signed overflow.
language = ["-std=c++20", "-fopenmp", "-fvisibility=hidden", "-fno-wrapv"]
arithmetic = ["-ffp-contract=fast", "-fno-math-errno"]
warnings = ["-Wall", "-Wextra", "-Wno-psabi", *(["-Werror"] if werror else [])]
optimise = {
    "release": ["-O3", "-g0"],
    "debug": ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"],
    "sanitize": ["-O1", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS", "-fno-omit-frame-pointer"],
}[variant]
# vptr needs type information that libtorch does not export. The first finding ends the process.
instrument = []
if sanitize:
    instrument = [f"-fsanitize={sanitize}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
flags = [*optimise, *language, *arithmetic, *warnings, *instrument]

# What torch_bptt._C.build_info() reports. When one of them changes, a new torch included, ninja
# compiles every file again.
facts = {
    "TORCH_BPTT_BUILD": variant,
    "TORCH_BPTT_BUILT_WITH_TORCH": torch.__version__,
    "TORCH_BPTT_CXX_FLAGS": " ".join(flags),
}

extension = CppExtension(
    "torch_bptt._C",
    sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    define_macros=[(name, f'"{value}"') for name, value in facts.items()],
    # As system headers torch's own warnings do not count, so that -Werror means ours.
    extra_compile_args=[*flags, *(f"-isystem{path}" for path in include_paths())],
    extra_link_args=["-fopenmp", *instrument],
)
extension.include_dirs = [os.path.abspath("csrc")]

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    # Each kind of build has objects of its own: none overwrites another's.
    options={"build": {"build_base": f"build/{variant}"}},
)
