"""What all tests share: one instruction set after another, and PyTorch's own warnings."""

import pytest


def pytest_configure(config):
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
