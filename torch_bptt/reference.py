"""The specification: the four operators as loops over time, one line per equation.

Nothing here is fast. Every function has the signature, the arguments and the results of the
operator of the same name in ``torch.ops.torch_bptt``, which is tested against it; this file itself
is tested against autograd and torch.nn.RNN. It imports torch alone and computes in the dtype it is
given.

    forward   p_t = k_t h_{t-1},   h_t = (1-a) p_t + a f(x_t W_ih^T + b_ih + (m p_t) W_hh^T + b_hh)
    adjoint   d_t = g_t + k_{t+1} [ (1-a) d_{t+1} + m ((G_{t+1} d_{t+1}) W_hh) ]
    tangent   q_t = c_t + k_t [ (1-a) q_{t-1} + G_t ((m q_{t-1}) W_hh^T) ]

where G_t = a f'(z_t), elementwise, and z_t is the argument of f. With a state to restart from, r,
p_t is r where k_t is 0.

Shapes, everywhere: T steps, B batch rows, I input size, H hidden size. "(T, B, H) or (N, H)" means
dense, or packed as in torch.nn.utils.rnn.PackedSequence: batch_sizes (T,) holds the number of rows
that exist at each step, positive and never increasing, and N is their sum; B is then
batch_sizes[0]. (B, H) without batch_sizes is a single step. A "state" is one step with as many
dimensions: (1, B, H) where rows are dense, else (B, H).

To add an activation, add a line to ``activations``.
"""

import torch

__all__ = [
    "STOPPING", "activations", "adjoint_scan", "rnn_backward", "rnn_forward", "tangent_scan",
]  # fmt: skip

# name -> (value f(z), slope f'(z) from the output y = f(z)). The slope of relu at NaN is 1, so that
# NaN is not hidden by a zero.
activations = {
    "tanh": (torch.tanh, lambda y: 1 - y * y),
    "relu": (torch.relu, lambda y: (~(y <= 0)).to(y.dtype)),
    "sigmoid": (torch.sigmoid, lambda y: y * (1 - y)),
    "identity": (lambda z: z, torch.ones_like),
}
# Those whose slope of zero stops even what is infinite or NaN, as torch.relu's derivative does;
# elsewhere 0 * inf is NaN, as it is there.
STOPPING = frozenset({"relu"})


class _Timeline:
    """Which rows exist at a step, the order of the steps, and what crosses from one to the next.

    ``order`` lists t in processing order: upward, or downward when reverse. A (B, H) state that
    belongs to all rows is updated with ``replace``, which leaves alone the rows that do not exist
    at the step: before their first step those still hold h0, after their last one they hold the
    final state, whichever way time runs.
    """

    def __init__(self, data, batch_sizes, keep, reverse, truncate=0, mask=None):
        self.dense = data.dim() == 3
        if batch_sizes is not None:
            self.sizes = batch_sizes.tolist()
        else:
            self.sizes = [data.shape[1]] * data.shape[0] if self.dense else [data.shape[0]]
        self.batch = data.shape[1] if self.dense else self.sizes[0] if self.sizes else 0
        self.order = range(len(self.sizes))[:: -1 if reverse else 1]
        self.keep, self.reverse, self.truncate = keep, reverse, truncate
        self.mask = None if mask is None else self.start(mask, mask)

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

    def keeps(self, t, state, restart=None):
        """k_t state: rows (rows of the step, F) that restart before step t are replaced."""
        if self.keep is None:
            return state
        restart = 0 if restart is None else restart[: len(state)]
        return torch.where(self.keep[t, : len(state), None], state, restart)

    def restarts(self, t, state):
        """What keeps takes away: zero but for rows that restart before step t."""
        if self.keep is None:
            return torch.zeros_like(state)
        return torch.where(self.keep[t, : len(state), None], 0, state)

    def links(self, t, state, restart=None):
        """As keeps, and zero where truncation cuts: before a row's own steps k, 2k, ..., too."""
        if self.truncate:
            lengths = [sum(row < size for size in self.sizes) for row in range(len(state))]
            own_steps = [length - 1 - t if self.reverse else t for length in lengths]
            uncut = torch.tensor(
                [[s == 0 or s % self.truncate > 0] for s in own_steps], device="cpu"
            )
            state = torch.where(uncut.to(state.device), state, 0) if own_steps else state
        return self.keeps(t, state, restart)

    def masks(self, state):
        """m state, for the rows that exist."""
        return state if self.mask is None else self.mask[: len(state)] * state


def _leak(alpha, state, drive):
    """(1-a) state + drive, where no leak forgets the state even if it is infinite."""
    return drive if alpha is None else (1 - alpha).to(state.dtype) * state + drive


def _scaled(alpha, y):
    return y if alpha is None else alpha.to(y.dtype) * y


