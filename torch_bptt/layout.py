"""Where the predictions of a call lie, and bringing what is shaped like them into their order."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt._values import are_mapped
from torch_bptt.head import IGNORED


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the predictions of one call are, and everything that is shaped like them.

    Flat means: one after the other along the first dimension, in the order of the states, which is
    that of time, and within a step that of the rows (as packed, if input is packed).

    steps, rows: T and B.
    many_to_one: there is one prediction for each row.
    batch_first: (B, T, ...) instead of (T, B, ...).
    one: a sequence without a batch.
    packed: the input, if it is packed.
    """

    steps: int
    rows: int
    many_to_one: bool
    batch_first: bool = False
    one: bool = False
    packed: PackedSequence | None = None

    @property
    def shape(self) -> tuple:
        """Of the predictions, without their features."""
        shape = () if self.many_to_one else (self.steps,)
        if self.one:
            return shape
        return (self.rows, *shape) if self.batch_first else (*shape, self.rows)

    def data(self, name: str, value: Tensor | PackedSequence) -> Tensor:
        """The tensor in value, which must be packed as input is, if it is packed."""
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, PackedSequence):
            expected = "a tensor" if self.packed is None else "a tensor or a PackedSequence"
            raise TypeError(f"loss: {name} must be {expected}, got {type(value).__name__}")
        if self.packed is None or self.many_to_one:
            case = "many_to_one" if self.many_to_one else "an input that is not packed"
            raise TypeError(f"loss: {name} must be a tensor for {case}, got a PackedSequence")
        alike = torch.equal(value.batch_sizes, self.packed.batch_sizes)
        if not alike or not torch.equal(_order(value), _order(self.packed)):
            raise ValueError(
                f"loss: {name} must be packed as input is, expected the same batch_sizes and "
                f"sorted_indices, got batch_sizes {value.batch_sizes.tolist()} instead of "
                f"{self.packed.batch_sizes.tolist()}, or rows in another order"
            )
        return value.data

    def flat(self, name: str, value: Tensor | PackedSequence, features: tuple = ()) -> Tensor:
        """value, which must have exactly the shape of the predictions, flat: (N, *features)."""
        data = self.data(name, value)
        packed = isinstance(value, PackedSequence)
        expected = (*((len(self.packed.data),) if packed else self.shape), *features)
        if data.shape != expected:
            raise ValueError(
                f"loss: {name} must be shaped as the prediction, "
                f"expected {expected}, got {tuple(data.shape)}"
            )
        if not packed and not self.many_to_one:
            if self.packed is not None:
                data = data.index_select(1, _order(self.packed))[self._existing]
            elif self.batch_first and not self.one:
                data = data.transpose(0, 1)
        return data.reshape(-1, *features)

    def time_major(self, value: Tensor | PackedSequence) -> Tensor:
        """value, with the steps and rows of the input, as (T, B, ...), rows as packed."""
        if isinstance(value, PackedSequence):
            return value.data
        if self.one:
            return value.unsqueeze(1)
        if self.packed is not None:
            return value.index_select(1, _order(self.packed))
        return value.transpose(0, 1) if self.batch_first else value

    def flat_states(self, states: Tensor | PackedSequence) -> Tensor:
        """What the head reads, flat."""
        if isinstance(states, PackedSequence):
            return states.data
        if self.batch_first and not self.one and not self.many_to_one:
            states = states.transpose(0, 1)
        return states.reshape(-1, states.shape[-1])

    def counted(self, target, mask, lengths, *, last: bool) -> Tensor | None:
        """Which of the flat predictions to evaluate, upward; None for all.

        Arguments:
            target: flat.
            mask, lengths: as in ``ElmanNetwork.loss``.
            last: of each row only the last that counts.
        """
        conditions = []
        if mask is not None:
            flags = self.data("mask", mask)
            if flags.dtype != torch.bool:
                raise TypeError(f"loss: mask must be torch.bool, got {flags.dtype}")
            conditions.append(self.flat("mask", mask))
        if lengths is not None and self.packed is None and not self.many_to_one:
            device = target.device if checks.values_are_unknown(target) else None
            lengths = checks.check_lengths(lengths, self.steps, self.rows, device)
            steps = torch.arange(self.steps, device=lengths.device)
            conditions.append((steps[:, None] < lengths).flatten())
        if last and target.dtype == torch.int64:  # else its loss, zero, may be computed
            conditions.append(target != IGNORED)
        if not conditions and not last:
            return None
        if any(are_mapped(condition) for condition in conditions):
            raise NotImplementedError(
                "loss: mask, lengths and, for reduction='last', classes must not be mapped over by "
                "torch.func.vmap, as the predictions that count are picked by their places; map "
                "over input and target alone, or weigh the losses of forward's predictions"
            )
        counts = torch.ones(len(target), dtype=torch.bool, device=target.device)
        for condition in conditions:
            counts &= condition.to(counts.device)
        place = counts.nonzero().squeeze(1)
        if not last:
            return place
        row = self._row.to(place.device).index_select(0, place)
        latest = place.new_full((self.rows,), -1).scatter_reduce(0, row, place, "amax")
        return latest[latest >= 0].sort().values

    @property
    def _existing(self):
        """(T, B), rows as packed."""
        sizes = self.packed.batch_sizes
        return (torch.arange(self.rows, device="cpu") < sizes[:, None]).to(self.packed.data.device)

    @property
    def _row(self):
        """Of each flat prediction, counted as packed."""
        if self.packed is None:
            return torch.arange(self.rows, device="cpu").repeat(self.steps)
        return self._existing.nonzero()[:, 1]


def pick(flat: Tensor, counted: Tensor | None) -> Tensor:
    """Those of a flat tensor that count."""
    return flat if counted is None else flat.index_select(0, counted)


def _order(packed):
    """Which row of the caller's is where."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices
    return torch.arange(int(packed.batch_sizes[0]), device=packed.data.device)
