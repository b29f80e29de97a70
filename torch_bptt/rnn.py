"""RNN and RNNCell: torch.nn's modules of the same names, running on the fused kernels.

They own parameters and check what callers hand over in the words of torch.nn; ``functional`` does
the rest.
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.proxy import TraceError
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from torch_bptt import checks
from torch_bptt.autograd import Options
from torch_bptt.functional import NO_DRAWS, Draws, Layer, layer, run


class RNN(nn.RNNBase):
    """An Elman RNN, layers stacked, one or both directions: torch.nn.RNN with another import.

        h_t = (1 - alpha) h_{t-1} + alpha f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)

    The arguments up to dtype, the parameters, their names, order and initial values for a given
    seed, the state_dict and the errors are those of torch.nn.RNN. Keyword-only options go beyond it
    and are off by default.

    Arguments:
        input_size: features of the input, I > 0.
        hidden_size: features of the state, H > 0.
        num_layers: layers stacked on one another, L > 0.
        nonlinearity: f, one of 'tanh', 'relu', 'sigmoid', 'identity'.
        bias: False leaves out b_ih and b_hh.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...); hx and h_n are not.
        dropout: probability, in [0, 1], that an output of any layer but the last is zeroed while
            training.
        bidirectional: D = 2: every layer also runs from the last step to the first, and outputs are
            concatenated.
        device, dtype: of the parameters.
        alpha: the leak, a number in (0, 1], for every unit and layer; or a tensor of such, () for
            all, (H,) for the units of every layer, or (L*D, H) for those of each layer and
            direction. A tensor becomes a buffer, an nn.Parameter a parameter, which is learned;
            docs/leaky-units.md says how to keep it within bounds.
        learn_h0: True adds a parameter h0, at first zero: the states before the first step when hx
            is None, and after a reset.
        truncate, clip_grad_h, checkpoint: truncated backpropagation, clipping of the gradient of
            every state, and the steps between states kept for backpropagation.
        recurrent_dropout, noise: while training, probability that a unit is zero in the recurrent
            products of a sequence, and standard deviation of Gaussian noise on the argument of f.
            For these and the line before see ``torch_bptt.functional.rnn``. They apply to every
            layer.
    Attributes:
        weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k}, bias_hh_l{k}: (H, I or D*H), (H, H), (H,) and
            (H,) of layer k; with the ending _reverse, those of the other direction.
        h0: (L*D, H) with learn_h0, ordered as hx.
        mode: 'RNN_TANH', 'RNN_RELU', 'RNN_SIGMOID' or 'RNN_IDENTITY'.
    Raises:
        ValueError, TypeError: an argument makes no sense.
    Example:
        >>> rnn = RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))

    Source:
        Elman (1990), Finding structure in time.
    """

    __jit_unused_properties__ = ("all_weights", "_flat_weights")

    # What torch.nn.RNN does not have, and the values that switch it off.
    _OPTIONS = {  # noqa: RUF012
        "alpha": 1.0,
        "learn_h0": False,
        "truncate": None,
        "clip_grad_h": None,
        "checkpoint": None,
        "recurrent_dropout": 0.0,
        "noise": 0.0,
    }

    # Sees every layer and direction of a call; set by diagnose.gradient_flow.
    _observer = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Tensor = 1.0,
        learn_h0: bool = False,
        truncate: int | None = None,
        clip_grad_h: float | None = None,
        checkpoint: bool | int | None = None,
        recurrent_dropout: float = 0.0,
        noise: float = 0.0,
        **unknown: object,
    ) -> None:
        if "proj_size" in unknown:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if unknown:
            raise TypeError(
                f"RNN.__init__() got an unexpected keyword argument {next(iter(unknown))!r}"
            )
        checks.check_nonlinearity(nonlinearity)
        checks.check_options("RNN", alpha, truncate, clip_grad_h, recurrent_dropout, noise)
        checks.check_bool("RNN", "learn_h0", learn_h0)
        checks.check_checkpoint("RNN", checkpoint, num_layers, 2 if bidirectional else 1)
        # RNNBase wants one of its own modes; all that it takes from it is the number of gates, one.
        super().__init__(
            "RNN_TANH",
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity
        self.mode = f"RNN_{nonlinearity.upper()}"
        states = (len(self._all_weights), hidden_size)
        if isinstance(alpha, Tensor):
            checks.check_alpha("RNN", alpha, ((), (hidden_size,), states))
            checks.check_constant_alpha("RNN", alpha)
            checks.check_alpha_values("RNN", alpha)
        if isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.learn_h0 = learn_h0
        if learn_h0:
            self.h0 = nn.Parameter(torch.zeros(states, device=device, dtype=dtype))
        self.truncate = truncate
        self.clip_grad_h = clip_grad_h
        self.checkpoint = checkpoint
        self.recurrent_dropout = recurrent_dropout
        self.noise = noise

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Sequence[int] | Tensor | int | None = None,
        reset: Tensor | None = None,
        need_output: bool = True,
    ) -> tuple[Tensor | PackedSequence | None, Tensor]:
        """Run all layers over a whole sequence.

        Arguments:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) for one sequence, or a
                PackedSequence.
            hx: states before the first step, (L*D, B, H), or (L*D, H) for one sequence, rows in the
                caller's order; layer 0 forward, layer 0 reverse, layer 1 forward, ... None means
                zeros, or with learn_h0 the learned ones.
            lengths: how many steps of each row exist, (B,) integers from 0 to T in any order.
            reset: (T, B) bool, (B, T) with batch_first: where rows start anew, from zeros or with
                learn_h0 from the learned states. Both directions treat a segment between resets as
                a sequence of its own. For both see ``torch_bptt.functional.rnn``.
            need_output: False returns None for the output, which then is not held either where no
                gradient is recorded or with checkpoint.
        Returns:
            output: the states of the last layer, (T, B, D*H) or as input has it; None without
                need_output.
            h_n: the final state of each layer and direction, shaped and ordered as hx.
        Raises:
            ValueError, RuntimeError: what torch.nn.RNN raises, and for lengths and reset TypeError
                or ValueError.
        """
        if is_fx_symbolic_tracing():
            given = {"lengths": lengths, "reset": reset}
            if need_output is not True:
                given["need_output"] = need_output
            node = _leaf(self, input, hx, **given)
            if node is not None:
                return node
        layers, options, draws, h0 = self._network()
        rows = checks.check_input(input, layers[0].weight_ih, self.input_size, self.batch_first, hx)
        if hx is not None:
            checks.check_stacked_hidden(input, hx, (len(layers), rows, self.hidden_size))
        elif h0 is not None:
            one = not isinstance(input, PackedSequence) and input.dim() == 2
            hx = h0 if one else h0.unsqueeze(1).expand(-1, rows, -1)
        return run(
            input, hx, layers, options, self.batch_first, draws, lengths, reset,
            self.checkpoint, need_output, self._observer,
        )  # fmt: skip

    def _network(self):
        """layers, options and draws as ``functional.run`` takes them, and the learned h0 or None.

        As they are now: parameters and parametrizations are looked up once, and not kept.
        """
        layers, h0 = self._layers(), None
        if self.learn_h0:
            h0 = self.h0
            layers = [own._replace(restart=h) for own, h in zip(layers, h0.unbind(), strict=True)]
        activation = self.mode.removeprefix("RNN_").lower()
        options = [
            Options(activation, reverse, self.truncate or 0, self.clip_grad_h)
            for reverse in ((False, True) if self.bidirectional else (False,))
        ]
        draws = NO_DRAWS
        if self.training and (self.dropout or self.recurrent_dropout or self.noise):
            draws = Draws(self.dropout, self.recurrent_dropout, self.noise)
        return layers, options, draws, h0

    def _layers(self):
        missing = () if self.bias else (None, None)
        layers = [Layer(*look_up(self, names), *missing) for names in self._all_weights]
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            alphas = alpha.unbind() if alpha.dim() == 2 else [alpha] * len(layers)
        elif alpha == 1:
            return layers
        else:
            alphas = [alpha] * len(layers)
        return [own._replace(alpha=a) for own, a in zip(layers, alphas, strict=True)]

    def reset_parameters(self):
        """Draw new weights and biases as torch.nn.RNN does; h0 becomes zero, alpha stays.

        After to_empty() a tensor alpha has no values to stay: they are to be copied into it.
        """
        others = {}
        for name, parameter in self.named_parameters():
            own = name.removeprefix("parametrizations.").split(".")[0]
            if own in ("alpha", "h0"):
                others[parameter] = (
                    torch.zeros_like(parameter) if own == "h0" else parameter.clone()
                )
        super().reset_parameters()
        with torch.no_grad():
            for parameter, value in others.items():
                parameter.copy_(value)

    @property
    def _flat_weights(self):
        """The parameters in order; looked up, not cached as in RNNBase, so never stale."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        """RNNBase assigns its cache; there is none here."""

    def _init_flat_weights(self):
        """Keep no weak references as RNNBase does: torch.utils.swap_tensors refuses tensors that
        have any, and a look-up needs none.
        """
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def flatten_parameters(self):
        """Do nothing, for those who call it on torch.nn.RNN: the kernels need no flat copy."""

    def extra_repr(self):
        options = {"nonlinearity": "tanh", **self._OPTIONS}
        changed = {name: getattr(self, name) for name in options}
        changed = {
            name: f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else value
            for name, value in changed.items()
            if isinstance(value, Tensor) or value != options[name]
        }
        return super().extra_repr() + "".join(f", {name}={v}" for name, v in changed.items())

    def __setstate__(self, state):
        own = {*state, *state["_parameters"], *state["_buffers"], *state["_modules"]}
        missing = {name: value for name, value in self._OPTIONS.items() if name not in own}
        if "parametrizations" in own and "alpha" in state["_modules"]["parametrizations"]:
            del missing["alpha"]
        super().__setstate__({**missing, **state})
        self._init_flat_weights()

    @classmethod
    def from_torch(cls, module: nn.RNN) -> "RNN":
        """The same network as ``module``, a torch.nn.RNN, on the fused kernels.

        The two share parameters, buffers and registered hooks (the very objects: optimizers stay
        valid, training one trains the other, the handle of a hook removes it from both); options
        and the training flag are copied. No random number is drawn.

        Raises:
            TypeError: module is not a torch.nn.RNN, or of a class derived from it, whose forward
                may be different. (One with parametrizations is accepted.)
        """
        return _as(cls, module, nn.RNN)

    def to_torch(self) -> nn.RNN:
        """The same network as a torch.nn.RNN, sharing what ``from_torch`` shares.

        Raises:
            ValueError: an option is in use that torch.nn.RNN does not have; the message names it.
        """
        expressible = {name: (value,) for name, value in self._OPTIONS.items()}
        expressible["nonlinearity"] = ("tanh", "relu")
        _check_expressible(self, "torch.nn.RNN", expressible)
        return _as(nn.RNN, self, RNN)

    def __prepare_scriptable__(self):
        return _for_script(self)


class RNNCell(nn.RNNCellBase):
    """One step of an Elman RNN: torch.nn.RNNCell with another import.

        h' = f(x W_ih^T + b_ih + h W_hh^T + b_hh)

    Arguments:
        input_size, hidden_size: features of the input, I, and of the state, H.
        bias: False leaves out b_ih and b_hh (they are then None).
        nonlinearity: f, one of 'tanh', 'relu', 'sigmoid', 'identity'; as in torch.nn.RNNCell
            checked by forward.
        device, dtype: of the parameters.
    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: (H, I), (H, H), (H,) and (H,).
    Example:
        >>> RNNCell(10, 20)(torch.randn(3, 10), torch.zeros(3, 20)).shape
        torch.Size([3, 20])

    Source:
        Elman (1990), Finding structure in time.
    """

    __constants__ = (*nn.RNNCellBase.__constants__, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Arguments:
            input: (B, I), or (I,) without a batch.
            hx: the state, (B, H) or (H,); None means zeros.
        Returns:
            The next state, (B, H) or (H,).
        Raises:
            ValueError: a wrong number of dimensions.
            RuntimeError: a wrong size, dtype or device; an unknown nonlinearity.
        """
        if is_fx_symbolic_tracing():
            node = _leaf(self, input, hx)
            if node is not None:
                return node
        weights = look_up(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        checks.check_cell(input, hx, *weights[:2], self.nonlinearity)
        batched = input.dim() == 2
        if not batched:
            input, hx = input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)
        h, _ = layer(input, hx, Layer(*weights), None, None, Options(self.nonlinearity))
        return h if batched else h.squeeze(0)

    @classmethod
    def from_torch(cls, module: nn.RNNCell) -> "RNNCell":
        """The same cell as module, a torch.nn.RNNCell, sharing what ``RNN.from_torch`` shares."""
        return _as(cls, module, nn.RNNCell)

    def to_torch(self) -> nn.RNNCell:
        """The same cell as a torch.nn.RNNCell, sharing what ``RNN.from_torch`` shares.

        Raises:
            ValueError: torch.nn.RNNCell does not have the nonlinearity.
        """
        _check_expressible(self, "torch.nn.RNNCell", {"nonlinearity": ("tanh", "relu")})
        return _as(nn.RNNCell, self, RNNCell)

    def __prepare_scriptable__(self):
        return _for_script(self)


