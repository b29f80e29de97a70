"""What is measured on a GPU, most valuable first: whoever runs out of time has measured that.

To add a case, add it to a group.
"""

import dataclasses
import itertools
from collections.abc import Iterator

# Number formats under the name of the arithmetic. tf32 is float32 in memory, with products that
# read 10 bits of the significand, as torch.backends.cudnn.allow_tf32 lets torch.nn.RNN do.
MATHS = ("float16", "bfloat16", "tf32", "float32", "float64")
PASSES = ("forward", "forward+backward")
BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4, "float64": 8}
# Matrix products, 1e12 operations a second: what an H200's data sheet promises, halved. These and
# STEP only predict how long a measurement takes.
RATES = {"float16": 400, "bfloat16": 400, "tf32": 200, "float32": 30, "float64": 30}
STEP = 8.0  # microseconds of a step that is a few kernels


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a batch; ``steps`` are the lengths T whose times make a slope.

    packed: rows of all lengths from T down to T / B, as a PackedSequence.
    """

    H: int
    B: int
    math: str = "bfloat16"
    nonlinearity: str = "tanh"
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    I: int | None = None  # noqa: E741 - None means H
    steps: tuple[int, ...] = (64, 256, 1024)

    @property
    def inputs(self) -> int:
        return self.I or self.H

    @property
    def name(self) -> str:
        words = [f"H{self.H}", f"B{self.B}", self.math]
        words += [self.nonlinearity] if self.nonlinearity != "tanh" else []
        words += [f"{self.layers}layers"] if self.layers > 1 else []
        words += [word for word in ("bidirectional", "packed") if getattr(self, word)]
        words += [f"I{self.I}"] if self.I else []
        return "-".join(words)

    def lengths(self, T: int) -> list[int]:
        """Steps of each row, none longer than the one before."""
        if not self.packed:
            return [T] * self.B
        return [max(1, T * (self.B - b) // self.B) for b in range(self.B)]

    def operations(self, T: int, backward: bool) -> float:
        """Multiplications and additions in the matrix products of a call."""
        directions = 2 if self.bidirectional else 1
        above = (self.layers - 1) * (directions + 1) * self.H
        products = self.inputs + self.H + above
        return 2.0 * sum(self.lengths(T)) * directions * self.H * products * (3 if backward else 1)

    def predicted(self, T: int, backward: bool) -> float:
        """Seconds of a call, by a model that no measurement stands behind."""
        scans = self.layers * (2 if self.bidirectional else 1) * (2 if backward else 1)
        return 1e-6 * STEP * T * scans + self.operations(T, backward) / (1e12 * RATES[self.math])

    def gigabytes(self, T: int) -> float:
        """Of what a training step holds: x, its gradient, states and theirs, both directions."""
        width = 2 * self.inputs + 4 * self.layers * self.H * (2 if self.bidirectional else 1)
        return 1e-9 * T * self.B * width * BYTES[self.math]

    def steps_within(self, seconds: float) -> tuple[int, ...]:
        """``steps`` without those whose call would take longer, but two of them in any case."""
        short = [T for T in self.steps if self.predicted(T, True) <= seconds]
        return tuple(max(short, sorted(self.steps)[:2], key=len))


def grid(hidden, batches, maths, **more) -> list[Case]:
    return [Case(H, B, math, **more) for math, H, B in itertools.product(maths, hidden, batches)]


SHORT = ("bfloat16", "tf32", "float16", "float32")

GROUPS: dict[str, list[Case]] = {
    # One for each situation that recurs in practice.
    "headline": [
        Case(768, 16, "bfloat16"),
        Case(768, 16, "float16"),
        Case(1024, 32, "bfloat16"),
        Case(1024, 32, "float16"),
        Case(512, 64, "tf32"),
        Case(512, 64, "float32"),
        Case(128, 64, "bfloat16"),
        Case(128, 64, "float32"),
        Case(256, 32, "tf32"),
        Case(256, 32, "float32"),
    ],
    # The training rows of DeepBench for plain RNNs.
    "deepbench": [
        Case(H, B, math, "relu", steps=(25, 50))
        for math in ("float16", "bfloat16", "tf32")
        for H in (1760, 2048, 2560)
        for B in (16, 32, 64, 128)
    ],
    "stacked": [
        case
        for math in ("bfloat16", "tf32")
        for case in (
            Case(512, 64, math, layers=2),
            Case(512, 64, math, bidirectional=True),
            Case(512, 64, math, packed=True),
            Case(512, 64, math, layers=2, bidirectional=True, packed=True),
            Case(128, 64, math, layers=2, bidirectional=True),
        )
    ],
    "middle": grid((128, 256, 512, 1024), (1, 16, 64, 128), SHORT),
    # 257 and 1100 are multiples of nothing that a tile is made of.
    "edges": grid((32, 64, 257, 384, 768, 1100, 1536), (8, 32, 64), SHORT),
    "small-inputs": grid((128, 512), (32,), SHORT, I=16),
    "large-batch": grid((64, 256, 1024), (256,), SHORT),
    "large-state": grid((1760, 2048, 2560), (1, 16, 64), SHORT),
    "float64": grid((32, 128, 512), (1, 32), ("float64",)),
    # To see that everything runs, on a CPU too.
    "smoke": [
        Case(8, 3, "float32", steps=(4, 8)),
        Case(8, 3, "float64", "relu", 2, True, True, 5, (4, 8)),
    ],
}


def find(groups: list[str]) -> Iterator[tuple[str, Case]]:
    """(group, case) of these groups in their order, each case once."""
    seen = set()
    for group in groups:
        for case in GROUPS[group]:
            if case not in seen:
                seen.add(case)
                yield group, case
