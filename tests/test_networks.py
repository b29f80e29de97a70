"""The operators over several networks side by side, and with sums for parts of the batch.

What torch.func.vmap makes of them: an ensemble is one call with weights (G, H, H), the gradient of
each sample one call whose sums over rows are taken for each part of the batch. Both are compared
with the calls they stand for.
"""

import dataclasses

import pytest
import torch
from cases import EVERYTHING, Case, Problem, problem
from tolerances import same_bits

import torch_bptt  # noqa: F401 - registers the operators

OPERATORS = torch.ops.torch_bptt
GRADIENTS = ("x", "h0", "weight_ih", "weight_hh", "bias", "alpha", "restart", "norms")
SUMS = ("weight_ih", "weight_hh", "bias", "alpha")

ALL = Case().but(**EVERYTHING)
CASES = [
    Case(),
    Case(T=1, B=1),
    Case(B=0),
    Case(T=0),
    Case(h0=False, bias=False, activation="relu"),
    Case(packed=True),
    Case(keep=True, truncate=2, reverse=True),
    Case(T=70, B=17, alpha=0.3),  # more rows than a chunk has
    ALL,
    ALL.but(packed=False, clip=None, activation="relu"),
]


CASES_OF_PARTS = [
    Case(),
    Case(packed=True),
    Case(keep=True, truncate=2, reverse=True),
    ALL,
    ALL.but(packed=False, clip=None, reverse=False),
]


def solve(p, parts=0):
    """The results of all operators by name."""
    results = dict(
        zip(("h", "h_n", "f"), OPERATORS.rnn_forward(*p.operands, **p.forward_options), strict=True)
    )
    given = (p.grad_h, p.grad_h_n, p.x, p.h0, results["h"], results["f"], p.weight_ih, p.weight_hh)
    wanted = [name != "alpha" or p.alpha is not None for name in GRADIENTS]
    grads = OPERATORS.rnn_backward(*given, **p.backward_options, wanted=wanted, parts=parts)
    results |= zip((f"grad_{name}" for name in GRADIENTS), grads, strict=True)
    scan = OPERATORS.adjoint_scan(p.grad_h, p.gate, p.weight_hh, **p.adjoint_options)
    results |= zip(("d", "d0", "d_restart"), scan, strict=True)
    q = OPERATORS.tangent_scan(p.grad_h, p.grad_h_n, p.gate, p.weight_hh, **p.tangent_options)
    return results | {"q": q}