def look_up(module, names):
    """The parameters of these names, as they are now.

    Not kept from one call to the next: functional_call, parametrizations and pruning replace them.
    The dictionary first, where a look-up takes an eighth of the time of getattr.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def plain_class(module):
    """The class of module, seen through parametrizations, which derive a new one per module."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def is_plain(module, cls):
    """Whether to call module is to run the forward of cls and nothing else: no hooks around it.

    Not in torch.compile, which runs hooks but does not show them.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = (
        module._forward_pre_hooks, module._forward_hooks,
        module._backward_pre_hooks, module._backward_hooks,
    )  # fmt: skip
    changed = any(hooks) or _has_any_global_hook() or "forward" in vars(module)
    return plain_class(module) is cls and not changed


def _as(cls, module, expected):
    """A ``cls`` with everything that belongs to module, which must be exactly an ``expected``.

    The dictionaries of parameters, buffers and submodules are copied, so that assigning a parameter
    to one module leaves the other alone; what they hold is shared, and so are the dictionaries of
    hooks, or handles would break.
    """
    if plain_class(module) is not expected:
        raise TypeError(
            f"module must be exactly a {expected.__module__}.{expected.__name__}, "
            f"got {type(module).__module__}.{type(module).__name__}"
        )
    hooks = module._load_state_dict_pre_hooks.values()
    if any(getattr(hook, "with_module", False) for hook in hooks):
        raise ValueError(
            "module must have no load_state_dict_pre_hook, as it is bound to the module it was "
            "registered on, got one: remove it, and register it again on the result"
        )
    state = {**vars(module), "_flat_weights": getattr(module, "_flat_weights", None)}
    state.pop("_flat_weight_refs", None)
    state["_compiled_call_impl"] = None  # of module.compile(): it would run module itself
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        state[name] = copy.copy(state[name])
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name != "__module__"}
        cls = type(type(module).__name__, (cls,), own)
    result = cls.__new__(cls)
    result.__setstate__(state)
    return result


def _leaf(module, input, hx, **options):
    """What torch.fx.symbolic_trace notes of a call: one node, as of the modules of torch.nn, with
    the arguments that are not None. A call that no proxy came into is not noted, but made.
    """
    proxy = next(_proxies((input, hx, *options.values())), None)
    if proxy is None:
        return None
    if getattr(proxy.tracer, "root", None) is module:
        name = type(module).__name__
        raise TraceError(
            f"{name} is a leaf, expected a module that contains it as what is traced, got {name} "
            "itself: trace nn.Sequential(module)"
        )
    args = (input,) if hx is None else (input, hx)
    options = {name: option for name, option in options.items() if option is not None}
    path = proxy.tracer.path_of_module(module)
    return proxy.tracer.create_proxy("call_module", path, args, options)


def _proxies(value):
    """All in value, a PackedSequence or a list of lengths among others."""
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _proxies(part)


def _for_script(module):
    """What torch.jit.script compiles: it knows no operators with derivatives in Python."""
    theirs = module.to_torch()
    warnings.warn(
        f"torch.jit.script compiles {type(module).__name__} as torch.nn.{type(theirs).__name__}, "
        "and puts that in its place in the model: torch_bptt.convert(model) undoes it",
        stacklevel=2,
    )
    return theirs


def _check_expressible(module, target, expressible):
    for name, values in expressible.items():
        value = getattr(module, name)
        if isinstance(value, Tensor) or value not in values:
            expected = " or ".join(map(repr, values))
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"to_torch: {name} must be {expected}, as {target} knows nothing else, got {got}"
            )
