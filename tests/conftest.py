"""What all tests share: one instruction set after another, and PyTorch's own warnings."""

import pytest
import torch


def pytest_configure(config):
    # Tests are small, and where the machine is busy two threads that wait for each other take
    # several times as long as one. Tests about threads say how many they want.
    torch.set_num_threads(1)
    # torch.func.jvp loads PyTorch's decompositions, which PyTorch itself still compiles this way.
    config.addinivalue_line(
        "filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    )


def pytest_generate_tests(metafunc):
    """A test that uses ``isa`` runs once for each instruction set that this machine has."""
    if "isa" in metafunc.fixturenames:
        from torch_bptt import _C

        metafunc.parametrize("isa", _C.isas(), indirect=True)


@pytest.fixture
def isa(request):
    """Run the test on the kernels of one instruction set, chosen in this process."""
    from torch_bptt import _C

    chosen = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(chosen)