def side_by_side(problems, shared=()):
    """One problem of G networks; those tensors that they share are expanded."""
    changed = {}
    for field in dataclasses.fields(Problem):
        tensors = [getattr(p, field.name) for p in problems]
        if isinstance(tensors[0], torch.Tensor) and field.name != "batch_sizes":
            if field.name in shared:
                changed[field.name] = tensors[0].expand(len(tensors), *tensors[0].shape)
            else:
                changed[field.name] = torch.stack(tensors)
    return dataclasses.replace(problems[0], **changed)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_networks_give_what_each_of_them_gives(case, dtype):
    problems = [problem(case, dtype, seed) for seed in range(3)]
    together = solve(side_by_side(problems))
    for i, p in enumerate(problems):
        for name, expected in solve(p).items():
            if expected.shape != (0,):
                same_bits(f"{name} of network {i}", together[name][i], expected)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_networks_on_any_number_of_threads(count, threads, monkeypatch):
    """Few of them share all threads in turn, many get one each; small ones stay on one."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for sizes in ({"T": 3, "H": 5}, {"T": 40, "B": 20, "H": 64}):
            problems = [problem(ALL.but(**sizes), torch.float32, seed) for seed in range(count)]
            together = solve(side_by_side(problems))
            for i, p in enumerate(problems):
                for name, expected in solve(p).items():
                    same_bits(f"{name} of network {i}", together[name][i], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*Problem.TENSORS, "keep"])
def test_networks_may_share_a_tensor(name):
    case = ALL.but(packed=False)
    problems = [problem(case, seed=seed) for seed in range(3)]
    for p in problems[1:]:
        setattr(p, name, getattr(problems[0], name))
    together = solve(side_by_side(problems, shared=[name]))
    for i, p in enumerate(problems):
        for result, expected in solve(p).items():
            same_bits(f"{result} of network {i}", together[result][i], expected)


def part_of(p, part, parts):
    """The rows of one part: every so many of each step."""

    def rows(tensor):
        if p.batch_sizes is None or tensor.shape[-2] == p.case.B:  # dense, or a state
            return tensor[..., part::parts, :]
        return tensor[part::parts]

    changed = {
        name: rows(getattr(p, name))
        for name in ("x", "h0", "grad_h", "grad_h_n", "gate", "restart", "mask", "noise")
        if getattr(p, name) is not None
    }
    if p.keep is not None:
        changed["keep"] = p.keep[:, part::parts]
    if p.batch_sizes is not None:
        changed["batch_sizes"] = p.batch_sizes // parts
    return dataclasses.replace(p, case=p.case.but(B=p.case.B // parts), **changed)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "rows"), [(1, 3), (9, 7)])
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("case", CASES_OF_PARTS, ids=str)
def test_each_part_of_the_batch_has_sums_of_its_own(case, T, rows, parts, dtype):
    """Bit for bit: a chunk holds all of the rows, and its sums run over them in their order.

    Three rows or more, as products with one or two rows are summed in another order.
    """
    case = case.but(T=T, B=rows * parts)
    p = in_parts(problem(case, dtype), problem(case.but(B=rows), dtype), parts)
    together, plain = solve(p, parts), solve(p)
    for part in range(parts):
        for name, expected in solve(part_of(p, part, parts)).items():
            if name.removeprefix("grad_") in SUMS and expected.shape != (0,):
                same_bits(f"{name} of part {part}", together[name][part], expected)
    for name in ("grad_x", "grad_h0", "grad_restart", "grad_norms"):
        same_bits(name, together[name], plain[name])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [Case(T=700, B=6), ALL.but(T=700, B=6)], ids=str)
def test_parts_over_many_chunks(case, threads):
    """Sums of 1400 rows, cut elsewhere: they differ by less than n eps, n^0.5 of it typical."""
    p = in_parts(problem(case), problem(case.but(B=2)), 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = solve(p, 3)
    finally:
        torch.set_num_threads(before)
    for part in range(3):
        for name, expected in solve(part_of(p, part, 3)).items():
            if name.removeprefix("grad_") in SUMS and expected.shape != (0,):
                error = (together[name][part] - expected).abs().max()
                assert error <= 1400 * 2.2e-16 * expected.abs().max(), f"{name} of part {part}"


def in_parts(p, few, parts):
    """The problem; if it is packed, with rows of each length ``parts`` times, as vmap has them."""
    if p.batch_sizes is None:
        return p
    rows = parts * len(few.x)
    changed = {"batch_sizes": few.batch_sizes * parts}
    for name in ("x", "grad_h", "gate", "noise"):
        tensor = getattr(p, name)
        if tensor is not None:
            changed[name] = torch.cat([tensor] * parts)[:rows]
    return dataclasses.replace(p, **changed)


# ---- wrong input


def test_networks_that_do_not_fit_are_refused():
    p = side_by_side([problem(Case(), seed=seed) for seed in range(3)])
    for name in ("x", "weight_ih", "bias_ih", "h0"):
        wrong = dataclasses.replace(p, **{name: getattr(p, name)[:2]})
        with pytest.raises(ValueError, match=f"rnn_forward: {name} must have a dimension of 3"):
            solve(wrong)
    for name in ("gate", "grad_h"):
        wrong = dataclasses.replace(p, **{name: getattr(p, name)[:2]})
        with pytest.raises(ValueError, match="must have a dimension of 3 networks in front"):
            OPERATORS.adjoint_scan(wrong.grad_h, wrong.gate, wrong.weight_hh)
    with pytest.raises(ValueError, match="weight_hh must have one matrix or more, got none"):
        solve(dataclasses.replace(p, weight_hh=p.weight_hh[:0]))
    with pytest.raises(ValueError, match="weight_ih must have shape"):
        solve(dataclasses.replace(p, weight_ih=p.weight_ih[:, 1:]))


@pytest.mark.parametrize(("case", "parts"), [(Case(), 2), (Case(packed=True, B=4), 2)], ids=str)
def test_parts_that_do_not_divide_the_rows_are_refused(case, parts):
    with pytest.raises(ValueError, match="parts must divide the rows of every step, got 2 parts"):
        solve(problem(case), parts)
    with pytest.raises(ValueError, match=r"parts must be a number of parts .* got -1"):
        solve(problem(case), -1)
