"""The problems that the tests solve, each under a name.

To add a size, add a line to SIZES, with the reason why it is hard. To add an option, give it a
field in Case, use it in ``forward_options`` or ``backward_options``, and add a value that switches
it on to GRID and to EVERYTHING. Every test that runs over these then covers it.
"""

import dataclasses
import functools
import itertools

import torch

from torch_bptt import reference

# name -> (T, B, I, H). The kernels work in panels of 64 or 16 columns, tiles of 6 rows and chunks
# of at least 256 rows; numbers that these divide are the easy ones, and those just above and below
# are where an index goes wrong.
SIZES = {
    "one_step": (1, 3, 4, 5),
    "one_row": (9, 1, 4, 20),
    "one_of_each": (1, 1, 1, 1),
    "two_rows": (6, 2, 3, 16),
    "one_tile": (4, 6, 64, 64),
    "below_a_tile": (5, 5, 63, 63),
    "above_a_tile": (5, 7, 65, 65),
    "odd_narrow": (7, 3, 2, 17),
    "odd_33": (5, 7, 31, 33),
    "odd_100": (6, 17, 10, 100),
    "odd_257": (4, 7, 5, 257),
    "one_wide_row": (6, 1, 40, 257),
    # so few rows that the weights are not packed: K >= 32 T B
    "one_row_as_it_lies": (1, 1, 33, 40),
    "rows_as_they_lie": (1, 7, 229, 257),
    "few_rows_as_they_lie": (2, 3, 200, 224),
    "many_rows": (3, 61, 7, 33),
    "many_steps": (70, 17, 3, 20),
    "many_chunks": (40, 17, 100, 150),
    "no_rows": (3, 0, 4, 5),
}

