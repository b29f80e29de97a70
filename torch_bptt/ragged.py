"""Rows of different lengths inside a dense (T, B, F), packed for the kernels and put back.

An input may lie where it is: what is packed is what is about to be run, all steps or a stretch.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from torch_bptt._values import number


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The rows that have steps, the longest first.

    It stands where the batch_sizes of packed rows do, and is indexed alike, but does not grow with
    T: len() is the number of steps, [t] how many rows have step t, [t:u] the rows in these steps.

    lengths: (N,), descending and positive, on the CPU.
    order: (N,), which row of x each is, on the CPU.
    """

    lengths: Tensor
    order: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> "Ragged":
        """From the lengths of all rows, some of which may be zero."""
        lengths, order = lengths.sort(descending=True)
        return cls(lengths[lengths > 0], order[lengths > 0])

    def __len__(self) -> int:
        return number(self.lengths[0]) if len(self.lengths) else 0

    def __getitem__(self, steps: int | slice) -> "Tensor | Ragged":
        if isinstance(steps, int):
            return (self.lengths > steps % len(self)).sum()
        first, last, _ = steps.indices(len(self))
        rows = int(self[first])
        return Ragged((self.lengths[:rows] - first).clamp(max=last - first), self.order[:rows])

    def existing(self) -> Tensor:
        """(T, N) bool, on the CPU: which rows have which steps."""
        return torch.arange(len(self), device="cpu")[:, None] < self.lengths

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """x, (T or more, B, F), as (data, batch_sizes) of a PackedSequence, and what puts features
        that are packed alike among zeros.
        """
        existing = self.existing()
        step, row = existing.nonzero(as_tuple=True)
        row = self.order[row]
        # Flattened as it lies in memory, which copies nothing: x may be a view of (B, T, F).
        by_row = x.stride(0) < x.stride(1)
        x = x.transpose(0, 1) if by_row else x
        place = row * x.shape[1] + step if by_row else step * x.shape[1] + row
        place = place.to(x.device)

        def unpack(data):
            zeros = data.new_zeros(*x.shape[:2], data.shape[-1])
            dense = zeros.flatten(0, 1).index_copy(0, place, data).view_as(zeros)
            return dense.transpose(0, 1) if by_row else dense

        return x.flatten(0, 1).index_select(0, place), existing.sum(1), unpack
