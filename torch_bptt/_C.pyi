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
