"""The specification: the four operators as loops over time, one line per equation.

Nothing here is fast. Every function has the signature, the arguments and the results of the
operator of the same name in ``torch.ops.torch_bptt``, which is tested against it; this file itself
is tested against autograd and torch.nn.RNN. It imports torch alone and computes in the dtype it is
given.

    forward   p_t = k_t h_{t-1},   h_t = (1-a) p_t + a f(x_t W_ih^T + b_ih + p_t W_hh^T + b_hh)
    adjoint   d_t = g_t + k_{t+1} [ (1-a) d_{t+1} + (G_{t+1} d_{t+1}) W_hh ]
    tangent   q_t = c_t + k_t [ (1-a) q_{t-1} + G_t (q_{t-1} W_hh^T) ]

where G_t = a f'(z_t), elementwise, and z_t is the argument of f.

Shapes, everywhere: T steps, B batch rows, I input size, H hidden size. "(T, B, H) or (N, H)" means
dense, or packed as in torch.nn.utils.rnn.PackedSequence: batch_sizes (T,) holds the number of rows
that exist at each step, positive and never increasing, and N is their sum; B is then
batch_sizes[0]. (B, H) without batch_sizes is a single step. A "state" is one step with as many
dimensions: (1, B, H) where rows are dense, else (B, H).

To add an activation, add a line to ``activations``.
"""

import torch

# name -> (value f(z), slope f'(z) from the output y = f(z)). The slope of relu at NaN is 1, so that
# NaN is not hidden by a zero.
activations = {
    "tanh": (torch.tanh, lambda y: 1 - y * y),
    "relu": (torch.relu, lambda y: (~(y <= 0)).to(y.dtype)),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "identity": (lambda z: z, torch.ones_like),
}


class _Timeline:
    """Which rows exist at a step, the order of the steps, and what crosses from one to the next.

    ``order`` lists t in processing order: upward, or downward when reverse. A (B, H) state that
    belongs to all rows is updated with ``replace``, which leaves alone the rows that do not exist
    at the step: before their first step those still hold h0, after their last one they hold the
    final state, whichever way time runs.
    """

    def __init__(self, data, batch_sizes, keep, reverse, truncate=0):
        self.dense = data.dim() == 3
        if batch_sizes is not None:
            self.sizes = batch_sizes.tolist()
        else:
            self.sizes = [data.shape[1]] * data.shape[0] if self.dense else [data.shape[0]]
        self.batch = data.shape[1] if self.dense else self.sizes[0] if self.sizes else 0
        self.order = range(len(self.sizes))[:: -1 if reverse else 1]
        self.keep, self.reverse, self.truncate = keep, reverse, truncate

    def split(self, data):
        """(T, B, F) or (N, F) -> T tensors (rows of the step, F)."""
        return data.unbind(0) if self.dense else data.split(self.sizes)

    def join(self, steps, like):
        """The inverse of split, from t -> (rows of the step, F); ``like`` serves where T = 0."""
        if not steps:
            return like.new_zeros(*like.shape)
        steps = [steps[t] for t in sorted(steps)]
        return torch.stack(steps) if self.dense else torch.cat(steps)

    def start(self, state, like):
        """The state of all rows before their first step as (B, H): the one given, or zeros."""
        if state is None:
            return like.new_zeros(self.batch, like.shape[-1])
        return state.squeeze(0) if self.dense else state

    def end(self, state):
        """The inverse of start; a tensor of its own."""
        return state.unsqueeze(0).clone() if self.dense else state.clone()

    def replace(self, state, rows):
        return torch.cat([rows, state[len(rows) :]])

    def keeps(self, t, state):
        """k_t state: rows (rows of the step, F) that restart before step t become zero."""
        if self.keep is None:
            return state
        return torch.where(self.keep[t, : len(state), None], state, 0)

    def links(self, t, state):
        """As keeps, and zero where truncation cuts: before a row's own steps k, 2k, ..., too."""
        if self.truncate:
            lengths = [sum(row < size for size in self.sizes) for row in range(len(state))]
            own_steps = [length - 1 - t if self.reverse else t for length in lengths]
            uncut = torch.tensor([[s == 0 or s % self.truncate > 0] for s in own_steps])
            state = torch.where(uncut.to(state.device), state, 0) if own_steps else state
        return self.keeps(t, state)


