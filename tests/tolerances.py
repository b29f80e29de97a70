"""How far two results may differ, and why: the only tolerances of the tests of the numbers.

u = eps/2 is half the spacing of the dtype at 1: the largest relative error of one rounding.

(a) Exact. If every partial sum of every product is an integer below 2^24 (float32; 2^53 for
    float64), no addition rounds, whatever the order, so two implementations must agree bit for
    bit. ``cases.integers`` makes such data for relu and identity, whose values and slopes are
    integers too, and ``same_bits`` compares.

(b) One step. Each addition in a sum of K products rounds by at most u times the partial sum at
    hand. Summed pairwise there are ceil(log2 K) levels, and one more for the product:

        error <= u (1 + ceil(log2 K)) sum |a_i b_i|.

    A kernel adds in order, in a few chains. Its roundings have either sign and rms u/sqrt(3) times
    a partial sum that grows as sqrt(j): together u sqrt(K)/2.5 times the typical sum. The worst of
    many entries is about 4 rms and the largest entry of a tensor 3 typical ones, which makes
    u sqrt(K)/2 of the largest: below 2u (1 + ceil(log2 K)) up to K = 3000. So for either order

        floor = eps (1 + ceil(log2 K)) max |truth|

    relative to the largest entry of the tensor, not to each: an entry that cancels to nearly
    nothing carries the rounding of its terms. bfloat16 and float16 add in float32, so that one
    rounding to storage remains, for which the same formula with their eps is generous.

(c) Many steps. Each step adds an error as in (b) and passes on the earlier ones through the
    recurrence, which may amplify or forget them; no formula without the data is sharp. So the
    yardstick is a plain implementation in the same dtype, both against the truth, a float64 run:

        error <= 2 error(plain) + floor.

    The plain one is torch.nn.RNN, or reference.py where nn.RNN lacks the option. Twice, because
    both errors are single draws of a maximum over random roundings. For float64, which is the
    truth itself, error(plain) is that of float32 on the same case times the ratio of their eps;
    twice it then covers our own error and the truth's.

    float32 with TF32 reads operands with 10 bits after the point instead of 23 and adds in
    float32: the error of a product is that of two rounded operands, u = 2^-11 each, and (b) holds
    with TF32_EPS = 2^-10 in the place of eps. Without TF32 nothing is different on a GPU.

(d) A function of one number is judged in units in the last place of the correctly rounded value:
    ``ulps``.
"""

import math

import numpy as np
import torch

TF32_EPS = 2.0**-10


def floor(dtype, K, scale, eps=None):
    """(b): K terms per sum, scale the largest |truth|; eps that of dtype unless given."""
    eps = torch.finfo(dtype).eps if eps is None else eps
    return eps * (1 + math.ceil(math.log2(max(K, 1)))) * scale


def error_of(got, truth):
    """|got - truth| elementwise, in float64: 0 where equal or both NaN, inf where one is NaN."""
    got, truth = got.double(), truth.double()
    error = (got - truth).abs()
    same = (got == truth) | (got.isnan() & truth.isnan())
    return torch.where(same, 0.0, error.nan_to_num(nan=math.inf))


def step_of(index, batch_sizes=None):
    """The step t of an entry of a (T, B, H) or (N, H) tensor."""
    if batch_sizes is None:
        return index[0]
    return int((index[0] >= batch_sizes.cumsum(0)).sum())


def _where(worst, shape, steps, batch_sizes):
    index = tuple(int(i) for i in torch.unravel_index(worst, shape))
    return f"{index}" + (f", step t = {step_of(index, batch_sizes)}" if steps else "")


def largest_error(got, truth):
    return error_of(got, truth).max().item() if got.numel() else 0.0


def close_to_truth(name, got, truth, plain_error, *, K, steps=False, batch_sizes=None, eps=None):
    """Assert (c). ``truth`` is float64, plain_error the yardstick's largest, K the longest sum.

    steps says that dimension 0 is time, packed if batch_sizes is given; the message then names t.
    """
    assert got.shape == truth.shape, f"{name}: {got.shape=}, {truth.shape=}"
    if got.numel() == 0:
        return
    error = error_of(got, truth)
    least = floor(got.dtype, K, truth.nan_to_num(0, 0, 0).abs().max().item(), eps)
    worst = error.argmax()
    if not error.max() <= 2 * plain_error + least:
        raise AssertionError(
            f"{name}: error {error.max().item():.3e}, plain error {plain_error:.3e}, "
            f"allowed {2 * plain_error + least:.3e} = 2 plain + {least:.3e}; "
            f"worst at {_where(worst, got.shape, steps, batch_sizes)}: "
            f"got {got.flatten()[worst].item()!r}, truth {truth.flatten()[worst].item()!r}"
        )


def same_bits(name, got, expected, *, steps=False, batch_sizes=None):
    """Assert (a): equal everywhere, where NaN equals NaN and 0 equals -0."""
    assert got.shape == expected.shape, f"{name}: {got.shape=}, {expected.shape=}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype=}, {expected.dtype=}"
    error = error_of(got, expected)
    if got.numel() and error.max() > 0:
        worst = error.argmax()
        raise AssertionError(
            f"{name}: {int((error > 0).sum())} of {got.numel()} entries differ, "
            f"the worst by {error.max().item():.3e} "
            f"at {_where(worst, got.shape, steps, batch_sizes)}: "
            f"got {got.flatten()[worst].item()!r}, expected {expected.flatten()[worst].item()!r}"
        )


def ulps(got, truth):
    """(d): numpy arrays; |got - truth rounded to got's dtype| in spacings of that dtype there."""
    rounded = truth.astype(got.dtype)
    spacing = np.spacing(np.abs(rounded)).astype(truth.dtype)
    distance = np.abs(got.astype(truth.dtype) - rounded.astype(truth.dtype)) / spacing
    return np.where(got == rounded, 0, distance)
