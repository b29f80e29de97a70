"""Products in tf32 inside the CUDA loops, in the build with CUDA kernels on the host.

Rounded to tf32 a factor keeps 11 bits: its relative error is at most u = 2^-11, that of a product
of two (1 + u)^2 - 1 < 2.001 u. Sums are float32, and one step of the identity has nothing else, so
that an entry of h errs by at most 2.001 u sum |w p| + the rounding of float32,
(K + 4) 2^-24 sum |terms|.
"""

import pytest
import torch

import torch_bptt  # noqa: F401 - registers the operators
from torch_bptt import _C

ON_HOST = _C.build_info()["cuda"].startswith("on the host")
pytestmark = pytest.mark.skipif(not ON_HOST, reason="needs the build of `make test-cuda-on-host`")

U = 2.0**-11


# T = 1 is a path of single steps; with more rows than multiprocessors a block of H <= 128 uses
# tensor cores; larger H takes a cluster. A library's product, which is exact here, is none of them.
@pytest.mark.parametrize(("T", "B", "H"), [(1, 3, 40), (2, 140, 40), (2, 140, 100), (2, 3, 300)])
def test_a_step_rounds_its_factors_and_nothing_else(T, B, H, monkeypatch):
    generator = torch.Generator().manual_seed(H)
    h0 = torch.randn(1, B, H, generator=generator)
    weight = torch.randn(H, H, generator=generator) / H**0.5
    x, weight_ih = torch.zeros(T, B, 1), torch.zeros(H, 1)

    def first_step():
        given = (x, h0, weight_ih, weight, None, None, "identity")
        return torch.ops.torch_bptt.rnn_forward(*given)[0][0].double()

    truth = h0[0].double() @ weight.double().T
    terms = h0[0].double().abs() @ weight.double().abs().T
    exact = (first_step() - truth).abs()
    assert (exact <= (H + 4) * 2.0**-24 * terms).all()
    monkeypatch.setenv("TORCH_BPTT_ON_HOST_TF32", "1")
    rounded = (first_step() - truth).abs()
    assert (rounded <= (2.001 * U + (H + 4) * 2.0**-24) * terms).all()
    assert rounded.max() > 100 * exact.max()  # tf32 was used
