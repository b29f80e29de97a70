"""ElmanNetwork: the whole of it, recurrent layers, head, output activation and losses over time.

The layers are ``torch_bptt.RNN``; ``head`` evaluates head and loss. What is left is to bring
predictions and targets into one order and to choose those that count.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt.head import activations, check_loss, check_target, total_loss
from torch_bptt.rnn import RNN

IGNORED = -100  # a class that is none: torch.nn.functional.cross_entropy's ignore_index


class ElmanNetwork(nn.Module):
    """Elman's network: recurrent layers, a linear head on their states, an output activation.

        h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)
        o_t = h_t V^T + c
        yhat_t = g(o_t)

    Arguments:
        input_size: features of the input, I > 0.
        hidden_size: features of the state, H > 0.
        output_size: features of the prediction, or classes, K > 0.
        output_activation: g, one of 'identity', 'sigmoid', 'softmax'.
        many_to_one: one prediction for each row, from the state after its last step (with
            bidirectional, from the final states of both directions), instead of one at every step.
        options: those of ``torch_bptt.RNN`` from num_layers on, by name. bias=False leaves out c,
            too; device and dtype are also those of the head.
    Attributes:
        rnn: the recurrent layers, a ``torch_bptt.RNN``.
        head: V and c, a ``torch.nn.Linear`` of (K, D*H) and (K,).
    Raises:
        ValueError, TypeError: an argument makes no sense.
    Example:
        >>> network = ElmanNetwork(10, 20, 4, output_activation="softmax", num_layers=2)
        >>> x, classes = torch.randn(5, 3, 10), torch.randint(4, (5, 3))
        >>> prediction, h_n = network(x)
        >>> prediction.shape, h_n.shape
        (torch.Size([5, 3, 4]), torch.Size([2, 3, 20]))
        >>> loss, h_n = network.loss(x, classes, loss="cross_entropy")
        >>> loss.backward()

    Source:
        Elman (1990), Finding structure in time.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        output_activation: str = "identity",
        many_to_one: bool = False,
        **options: object,
    ) -> None:
        super().__init__()
        checks.check_choice(
            "ElmanNetwork", "output_activation", output_activation, tuple(activations)
        )
        checks.check_count("ElmanNetwork", "output_size", output_size)
        if not isinstance(many_to_one, bool):
            raise TypeError(f"ElmanNetwork: many_to_one must be a bool, got {many_to_one!r}")
        self.output_activation = output_activation
        self.many_to_one = many_to_one
        self.rnn = RNN(input_size, hidden_size, **options)
        self.head = nn.Linear(
            hidden_size * self._directions,
            output_size,
            bias=self.rnn.bias,
            device=options.get("device"),
            dtype=options.get("dtype"),
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | int | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Predict.

        Arguments:
            input, hx, lengths, reset: those of ``torch_bptt.RNN.forward``.
        Returns:
            prediction: yhat, with K features: (T, B, K), or as input has it; past the end of a row
                it is g(c). With many_to_one (B, K), or (K,) for one sequence, rows in the caller's
                order; a row of length 0 is predicted from its hx.
            h_n: the final state of each layer and direction.
        Raises:
            ValueError, TypeError, RuntimeError: what ``torch_bptt.RNN.forward`` raises.
        """
        states, h_n = self._states(input, hx, lengths, reset)
        g = activations[self.output_activation]
        if isinstance(states, PackedSequence):
            return states._replace(data=g(self.head(states.data))), h_n
        return g(self.head(states)), h_n

    def loss(
        self,
        input: Tensor | PackedSequence,
        target: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        loss: str = "mse",
        reduction: str = "mean",
        lengths: Sequence[int] | Tensor | int | None = None,
        reset: Tensor | None = None,
        mask: Tensor | PackedSequence | None = None,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of the predictions, without ever holding all of them.

        Head and loss are evaluated a chunk of predictions at a time, forward and back. (All at once
        under torch.func, in forward mode, in torch.compile, and for second derivatives.) With
        K outputs, o and yhat as in the class, one prediction costs

        ======================  =======================================================
        'mse'                   1/K sum_k (yhat_k - y_k)^2
        'half_squared_error'    1/2 sum_k (yhat_k - y_k)^2
        'cross_entropy'         -log softmax(o)_y, or -sum_k y_k log softmax(o)_k
        'binary_cross_entropy'  -1/K sum_k y_k log sigmoid(o_k) + (1 - y_k) log sigmoid(-o_k)
        ======================  =======================================================

        Both entropies are computed from o, with the output activation that belongs to them
        ('softmax', 'sigmoid') as well as with 'identity', where the prediction is o itself.

        A prediction counts if its step exists (``lengths``, a PackedSequence), ``mask`` is true
        there and its class is not -100 (torch.nn.functional.cross_entropy's ignore_index). The
        target of one that does not count is not read: it may be anything, NaN too.

        Arguments:
            input, hx, lengths, reset: those of ``torch_bptt.RNN.forward``.
            target: y, shaped as the prediction and of its dtype (float32 will do where that is
                narrower). For 'cross_entropy' int64 classes, shaped as the prediction without its
                last dimension, or probabilities. Beside a PackedSequence one packed alike, or
                padded, (T, B, ...), with rows in the order before sorting.
            loss: which one, as above.
            reduction: 'sum' over the predictions that count, of all steps and rows; 'mean', their
                sum divided by their number, T B if all count; 'last', the mean over rows of the
                last prediction of each that counts.
            mask: bool, true where a prediction counts; shaped, or packed, as int64 classes are.
            chunk: predictions evaluated at a time; None chooses so that they take about 4 MB.
        Returns:
            loss: a scalar, in float32 where the network is narrower. NaN for the mean of nothing.
            h_n: the final state of each layer and direction.
        Raises:
            ValueError, TypeError, RuntimeError: an argument does not fit; IndexError: a class does
                not exist. Also what ``torch_bptt.RNN.forward`` raises.
        """
        weight, bias = self.head.weight, self.head.bias
        check_loss(loss, self.output_activation)
        reductions = ("mean", "sum") if self.many_to_one else ("mean", "sum", "last")
        checks.check_choice("loss", "reduction", reduction, reductions)
        if chunk is not None:
            checks.check_count("loss", "chunk", chunk)
        layout = self._layout(input)
        y = layout.data("target", target)
        y = layout.flat("target", target, check_target(loss, y.dtype, y.requires_grad, weight))
        if y.device != weight.device:
            raise RuntimeError(
                "loss: target must be on the device of the network, "
                f"expected {weight.device}, got {y.device}"
            )
        counted = layout.counted(y, mask, lengths, last=reduction == "last")
        states, h_n = self._states(input, hx, lengths, reset)
        states = layout.flat_states(states)
        if counted is not None:
            states, y = states.index_select(0, counted), y.index_select(0, counted)
        total = total_loss(states, weight, bias, y, loss, self.output_activation, chunk)
        if reduction == "sum":
            return total, h_n
        return total / ((y != IGNORED).sum() if y.dtype == torch.int64 else len(y)), h_n

    def _layout(self, input):
        rnn = self.rnn
        rows = checks.check_input(input, rnn.weight_ih_l0, rnn.input_size, rnn.batch_first)
        if isinstance(input, PackedSequence):
            return Layout(len(input.batch_sizes), rows, self.many_to_one, packed=input)
        steps = input.shape[1 if rnn.batch_first and input.dim() == 3 else 0]
        return Layout(steps, rows, self.many_to_one, rnn.batch_first, input.dim() == 2)

    def _states(self, input, hx, lengths, reset):
        """What the head reads, and h_n."""
        output, h_n = self.rnn(input, hx, lengths=lengths, reset=reset)
        if not self.many_to_one:
            return output, h_n
        return torch.cat(h_n[-self._directions :].unbind(0), -1), h_n

    @property
    def _directions(self):
        return 2 if self.rnn.bidirectional else 1

    def extra_repr(self):
        return f"output_activation={self.output_activation}, many_to_one={self.many_to_one}"


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

    def flat_states(self, states: Tensor | PackedSequence) -> Tensor:
        """What the head reads, flat."""
        if isinstance(states, PackedSequence):
            return states.data
        if self.batch_first and not self.one and not self.many_to_one:
            states = states.transpose(0, 1)
        return states.reshape(-1, states.shape[-1])

    def counted(self, target, mask, lengths, *, last: bool) -> Tensor | None:
        """Which of the flat predictions to evaluate; None for all.

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
            lengths = checks.check_lengths(lengths, self.steps, self.rows)
            conditions.append((torch.arange(self.steps)[:, None] < lengths).flatten())
        if last and target.dtype == torch.int64:  # else its loss, zero, may be computed
            conditions.append(target != IGNORED)
        if not conditions and not last:
            return None
        counts = torch.ones(len(target), dtype=torch.bool, device=target.device)
        for condition in conditions:
            counts &= condition.to(counts.device)
        place = counts.nonzero().squeeze(1)
        if not last:
            return place
        row = self._row.to(place.device).index_select(0, place)
        latest = place.new_full((self.rows,), -1).scatter_reduce(0, row, place, "amax")
        return latest[latest >= 0]

    @property
    def _existing(self):
        """(T, B), rows as packed."""
        sizes = self.packed.batch_sizes
        return (torch.arange(self.rows) < sizes[:, None]).to(self.packed.data.device)

    @property
    def _row(self):
        """Of each flat prediction, counted as packed."""
        if self.packed is None:
            return torch.arange(self.rows).repeat(self.steps)
        return self._existing.nonzero()[:, 1]


def _order(packed):
    """Which row of the caller's is where."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices
    return torch.arange(int(packed.batch_sizes[0]), device=packed.data.device)
