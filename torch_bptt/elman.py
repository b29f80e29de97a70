"""ElmanNetwork: the whole of it, recurrent layers, head, output activation and losses over time.

The layers are ``torch_bptt.RNN``; ``head`` evaluates head and loss. What is left is to bring
predictions and targets into one order and to choose those that count.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt.autograd import transformed
from torch_bptt.head import IGNORED, Criterion, activations, total_loss
from torch_bptt.layout import Layout, pick
from torch_bptt.rnn import RNN, is_plain
from torch_bptt.stretches import total_in_stretches


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
        head: V and c, a ``torch.nn.Linear`` of (K, D*H) and (K,); or what it was replaced by, any
            module that makes o of states.
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
        checks.check_bool("ElmanNetwork", "many_to_one", many_to_one)
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
        under torch.func, in forward mode, in torch.compile, and for second derivatives.) That is
        so for a head that is an nn.Linear, parametrized or not, without hooks; any other is run
        as forward runs it, on all states, and then all of o is held. With K outputs, o and yhat
        as in the class, one prediction costs

        ======================  =======================================================
        'mse'                   1/K sum_k (yhat_k - y_k)^2
        'half_squared_error'    1/2 sum_k (yhat_k - y_k)^2
        'cross_entropy'         -log softmax(o)_y, or -sum_k y_k log softmax(o)_k
        'binary_cross_entropy'  -1/K sum_k y_k log sigmoid(o_k) + (1 - y_k) log sigmoid(-o_k)
        ======================  =======================================================

        Both entropies are computed from o, with the output activation that belongs to them
        ('softmax', 'sigmoid') as well as with 'identity', where the prediction is o itself.

        A prediction counts if its step exists (``lengths``, a PackedSequence), ``mask`` is true
        there and its class is not -100 (torch.nn.functional.cross_entropy's ignore_index). With
        many_to_one that of a row of length 0 does, too. The target of one that does not count is
        not read: it may be anything, NaN too.

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
            chunk: predictions evaluated at a time (of another head than nn.Linear: taken from o to
                the loss); None chooses so that they take about 4 MB.
        Returns:
            loss: a scalar, in float32 where the network is narrower. NaN for the mean of nothing.
            h_n: the final state of each layer and direction.
        Raises:
            ValueError, TypeError, RuntimeError: an argument does not fit, or head does not make one
                prediction of each state; IndexError: a class does not exist. Also what
                ``torch_bptt.RNN.forward`` raises.
        """
        criterion = Criterion(loss, self.output_activation, chunk)
        criterion.check()
        reductions = ("mean", "sum") if self.many_to_one else ("mean", "sum", "last")
        checks.check_choice("loss", "reduction", reduction, reductions)
        layout = self._layout(input)
        weight = bias = rows = None  # rows: what total_loss starts from, states or, without V, o
        if is_plain(self.head, nn.Linear):
            weight, bias = self.head.weight, self.head.bias
        else:
            rows, h_n = self._outputs(layout, input, hx, lengths, reset)
        y = layout.data("target", target)
        features = criterion.check_target(y, weight.mT if rows is None else rows)
        y = layout.flat("target", target, features)
        counted = layout.counted(y, mask, lengths, last=reduction == "last")
        if rows is None and self._in_stretches(input, lengths):
            total, h_n = total_in_stretches(
                self.rnn, weight, bias, layout, input, hx, lengths, reset, y, counted, criterion
            )
        else:
            if rows is None:
                states, h_n = self._states(input, hx, lengths, reset)
                rows = layout.flat_states(states)
            total = total_loss(pick(rows, counted), pick(y, counted), weight, bias, criterion)
        if reduction == "sum":
            return total, h_n
        y = pick(y, counted)
        return total / ((y != IGNORED).sum() if y.dtype == torch.int64 else len(y)), h_n

    def _layout(self, input):
        rnn = self.rnn
        like = next(rnn.parameters())  # to look at a weight may be to compute it
        rows = checks.check_input(input, like, rnn.input_size, rnn.batch_first)
        if isinstance(input, PackedSequence):
            return Layout(len(input.batch_sizes), rows, self.many_to_one, packed=input)
        steps = input.shape[1 if rnn.batch_first and input.dim() == 3 else 0]
        return Layout(steps, rows, self.many_to_one, rnn.batch_first, input.dim() == 2)

    def _states(self, input, hx, lengths, reset):
        """What the head reads, and h_n."""
        need_output = not self.many_to_one or self.rnn._observer is not None
        output, h_n = self.rnn(input, hx, lengths=lengths, reset=reset, need_output=need_output)
        if self.many_to_one:
            output = torch.cat(h_n[-self._directions :].unbind(0), -1)
        return output, h_n

    def _outputs(self, layout, input, hx, lengths, reset):
        """o of a head that may be any module, flat, and h_n: what forward computes."""
        states, h_n = self._states(input, hx, lengths, reset)
        states = states.data if isinstance(states, PackedSequence) else states
        o = self.head(states)
        got = tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__
        if got[:-1] != states.shape[:-1] or len(got) != states.dim():
            expected = ", ".join([*map(str, states.shape[:-1]), "K"])
            raise ValueError(
                "loss: head must return one prediction for each state, "
                f"expected a tensor ({expected}), got {got}"
            )
        return layout.flat_states(o), h_n

    def _in_stretches(self, input, lengths):
        """Whether head and loss can join what ``checkpoint`` does to the layers."""
        rnn = self.rnn
        if rnn.checkpoint is None or self.many_to_one or transformed():
            return False
        # The reverse direction starts at a row's last step, so both need the states of all steps.
        # With truncate a stretch may start with a cut, which would also cut off the h_n of rows
        # that ended before; of a packed input they are not in it. An empty input has none.
        cut_off = rnn.truncate is not None and lengths is not None
        nothing = (input.data if isinstance(input, PackedSequence) else input).numel() == 0
        # One mask for all of a sequence, and whoever sees a whole call, are no matter of stretches.
        whole = rnn._observer is not None or not is_plain(rnn, RNN)
        whole |= rnn.training and rnn.recurrent_dropout > 0
        return not (rnn.bidirectional or cut_off or nothing or whole)

    @property
    def _directions(self):
        return 2 if self.rnn.bidirectional else 1

    def extra_repr(self):
        return f"output_activation={self.output_activation}, many_to_one={self.many_to_one}"