GRID = {
    "activation": ("tanh", "relu", "sigmoid", "identity"),
    "alpha": (1.0, 0.3),
    "packed": (False, True),
    "keep": (False, True),
    "reverse": (False, True),
    "truncate": (0, 2),
    "clip": (None, 0.5),
    "extra": (False, True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call. str(case) is its name in a test report."""

    T: int = 5
    B: int = 7
    I: int = 3  # noqa: E741 - the input size, everywhere
    H: int = 17
    activation: str = "tanh"
    alpha: float = 1.0
    packed: bool = False
    keep: bool = False
    reverse: bool = False
    truncate: int = 0
    clip: float | None = None
    extra: bool = False  # a state to restart from, a mask and noise
    bias: bool = True
    h0: bool = True

    def __str__(self):
        flags = [name for name in ("packed", "keep", "reverse", "extra") if getattr(self, name)]
        flags += [f"no_{name}" for name in ("bias", "h0") if not getattr(self, name)]
        flags += [
            f"{name}{getattr(self, name)}" for name in ("truncate", "clip") if getattr(self, name)
        ]
        flags += [f"alpha{self.alpha}"] if self.alpha != 1 else []
        return "-".join([f"T{self.T}B{self.B}I{self.I}H{self.H}", self.activation, *flags])

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


EVERYTHING = {
    "alpha": 0.3,
    "packed": True,
    "keep": True,
    "reverse": True,
    "truncate": 2,
    "clip": 0.5,
    "extra": True,
}


def sized(**options):
    """One case for each of SIZES. Without rows nothing is packed: batch sizes are positive."""
    return [
        Case(T, B, I, H, **(options | {"packed": options.get("packed", False) and B > 0}))
        for T, B, I, H in SIZES.values()  # noqa: E741
    ]


def grid(base=None, **fixed):
    """Every combination of GRID; ``fixed`` holds some options at one value.

    But extra with two activations only, of which one is smooth: it comes before them.
    """
    choices = [[fixed[name]] if name in fixed else values for name, values in GRID.items()]
    cases = [
        (base or Case()).but(**dict(zip(GRID, values, strict=True)))
        for values in itertools.product(*choices)
    ]
    return [case for case in cases if not case.extra or case.activation in ("tanh", "relu")]


@dataclasses.dataclass
class Problem:
    """The tensors of a case; all but alpha, batch_sizes and keep share a dtype."""

    case: Case
    x: torch.Tensor  # (T, B, I) or (N, I)
    h0: torch.Tensor | None  # (1, B, H), or (B, H) when packed
    weight_ih: torch.Tensor  # (H, I)
    weight_hh: torch.Tensor  # (H, H)
    bias_ih: torch.Tensor | None  # (H,)
    bias_hh: torch.Tensor | None  # (H,)
    grad_h: torch.Tensor  # (T, B, H) or (N, H)
    grad_h_n: torch.Tensor  # as h0
    gate: torch.Tensor  # (T, B, H) or (N, H), for the scans alone
    batch_sizes: torch.Tensor | None  # (T,)
    keep: torch.Tensor | None  # (T, B)
    alpha: torch.Tensor | None  # (H,) of two values; float32 where the others are narrower
    restart: torch.Tensor | None  # as h0
    mask: torch.Tensor | None  # as h0
    noise: torch.Tensor | None  # (T, B, H) or (N, H)

    OPERANDS = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    INPUTS = (*OPERANDS, "alpha", "restart")  # all that may have a gradient
    TENSORS = (*INPUTS, "mask", "noise", "grad_h", "grad_h_n", "gate")

    @property
    def operands(self):
        return tuple(getattr(self, name) for name in self.OPERANDS)

    @property
    def names(self):
        """Those of INPUTS that the case has; an operand may be None."""
        others = [name for name in ("alpha", "restart") if getattr(self, name) is not None]
        return (*self.OPERANDS, *others)

    @property
    def inputs(self):
        return tuple(getattr(self, name) for name in self.names)

    def named(self, inputs):
        """Tensors in the order of names -> operands, {alpha, restart}."""
        others = dict.fromkeys(("alpha", "restart")) | dict(
            zip(self.names[6:], inputs[6:], strict=True)
        )
        return inputs[:6], others

    @property
    def layout(self):
        """Options of every operator."""
        return {
            "alpha": self.alpha,
            "mask": self.mask,
            "batch_sizes": self.batch_sizes,
            "keep": self.keep,
            "reverse": self.case.reverse,
        }

    @property
    def _derivative(self):
        return {"truncate": self.case.truncate, "clip": self.case.clip}

    @property
    def forward_options(self):
        fixed = {"activation": self.case.activation, "noise": self.noise}
        return {**fixed, **self.layout, "restart": self.restart}

    @property
    def layer_options(self):
        """Options of the operator rnn."""
        return {**self.forward_options, **self._derivative}

    @property
    def backward_options(self):
        fixed = {"activation": self.case.activation, "restart": self.restart}
        return {**fixed, **self.layout, **self._derivative}

    @property
    def adjoint_options(self):
        return {**self.layout, **self._derivative}

    @property
    def tangent_options(self):
        return {**self.layout, "restart": self.restart, "truncate": self.case.truncate}

    def to(self, dtype):
        changed = {name: getattr(self, name) for name in self.TENSORS}
        changed = {name: t if t is None else t.to(dtype) for name, t in changed.items()}
        if self.alpha is not None:
            changed["alpha"] = self.alpha.to(computed(dtype))
        return dataclasses.replace(self, **changed)

    def map(self, change):
        """Apply a function to every floating tensor."""
        changed = {name: getattr(self, name) for name in self.TENSORS}
        return dataclasses.replace(
            self, **{name: t if t is None else change(t) for name, t in changed.items()}
        )


def computed(dtype):
    """The type that the kernels compute a dtype in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_step(p):
    """A problem with T = 1, its rows and states without the dimension for time."""
    return p.map(lambda tensor: tensor.squeeze(0) if tensor.dim() == 3 else tensor)


def lengths(case):
    """Row lengths of a packed case: longest first, uneven, between 1 and T."""
    return sorted((case.T - row % case.T for row in range(case.B)), reverse=True)


def drawn_on_the_cpu(draw):
    """The problem that ``draw`` returns, the same on every device: all but batch_sizes moves."""

    @functools.wraps(draw)
    def function(*args, **kwargs):
        device = torch.get_default_device()
        if device.type == "cpu":
            return draw(*args, **kwargs)
        with torch.device("cpu"):
            p = draw(*args, **kwargs)
        keep = None if p.keep is None else p.keep.to(device)
        return dataclasses.replace(p.map(lambda t: t.to(device)), keep=keep)

    return function


@drawn_on_the_cpu
def problem(case, dtype=torch.float64, seed=0):
    """Normal data, weights uniform in +-1/sqrt(H) as torch.nn.RNN initialises them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def uniform(*shape):
        return (2 * torch.rand(*shape, generator=random, dtype=torch.float64) - 1) / case.H**0.5

    def gate(*shape):
        return torch.sigmoid(normal(*shape))  # in (0, 1), as slopes are

    p = _problem(case, normal, uniform, gate, random)
    if case.extra:
        p.mask = torch.where(p.mask > 0, 1 + p.mask, 0)  # half of it zeros, as dropout has it
    return p.to(dtype)


@drawn_on_the_cpu
def integers(case, fan=2, seed=0):
    """Small integers in float64: data in {-1, 0, 1}, ``fan`` entries of +-1 per row of a weight.

    The nonzeros of weight_hh are ``fan`` permutations, so that neither states nor gradients grow by
    more than that factor per step. Whoever needs exact sums asserts a bound on ``largest_sum``.
    """
    random = torch.Generator().manual_seed(seed)

    def ternary(*shape):
        return torch.randint(-1, 2, shape, generator=random).double()

    def sparse(rows, columns):
        weight = torch.zeros(rows, columns, dtype=torch.float64)
        for _ in range(fan):
            column = torch.randperm(max(rows, columns), generator=random)[:rows] % columns
            sign = 2.0 * torch.randint(0, 2, (rows,), generator=random) - 1
            weight[torch.arange(rows), column] = sign.double()
        return weight

    return _problem(case, ternary, sparse, lambda *shape: ternary(*shape).abs(), random)


def largest_sum(p):
    """A bound on every partial sum that an operator forms, in any order: the sums of |terms|.

    Slopes are at most 1 and restarts, cuts and clamps only take away, so a linear network without
    them on absolute values bounds states, gradients and the products of both; and the sum over all
    rows that is the gradient of a bias bounds what comes together at restarts.
    """
    case = p.case.but(activation="identity", keep=False, truncate=0, clip=None)
    p = dataclasses.replace(p, case=case, keep=None).map(torch.abs)
    if case.extra:  # as if a restarted row kept its state and got the other, below 1, on top
        p.noise = p.noise + p.weight_hh.sum(1)
    h, h_n, f = reference.rnn_forward(*p.operands, **p.forward_options)
    grads = reference.rnn_backward(
        p.grad_h, p.grad_h_n, p.x, p.h0, h, f, p.weight_ih, p.weight_hh, **p.backward_options,
        wanted=[True] * 8,
    )  # fmt: skip
    steep = torch.ones_like(p.gate)
    scans = reference.adjoint_scan(p.grad_h, steep, p.weight_hh, **p.layout)
    q = reference.tangent_scan(p.grad_h, p.grad_h_n, steep, p.weight_hh, **p.layout)
    return max(t.max().item() for t in (h, h_n, *grads, *scans, q) if t.numel())


def _problem(case, data, weight, gate, random):
    batch_sizes = None
    rows, state = (case.T, case.B), (1, case.B, case.H)
    if case.packed:
        batch_sizes = torch.tensor([sum(n > t for n in lengths(case)) for t in range(case.T)])
        rows, state = (int(batch_sizes.sum()),), (case.B, case.H)
    alpha = None
    if case.alpha != 1:
        alpha = torch.full((case.H,), case.alpha, dtype=torch.float64)
        alpha[1::2] = min(1, 2 * case.alpha)
    return Problem(
        case,
        x=data(*rows, case.I),
        h0=data(*state) if case.h0 else None,
        weight_ih=weight(case.H, case.I),
        weight_hh=weight(case.H, case.H),
        bias_ih=data(case.H) if case.bias else None,
        grad_h=data(*rows, case.H),
        grad_h_n=data(*state),
        gate=gate(*rows, case.H),
        batch_sizes=batch_sizes,
        keep=torch.rand(case.T, case.B, generator=random) < 0.7 if case.keep else None,
        bias_hh=data(case.H) if case.bias else None,
        alpha=alpha,
        restart=data(*state) if case.extra else None,
        mask=data(*state) if case.extra else None,
        noise=data(*rows, case.H) if case.extra else None,
    )
