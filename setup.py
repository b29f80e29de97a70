"""Builds the compiled part, torch_bptt._C; the rest of the package is described in pyproject.toml.

Environment variables:
    DEBUG=1                                 no optimisation, debug symbols, assertions on
    TORCH_BPTT_SANITIZE=address,undefined   instrument with these sanitizers (`make sanitize`)
    TORCH_BPTT_WERROR=1                     our own warnings are errors (what CI does)
    TORCH_BPTT_CUDA=0|1                     without CUDA kernels; or only with them. Not set, they
                                            are built where torch has CUDA and nvcc is found
    TORCH_BPTT_CUDA_ON_HOST=1               the CUDA kernels as C++ (`make test-cuda-on-host`)
    TORCH_CUDA_ARCH_LIST                    what CUDA kernels are compiled for; 9.0a builds fast
    CXX, CUDA_HOME, MAX_JOBS                the compilers; how many files are compiled at once

There is no -march here on purpose: one binary carries every instruction set, each source in
csrc/cpu says which ones it is compiled for, and the library chooses when it is loaded.
"""

import os
from glob import glob

import torch
from setuptools import setup
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
)

sanitize = os.environ.get("TORCH_BPTT_SANITIZE", "")
debug = os.environ.get("DEBUG", "0") == "1"
werror = os.environ.get("TORCH_BPTT_WERROR", "0") == "1"
variant = "sanitize" if sanitize else "debug" if debug else "release"

# ---- CUDA ----------------------------------------------------------------------------------------

on_host = os.environ.get("TORCH_BPTT_CUDA_ON_HOST", "0") == "1"
wish = os.environ.get("TORCH_BPTT_CUDA", "")
possible = torch.version.cuda is not None and CUDA_HOME is not None
if wish == "1" and not possible:
    raise SystemExit(
        "setup.py: TORCH_BPTT_CUDA=1 needs a torch with CUDA and the CUDA toolkit, "
        f"got torch {torch.__version__} (CUDA {torch.version.cuda}) and CUDA_HOME={CUDA_HOME}"
    )
cuda = possible and wish != "0" and not on_host

# sm_90a for the H100 and H200; the last one is code that newer devices compile for themselves.
ARCHITECTURES = {
    "sm_75": "compute_75",
    "sm_80": "compute_80",
    "sm_90a": "compute_90a",
    "compute_90": "compute_90",
}
chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "")  # torch makes flags of it
device_flags = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--threads=4",  # one for each of ARCHITECTURES
    *(["--Werror=all-warnings"] if werror else []),
    *(
        []
        if chosen
        else [f"-gencode=arch={arch},code={code}" for code, arch in ARCHITECTURES.items()]
    ),
]
built_with_cuda = (
    "on the host, for tests"
    if on_host
    else f"{torch.version.cuda}: {chosen or ' '.join(ARCHITECTURES)}"
    if cuda
    else "no"
)

# ---- flags ---------------------------------------------------------------------------------------

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
    "TORCH_BPTT_BUILD": f"{variant}, CUDA on the host" if on_host else variant,
    "TORCH_BPTT_BUILT_WITH_CUDA": built_with_cuda,
    "TORCH_BPTT_BUILT_WITH_TORCH": torch.__version__,
    "TORCH_BPTT_CXX_FLAGS": " ".join(flags),
}
defines = [f'-D{name}="{value}"' for name, value in facts.items()]
if cuda or on_host:
    defines.append("-DTORCH_BPTT_CUDA")
if on_host:
    defines.append("-DTORCH_BPTT_CUDA_ON_HOST")

# ---- sources -------------------------------------------------------------------------------------

# The plan is arithmetic that needs no CUDA.
sources = {*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp"), *glob("csrc/cuda/*.cpp")}
if cuda:
    sources |= set(glob("csrc/cuda/*.cu"))
if not cuda:
    sources.remove("csrc/cuda_device.cpp")
if not cuda and not on_host:
    sources -= {"csrc/cuda_backend.cpp", "csrc/cuda_products.cpp"}
if on_host:
    sources |= set(glob("tests/cuda_on_host/on_host_*.cpp")) | {"tests/cuda_on_host/fibers.cpp"}

extension = (CUDAExtension if cuda else CppExtension)(
    "torch_bptt._C",
    sources=sorted(sources),
    depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cu")),
    # As system headers torch's own warnings do not count, so that -Werror means ours.
    extra_compile_args={
        "cxx": [
            *flags,
            *defines,
            *(f"-isystem{path}" for path in include_paths("cuda" if cuda else "cpu")),
        ],
        "nvcc": device_flags,
    },
    extra_link_args=["-fopenmp", *instrument],
)
extension.include_dirs = [os.path.abspath("csrc"), *([os.path.abspath("tests")] if on_host else [])]

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    # Each kind of build has objects of its own: none overwrites another's.
    options={"build": {"build_base": f"build/{variant}{'-cuda-on-host' if on_host else ''}"}},
)
