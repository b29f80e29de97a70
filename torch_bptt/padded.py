"""Rows of different lengths where torch notes the program (torch.compile, export, jit.trace), and
where torch.func.vmap maps over lengths.

Elsewhere rows are packed, but then shapes depend on these values. Here every row runs for all T
steps, and what lies past its end is kept from mattering:

    input, output    zero there, for every layer
    state            starts anew at every such step, so that it stays bounded
    h_n              taken at each row's last step
    reverse          the steps of each row are turned round, run upward, and turned back, so that a
                     row's own steps count from its start, as truncate has it
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Which steps exist.

    lengths: (B,), from 0 to T, on the device of input.
    existing: (T, B) bool.
    turned: (T, B), the step that comes in the place of each where rows are turned round; its own
        where it does not exist.
    """

    lengths: Tensor
    existing: Tensor
    turned: Tensor

    @classmethod
    def of(cls, lengths: Tensor, steps: int) -> "Padding":
        step = torch.arange(steps, device=lengths.device)[:, None]
        existing = step < lengths
        return cls(lengths, existing, torch.where(existing, lengths - 1 - step, step))

    def clear(self, rows: Tensor) -> Tensor:
        """(T, B, F) with zeros where no step exists."""
        return torch.where(self.existing[..., None], rows, 0)

    def run(self, layer, x, h0, network, keep, options, draws):
        """What ``functional.layer`` returns for one direction over clear rows x."""
        if options.reverse:
            x, keep = self._turn(x), None if keep is None else keep.gather(0, self.turned)
        keep = self.existing if keep is None else keep & self.existing
        output, _ = layer(x, h0, network, None, keep, options._replace(reverse=False), draws)
        h_n = self._last(output, h0)
        return self.clear(self._turn(output) if options.reverse else output), h_n

    def _turn(self, rows):
        return rows.gather(0, self.turned[..., None].expand_as(rows))

    def _last(self, output, h0):
        """The state after each row's last step, (1, B, H): h0 or zeros where there is none."""
        last = (self.lengths - 1).clamp(min=0)[None, :, None].expand(1, -1, output.shape[-1])
        h0 = 0 if h0 is None else h0.to(output.dtype)
        return torch.where(self.lengths[:, None] > 0, output.gather(0, last), h0)
