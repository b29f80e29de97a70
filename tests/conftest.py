"""What all tests share: a device, one instruction set after another, and PyTorch's own warnings.

    pytest                    on the CPU
    pytest --device cuda FILE ...   the same test bodies on a GPU

The device of ``--device`` is torch's default device: what a test makes without naming a device is
there. What has to stay on the CPU on any device (batch sizes, and numbers from a generator, so that
they are the same everywhere) says so. A test about the CPU alone is marked ``cpu``.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu, or cuda for the tests of a GPU")


def use(device):
    """Make it the default, or say why it cannot be."""
    from torch_bptt import _C

    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here")
    built = _C.build_info()["cuda"]  # a version first, if it was built for a GPU
    if device == "cuda" and not built[0].isdigit():
        raise pytest.UsageError(f"--device cuda: torch_bptt was built without CUDA: {built}")
    torch.set_default_device(device)
    # float32 products are to be float32's, as on the CPU; tests of TF32 switch it on.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # torch.nn.RNN as what ours is compared with is PyTorch's own loop over time: cuDNN has no
    # backward pass in eval mode and no second derivatives, and draws dropout in another order.
    # test_cuda.py compares with cuDNN.
    torch.backends.cudnn.enabled = False


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: about the CPU alone; skipped on another device")
    if config.getoption("--device") != "cpu":
        use(config.getoption("--device"))
        # Of PyTorch, when the first product of a process runs in a backward pass; it then goes on.
        config.addinivalue_line(
            "filterwarnings", "ignore:Attempting to run cuBLAS, but there was no:UserWarning"
        )
    # Tests are small, and where the machine is busy two threads that wait for each other take
    # several times as long as one. Tests about threads say how many they want.
    torch.set_num_threads(1)
    # torch.func.jvp loads PyTorch's decompositions, which PyTorch itself still compiles this way.
    config.addinivalue_line(
        "filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    )


def pytest_generate_tests(metafunc):
    """A test that uses ``isa`` runs once for each instruction set that this machine has, and on
    another device once.
    """
    if "isa" in metafunc.fixturenames:
        from torch_bptt import _C

        device = metafunc.config.getoption("--device")
        isas = _C.isas() if device == "cpu" else [device]
        metafunc.parametrize("isa", isas, indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="about the CPU alone"))


@pytest.fixture
def isa(request):
    """Run the test on the kernels of one instruction set, chosen in this process."""
    from torch_bptt import _C

    if request.param not in _C.isas():  # the name of another device
        yield request.param
        return
    chosen = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(chosen)
