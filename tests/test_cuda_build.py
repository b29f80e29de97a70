"""The CUDA sources compile: without warnings, and the kernels without spilling registers.

This needs nvcc but no GPU. Every kernel for every architecture takes minutes, so that only
`make test-cuda-on-host` compiles them all; otherwise one small file stands for them.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
KERNELS = sorted(ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("75", "80", "90a")
ALL = os.environ.get("TORCH_BPTT_TEST_ALL_CUDA_SOURCES") == "1"

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
# nvcc may be a script or a link somewhere else.
TOOLKITS = [
    Path(NVCC).resolve().parent.parent / "include",
    Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
]
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")


def compiled(path, arch, target):
    return subprocess.run(
        [
            *(NVCC, "-std=c++20", "-O3", "--Werror=all-warnings", "-Xptxas=-v"),
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"),
            *("-c", path, "-o", target),
        ],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "path", KERNELS if ALL else [ROOT / "csrc/cuda/rows.cu"], ids=lambda p: p.stem
)
def test_kernels_compile_without_warnings_or_spills(path, tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        archs = ARCHITECTURES if ALL else ARCHITECTURES[-1:]
        runs = list(pool.map(lambda arch: compiled(path, arch, tmp_path / f"{arch}.o"), archs))
    for run in runs:
        assert run.returncode == 0, run.stderr
        kernels = re.findall(r"Compiling entry function '(\S+)'", run.stderr)
        memory = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            run.stderr,
        )
        assert len(kernels) > 0
        assert len(memory) >= len(kernels)
        spilled = [m for m in memory if m != ("0", "0", "0")]
        assert not spilled, run.stderr


@pytest.mark.skipif(not ALL, reason="slow: `make test-cuda-on-host` runs it")
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "csrc").glob("*.cpp")))
def test_the_side_of_torch_compiles(name):
    """Against the headers of any torch, with a stand-in for the one that only CUDA builds have."""
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    facts = ["BUILD", "BUILT_WITH_CUDA", "BUILT_WITH_TORCH", "CXX_FLAGS"]
    system = [
        *include_paths(),
        sysconfig.get_path("include"),
        *(path for path in TOOLKITS if (path / "cuda_runtime.h").exists()),
    ]
    run = subprocess.run(
        [
            *("g++", "-fsyntax-only", *flags, "-DTORCH_BPTT_CUDA", "-DTORCH_EXTENSION_NAME=_C"),
            *(f'-DTORCH_BPTT_{fact}="{torch.__version__}"' for fact in facts),
            *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_stubs'}"),
            *(f"-isystem{path}" for path in system),
            ROOT / f"csrc/{name}.cpp",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