def _leak(alpha, state, drive):
    """(1-a) state + drive, where a = 1 forgets the state even if it is infinite."""
    return drive if alpha == 1 else (1 - alpha) * state + drive


def rnn_forward(
    x,
    h0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    activation,
    batch_sizes=None,
    keep=None,
    alpha=1.0,
    reverse=False,
):
    """Run one Elman layer over a whole sequence, in one direction.

        p_t = k_t h_{t-1}
        h_t = (1-a) p_t + a f(x_t W_ih^T + b_ih + p_t W_hh^T + b_hh)

    Arguments:
        x: input, (T, B, I) or (N, I), any floating dtype.
        h0: state before a row's first step in processing order; None means zeros.
        weight_ih, weight_hh, bias_ih, bias_hh: (H, I), (H, H), (H,) and (H,); a bias may be None.
        batch_sizes: (T,) int64 on the CPU; None means dense.
        keep: k, (T, B) bool; False lets a row start from zero at step t, dropping h0 too. None
            means all True.
        activation: a name in ``activations``.
        alpha: a in (0, 1]; 1 is Elman's network, less a leaky one.
        reverse: process t downward; the state then arrives at step t from t+1.
    Returns:
        h: every state, (T, B, H) or (N, H).
        h_n: the state after each row's last step in processing order.
        f: f(z_t), shaped as h, when alpha != 1; otherwise, being h, an empty (0,) tensor.
    Source:
        Elman (1990), Finding structure in time.
    """
    time = _Timeline(x, batch_sizes, keep, reverse)
    value, _ = activations[activation]
    x_steps, h, f = time.split(x), {}, {}
    like = x.new_empty(*x.shape[:-1], len(weight_hh))
    state = time.start(h0, like)
    for t in time.order:
        p = time.keeps(t, state[: time.sizes[t]])
        z = x_steps[t] @ weight_ih.T + p @ weight_hh.T
        for bias in (bias_ih, bias_hh):
            z = z if bias is None else z + bias
        f[t] = value(z)
        h[t] = _leak(alpha, p, alpha * f[t])
        state = time.replace(state, h[t])
    return time.join(h, like), time.end(state), time.join(f, like) if alpha != 1 else x.new_empty(0)