def _passed(gate, v, stops):
    """gate v, where a gate that stops lets nothing through."""
    return torch.where(gate == 0, 0, gate * v) if stops else gate * v


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
    alpha=None,
    restart=None,
    mask=None,
    noise=None,
    reverse=False,
):
    """Run one Elman layer over a whole sequence, in one direction.

        p_t = k_t h_{t-1} + (1 - k_t) r
        h_t = (1-a) p_t + a f(x_t W_ih^T + b_ih + noise_t + (m p_t) W_hh^T + b_hh)

    Arguments:
        x: input, (T, B, I) or (N, I), any floating dtype.
        h0: state before a row's first step in processing order; None means zeros.
        weight_ih, weight_hh, bias_ih, bias_hh: (H, I), (H, H), (H,) and (H,); a bias may be None.
        batch_sizes: (T,) int64 on the CPU; None means dense.
        keep: k, (T, B) bool; False lets a row restart before step t, dropping h0 too. None means
            all True.
        activation: a name in ``activations``.
        alpha: a of each unit, (H,), in the type x is computed in (float32 where x is narrower);
            less than 1 for leaky units. None means Elman's network, all ones.
        restart: r, a state; None means zeros.
        mask: m, a state: factors of what enters the recurrent product. None means ones.
        noise: shaped as h; None means zeros.
        reverse: process t downward; the state then arrives at step t from t+1.
    Returns:
        h: every state, (T, B, H) or (N, H).
        h_n: the state after each row's last step in processing order.
        f: f(z_t), shaped as h, with an alpha; otherwise, being h, an empty (0,) tensor.
    Source:
        Elman (1990), Finding structure in time.
    """
    time = _Timeline(x, batch_sizes, keep, reverse, mask=mask)
    value, _ = activations[activation]
    x_steps, h, f = time.split(x), {}, {}
    like = x.new_empty(*x.shape[:-1], len(weight_hh))
    state = time.start(h0, like)
    start = None if restart is None else time.start(restart, like)
    noise_steps = None if noise is None else time.split(noise)
    for t in time.order:
        p = time.keeps(t, state[: time.sizes[t]], start)
        z = x_steps[t] @ weight_ih.T + time.masks(p) @ weight_hh.T
        for bias in (bias_ih, bias_hh):
            z = z if bias is None else z + bias
        f[t] = value(z if noise is None else z + noise_steps[t])
        h[t] = _leak(alpha, p, _scaled(alpha, f[t]))
        state = time.replace(state, h[t])
    h_n = time.end(state)
    return time.join(h, like), h_n, x.new_empty(0) if alpha is None else time.join(f, like)


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
    alpha=None,
    restart=None,
    mask=None,
    reverse=False,
    truncate=0,
    clip=None,
    parts=0,
):
    """Backpropagate through time: the gradients of rnn_forward, by hand.

        d = adjoint(grad_h) with d_T = grad_h_n,    delta_t = a f'(z_t) d_t
        grad_x = delta W_ih    grad_weight_ih = sum delta_t^T x_t    grad_bias = sum delta_t
        grad_h0 = d_{-1}       grad_weight_hh = sum delta_t^T (m p_t)
        grad_alpha = sum d_t (f(z_t) - p_t)    grad_restart: what the adjoint sends back to r

    Arguments:
        grad_h, grad_h_n: gradients of h, (T, B, H) or (N, H), and of the state h_n; None means
            zeros.
        x, h0, weight_ih, weight_hh and the options: as given to rnn_forward.
        h, f: as returned by it; f may be None without alpha.
        truncate: k > 0 cuts the gradient before a row's own steps k, 2k, ...; 0 never does. See
            adjoint_scan.
        clip: c clamps every d_t to [-c, c]; dh0 is not clamped. None clamps nothing.
        parts: n > 0 takes the sums for every n-th row of the batch by itself: row b counts to part
            b % n. 0 takes one over all of them.
        wanted: eight bools, which of the results to return.
    Returns:
        grad_x, grad_h0, grad_weight_ih, grad_weight_hh, grad_bias, grad_alpha, grad_restart, shaped
        as their inputs, and norms, the length of d_t of every row, shaped as x without its
        features; (0,) where not wanted. The sums, which are those of weights, bias and alpha, have
        parts in front where there are any.
    Source:
        Werbos (1990), Backpropagation through time: what it does and how to do it; the clamp,
        Graves (2013), Generating sequences with recurrent neural networks.
    """
    time = _Timeline(h, batch_sizes, keep, reverse, truncate, mask)
    _, slope = activations[activation]
    y = h if alpha is None else f
    gate, stops = _scaled(alpha, slope(y)), activation in STOPPING
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    d, grad_h0, grad_restart = _adjoint_loop(
        time, grad_h, grad_h_n, gate, weight_hh, alpha, clip, stops
    )

    h_steps, p, entering, state = time.split(h), {}, {}, time.start(h0, h)
    start = None if restart is None else time.start(restart, h)
    for t in time.order:
        p[t] = time.keeps(t, state[: time.sizes[t]], start)
        entering[t] = time.masks(p[t])
        state = time.replace(state, h_steps[t])

    def of_parts(rows):  # (parts, rows of one, features)
        rows, count = rows.flatten(0, -2), max(parts, 1)
        return rows.unflatten(0, (len(rows) // count, count)).transpose(0, 1)

    def shaped(sums):
        return sums if parts else sums.squeeze(0)

    delta = _passed(gate, d, stops)
    entering, of_alpha = time.join(entering, h), d * (y - time.join(p, h))
    grads = (
        delta @ weight_ih,
        grad_h0,
        shaped(of_parts(delta).mT @ of_parts(x)),
        shaped(of_parts(delta).mT @ of_parts(entering)),
        shaped(of_parts(delta).sum(1)),
        shaped(of_parts(of_alpha).sum(1)).to(h.dtype if alpha is None else alpha.dtype),
        grad_restart,
        torch.linalg.vector_norm(d, dim=-1),
    )
    return tuple(grad if want else h.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


def adjoint_scan(
    g,
    gate,
    weight_hh,
    batch_sizes=None,
    keep=None,
    alpha=None,
    mask=None,
    reverse=False,
    truncate=0,
    clip=None,
    gate_stops=False,
):
    """Carry gradients against processing order: the linear loop of every backward pass.

        d_t = clamp( g_t + k_{t+1} [ (1-a) d_{t+1} + m ((G_{t+1} d_{t+1}) W_hh) ] ),    d_T = 0

    Here t counts a row's own steps in processing order.

    Arguments:
        g: what reaches each state from outside, (T, B, H) or (N, H).
        gate: G, shaped as g.
        weight_hh: (H, H).
        truncate: k > 0 takes k_{t+1} as 0 where t+1 = k, 2k, ...; h0 gets the gradient of the first
            k steps.
        clip: c clamps every d_t to [-c, c], but not d_{-1}, so that two calls on two halves equal
            one call.
        gate_stops: a gate of zero stops even what is infinite or NaN; see STOPPING.
        batch_sizes, keep, alpha, mask, reverse: as in rnn_forward.
    Returns:
        d: shaped as g.
        d0: d_{-1}, the recursion once more without g, a state.
        d_restart: the sum over steps of what the brackets hold where k is 0, a state.
    Source:
        Werbos (1990), Backpropagation through time. It is the transpose of tangent_scan.
    """
    time = _Timeline(g, batch_sizes, keep, reverse, truncate, mask)
    return _adjoint_loop(time, g, None, gate, weight_hh, alpha, clip, gate_stops)


def _adjoint_loop(time, g, arriving, gate, weight_hh, alpha, clip, stops):
    """adjoint_scan with d_T = arriving, a state: the gradient of h_n, whose link is never cut."""
    g_steps, gates, d = time.split(g), time.split(gate), {}
    state, restart = time.start(arriving, g), time.start(None, g)
    for t in reversed(time.order):
        d[t] = g_steps[t] + state[: time.sizes[t]]
        d[t] = d[t] if clip is None else d[t].clamp(-clip, clip)
        leaving = _leak(alpha, d[t], time.masks(_passed(gates[t], d[t], stops) @ weight_hh))
        state = time.replace(state, time.links(t, leaving))
        leaving = restart[: time.sizes[t]] + time.restarts(t, leaving)
        restart = time.replace(restart, leaving)
    return time.join(d, g), time.end(state), time.end(restart)


def tangent_scan(
    c,
    q0,
    gate,
    weight_hh,
    batch_sizes=None,
    keep=None,
    alpha=None,
    restart=None,
    mask=None,
    reverse=False,
    truncate=0,
    gate_stops=False,
):
    """Carry perturbations in processing order: the linear loop of forward mode.

        q_t = c_t + k_t [ (1-a) q_{t-1} + G_t ((m q_{t-1}) W_hh^T) ],    q_{-1} = q0

    Here t counts a row's own steps in processing order. Where k_t is 0, the disturbance of the
    state that rows restart from takes the place of q_{t-1}.

    Arguments:
        c: what disturbs each state from outside, (T, B, H) or (N, H).
        q0: disturbance of the state h0; None means zeros.
        gate: G, shaped as c.
        weight_hh: (H, H).
        truncate: k > 0 drops q_{t-1} where t = k, 2k, ..., as detaching the state does.
        restart: disturbance of the state that rows restart from; None means zeros.
        batch_sizes, keep, alpha, mask, reverse: as in rnn_forward.
        gate_stops: as in adjoint_scan.
    Returns:
        q: shaped as c.
    Source:
        Williams and Zipser (1989), A learning algorithm for continually running fully recurrent
        neural networks.
    """
    time = _Timeline(c, batch_sizes, keep, reverse, truncate, mask)
    c_steps, gates, q = time.split(c), time.split(gate), {}
    state = time.start(q0, c)
    start = None if restart is None else time.start(restart, c)
    for t in time.order:
        arriving = time.links(t, state[: time.sizes[t]], start)
        moved = _passed(gates[t], time.masks(arriving) @ weight_hh.T, gate_stops)
        q[t] = c_steps[t] + _leak(alpha, arriving, moved)
        state = time.replace(state, q[t])
    return time.join(q, c)
