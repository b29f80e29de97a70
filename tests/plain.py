"""torch_bptt.RNN as a loop over rows and steps in plain PyTorch: what traces are compared with."""

import torch

activations = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def run(net, x, hx=None, lengths=None, reset=None):
    """output (T, B, D*H) and h_n (L*D, B, H) of time-major x, with autograd's graph of the loop."""
    steps, rows, _ = x.shape
    directions = 2 if net.bidirectional else 1
    lengths = [steps] * rows if lengths is None else [int(n) for n in lengths]
    ends = []
    for index in range(net.num_layers):
        outputs = []
        for way in range(directions):
            which = index * directions + way
            done = [
                _row(net, which, x[:n, b], hx, b, None if reset is None else reset[:, b])
                for b, n in enumerate(lengths)
            ]
            ends.append(torch.stack([h for _, h in done]))
            outputs.append(torch.stack([_padded(states, steps, h) for states, h in done], 1))
        x = torch.cat(outputs, -1)
    return x, torch.stack(ends)


def _row(net, which, x, hx, b, reset):
    """The states of one row, by step, and its last one."""
    names = net._all_weights[which]
    weight_ih, weight_hh, *biases = (getattr(net, name) for name in names)
    reverse = which % 2 == 1 and net.bidirectional
    alpha = net.alpha
    if isinstance(alpha, torch.Tensor) and alpha.dim() == 2:
        alpha = alpha[which]
    start = net.h0[which] if net.learn_h0 else x.new_zeros(net.hidden_size)
    h = start if hx is None else hx[which, b]
    states = {}
    for own, t in enumerate(range(len(x))[:: -1 if reverse else 1]):
        if net.truncate and own and own % net.truncate == 0:
            h = h.detach()
        crossed = t + 1 if reverse else t
        if reset is not None and crossed < len(x) and reset[crossed]:
            h = start
        z = weight_ih @ x[t] + weight_hh @ h + sum(biases)
        h = (1 - alpha) * h + alpha * activations[net.nonlinearity](z)
        states[t] = h
    return states, h


def _padded(states, steps, like):
    return torch.stack([states.get(t, torch.zeros_like(like)) for t in range(steps)])