def rnn_backward(
    grad_h,
    grad_h_n,
    x,
    h0,
    h,
    f,
    weight_ih,
    weight_hh,
    activation,
    wanted,
    batch_sizes=None,
    keep=None,
    alpha=1.0,
    reverse=False,
    truncate=0,
    clip=None,
):
    """Backpropagate through time: the gradients of rnn_forward, by hand.

        d = adjoint(grad_h) with d_T = grad_h_n,    delta_t = a f'(z_t) d_t
        grad_x = delta W_ih    grad_weight_ih = sum delta_t^T x_t    grad_bias = sum delta_t
        grad_h0 = d_{-1}       grad_weight_hh = sum delta_t^T p_t

    Arguments:
        grad_h, grad_h_n: gradients of h, (T, B, H) or (N, H), and of the state h_n; None means
            zeros.
        x, h0, weight_ih, weight_hh and the options: as given to rnn_forward.
        h, f: as returned by it; f may be None where alpha is 1.
        truncate: k > 0 cuts the gradient before a row's own steps k, 2k, ...; 0 never does. See
            adjoint_scan.
        clip: c clamps every d_t to [-c, c]; dh0 is not clamped. None clamps nothing.
        wanted: five bools, which gradients to return.
    Returns:
        grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, shaped as their inputs; (0,)
        where not wanted.
    Source:
        Werbos (1990), Backpropagation through time: what it does and how to do it; the clamp,
        Graves (2013), Generating sequences with recurrent neural networks.
    """
    time = _Timeline(h, batch_sizes, keep, reverse, truncate)
    _, slope = activations[activation]
    gate = alpha * slope(h if alpha == 1 else f)
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    d, grad_h0 = _adjoint_loop(time, grad_h, grad_h_n, gate, weight_hh, alpha, clip)

    h_steps, p, state = time.split(h), {}, time.start(h0, h)
    for t in time.order:
        p[t] = time.keeps(t, state[: time.sizes[t]])
        state = time.replace(state, h_steps[t])

    x, p, delta = (rows.flatten(0, -2) for rows in (x, time.join(p, h), gate * d))
    grads = (
        (delta @ weight_ih).view(*h.shape[:-1], x.shape[-1]),
        grad_h0,
        delta.T @ x,
        delta.T @ p,
        delta.sum(0),
    )
    return tuple(grad if want else h.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


def adjoint_scan(
    g,
    gate,
    weight_hh,
    batch_sizes=None,
    keep=None,
    alpha=1.0,
    reverse=False,
    truncate=0,
    clip=None,
):
    """Carry gradients against processing order: the linear loop of every backward pass.

        d_t = clamp( g_t + k_{t+1} [ (1-a) d_{t+1} + (G_{t+1} d_{t+1}) W_hh ] ),    d_T = 0

    Here t counts a row's own steps in processing order.

    Arguments:
        g: what reaches each state from outside, (T, B, H) or (N, H).
        gate: G, shaped as g.
        weight_hh: (H, H).
        truncate: k > 0 takes k_{t+1} as 0 where t+1 = k, 2k, ...; h0 gets the gradient of the first
            k steps.
        clip: c clamps every d_t to [-c, c], but not d_{-1}, so that two calls on two halves equal
            one call.
        batch_sizes, keep, alpha, reverse: as in rnn_forward.
    Returns:
        d: shaped as g.
        d0: d_{-1}, the recursion once more without g, a state.
    Source:
        Werbos (1990), Backpropagation through time. It is the transpose of tangent_scan.
    """
    time = _Timeline(g, batch_sizes, keep, reverse, truncate)
    return _adjoint_loop(time, g, None, gate, weight_hh, alpha, clip)


def _adjoint_loop(time, g, arriving, gate, weight_hh, alpha, clip):
    """adjoint_scan with d_T = arriving, a state: the gradient of h_n, whose link is never cut."""
    g_steps, gates, d = time.split(g), time.split(gate), {}
    state = time.start(arriving, g)
    for t in reversed(time.order):
        d[t] = g_steps[t] + state[: time.sizes[t]]
        d[t] = d[t] if clip is None else d[t].clamp(-clip, clip)
        leaving = _leak(alpha, d[t], (gates[t] * d[t]) @ weight_hh)
        state = time.replace(state, time.links(t, leaving))
    return time.join(d, g), time.end(state)


def tangent_scan(
    c,
    q0,
    gate,
    weight_hh,
    batch_sizes=None,
    keep=None,
    alpha=1.0,
    reverse=False,
    truncate=0,
):
    """Carry perturbations in processing order: the linear loop of forward mode.

        q_t = c_t + k_t [ (1-a) q_{t-1} + G_t (q_{t-1} W_hh^T) ],    q_{-1} = q0

    Here t counts a row's own steps in processing order.

    Arguments:
        c: what disturbs each state from outside, (T, B, H) or (N, H).
        q0: disturbance of the state h0; None means zeros.
        gate: G, shaped as c.
        weight_hh: (H, H).
        truncate: k > 0 takes k_t as 0 where t = k, 2k, ..., as detaching the state does.
        batch_sizes, keep, alpha, reverse: as in rnn_forward.
    Returns:
        q: shaped as c.
    Source:
        Williams and Zipser (1989), A learning algorithm for continually running fully recurrent
        neural networks.
    """
    time = _Timeline(c, batch_sizes, keep, reverse, truncate)
    c_steps, gates, q = time.split(c), time.split(gate), {}
    state = time.start(q0, c)
    for t in time.order:
        arriving = time.links(t, state[: time.sizes[t]])
        q[t] = c_steps[t] + _leak(alpha, arriving, gates[t] * (arriving @ weight_hh.T))
        state = time.replace(state, q[t])
    return time.join(q, c)
