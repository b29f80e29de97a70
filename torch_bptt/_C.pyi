"""Facts about the compiled extension. Its operators, torch.ops.torch_bptt.*: csrc/binding.cpp."""

def build_info() -> dict[str, str]:
    """How it was built: compiler, flags, the version of torch, cuda."""

def isas() -> list[str]:
    """The instruction sets this machine can run, slowest first."""

def isa() -> str:
    """The one in use: the fastest, or the one TORCH_BPTT_ISA names."""

def set_isa(name: str) -> None:
    """Use another one of isas() from now on."""

def activations() -> list[str]:
    """The nonlinearities the kernels know."""

def cuda_facts(index: int) -> dict[str, int | bool | list[int]]:
    """What the plan asks of that CUDA device; in builds with CUDA alone.

    resident_clusters: of 2, 4, 8 and 16 blocks, how many run at a time.
    """

def cuda_plan(
    device: tuple[int, int, int, int],
    operation: str,
    dtype: str,
    T: int,
    B: int,
    H: int,
    tf32: bool = False,
    path: str | None = None,
    library: bool = True,
) -> dict[str, str | bool | int | float]:
    """What the CUDA backend would run; asks no device, and is there in builds without CUDA too.

    device: compute capability times ten, multiprocessors, bytes of shared memory of a block, blocks
    of a cluster. operation: forward, adjoint, tangent. path: step, block, cluster, grid or gemm, to
    force one where it can do it. library: whether PyTorch's own products round as the loop's do,
    without which there is no gemm.
    """
