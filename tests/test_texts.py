"""Four texts on backpropagation through time, each a system with the gradients it should have.

What the texts have in common, in columns as they write them (W = weight_ih, U = weight_hh):

    z_t = W x_t + U h_{t-1} + b      h_t = f(z_t)      o_t = V h_t + c      yhat_t = g(o_t)

    eps_t   = dL/do_t                the loss of step t, with its weight in the sum
    delta_t = dL/dz_t = f'(z_t) * (V^T eps_t + U^T delta_{t+1}),   delta_{T+1} = 0

    dW = sum delta_t x_t^T    dU = sum delta_t h_{t-1}^T    db = sum delta_t
    dV = sum eps_t h_t^T      dc = sum eps_t     dh_0 = U^T delta_1     dx_t = W^T delta_t

The formulas are computed by numpy, or in plain Python, from the texts, with their errors corrected.
Where an error can be put into numbers, a test shows that it makes a difference. In all that follows
h[0] is the initial state, and x[t], z[t], h[t] belong to step t = 1 .. T, so that formulas can be
compared with the texts; entry 0 of what has none is None.
"""

import functools
import math

import numpy as np
import pytest
import torch
from pairs import randn

import torch_bptt

# At most 8 steps and sums of at most 5 terms: a number goes through fewer than 8 * 2 * (5 + 5)
# roundings of 1.1e-16, and the largest singular value of U is below 1, so that later steps do not
# stretch them: 2e-14 of the terms of a sum, which may be ten times what is left of it.
LIMIT = 2e-13

FUNCTIONS = {  # f and f'
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "identity": (lambda z: z, lambda z: np.ones_like(z)),
}


def error(got, expected):
    """The largest difference, relative to the largest expected entry or 1."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / max(1.0, np.abs(expected).max())


def differs(got, expected):
    """Whether the largest difference is above a hundredth of the largest expected entry."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() > 0.01 * np.abs(expected).max()


def assert_equal(got, expected):
    """Two dictionaries of the same gradients."""
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert error(gradient, expected[name]) <= LIMIT, name


def make(input_size, hidden_size, output_size, **options):
    """A network in float64 with weights of about 1/sqrt(H), the same ones in every run."""
    torch.manual_seed(0)
    return torch_bptt.ElmanNetwork(
        input_size, hidden_size, output_size, dtype=torch.float64, **options
    )


def parameters(network):
    """W, U, b, V, c as numpy arrays; the two biases of nn.RNN are one."""
    rnn, head = network.rnn, network.head
    tensors = [rnn.weight_ih_l0, rnn.weight_hh_l0]
    tensors += [rnn.bias_ih_l0 + rnn.bias_hh_l0, head.weight, head.bias] if rnn.bias else []
    tensors += [] if rnn.bias else [head.weight]
    return [tensor.detach().numpy() for tensor in tensors]


def backpropagate(network, x, y, h0, **options):
    """The loss, and its gradients by name, as the network has them."""
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    loss, _ = network.loss(x, y, h0, **options)
    rnn, head = network.rnn, network.head
    leaves = {"W": rnn.weight_ih_l0, "U": rnn.weight_hh_l0, "V": head.weight}
    leaves |= {"b": rnn.bias_ih_l0, "c": head.bias} if rnn.bias else {}
    leaves |= {"x": x, "h0": h0}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {n: g.numpy() for n, g in zip(leaves, gradients, strict=True)}


def run(f, x, h0, W, U, b):
    """z_t and h_t of one sequence x, (T, I); h[0] = h0."""
    z, h = [None], [h0]
    for x_t in x:
        z.append(W @ x_t + U @ h[-1] + b)
        h.append(f(z[-1]))
    return z, h


def collect(delta, eps, x, h, W, U):
    """All gradients from delta_t and eps_t, t = 1 .. T."""
    steps = range(1, len(h))
    return {
        "W": sum(np.outer(delta[t], x[t - 1]) for t in steps),
        "U": sum(np.outer(delta[t], h[t - 1]) for t in steps),
        "b": sum(delta[t] for t in steps),
        "V": sum(np.outer(eps[t], h[t]) for t in steps),
        "c": sum(eps[t] for t in steps),
        "x": np.stack([W.T @ delta[t] for t in steps]),
        "h0": U.T @ delta[1],
    }


# ---- A. A textbook chapter: a loss at every step, tanh in the hidden layer, sigmoid at the output


class TextA:
    """T = 6 steps, J = 3 attributes, N = 4 hidden, K outputs."""

    T, J, N = 6, 3, 4

    def __init__(self, loss, reduction, K=2):
        self.network = make(self.J, self.N, K, output_activation="sigmoid")
        self.x, self.h0 = randn(self.T, self.J), randn(1, self.N, seed=1)
        self.y = randn(self.T, K, seed=2)
        self.y = self.y if loss == "mse" else (self.y > 0).double()
        self.options = {"loss": loss, "reduction": reduction}
        self.loss, self.gradients = backpropagate(
            self.network, self.x, self.y, self.h0, **self.options
        )
        self.W, self.U, self.b, self.V, self.c = parameters(self.network)
        self.f, self.slope = FUNCTIONS["tanh"]
        self.z, self.h = run(self.f, self.x.numpy(), self.h0[0].numpy(), self.W, self.U, self.b)
        sigmoid, _ = FUNCTIONS["sigmoid"]
        self.yhat = np.stack([sigmoid(self.V @ h + self.c) for h in self.h[1:]])
        self.weight = {"sum": 1, "mean": 1 / self.T}[reduction]

    def eps(self):
        """g'(o) dl/dyhat: for the log likelihood g' cancels."""
        y, yhat = self.y.numpy(), self.yhat
        K = y.shape[1]
        if self.options["loss"] == "mse":
            return [None, *(self.weight * 2 / K * (yhat - y) * yhat * (1 - yhat))]
        return [None, *(self.weight / K * (yhat - y))]

    def delta(self, slope=None):
        slope, eps = slope or self.slope, self.eps()
        delta = [None] * (self.T + 1) + [np.zeros(self.N)]
        for t in range(self.T, 0, -1):
            delta[t] = slope(self.z[t]) * (self.V.T @ eps[t] + self.U.T @ delta[t + 1])
        return delta

    def collected(self, delta):
        gradients = collect(delta, self.eps(), self.x.numpy(), self.h, self.W, self.U)
        return {**gradients, "h0": gradients["h0"][None]}


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gradients(loss, reduction):
    a = TextA(loss, reduction)
    assert_equal(a.gradients, a.collected(a.delta()))


def test_a_losses():
    a = TextA("mse", "mean")
    y = a.y.numpy()
    assert error(a.loss, ((a.yhat - y) ** 2).mean()) <= LIMIT
    a = TextA("binary_cross_entropy", "sum", K=1)
    y, likelihood = a.y.numpy(), np.where(a.y.numpy() == 1, a.yhat, 1 - a.yhat)
    assert error(a.loss, -np.log(likelihood).sum()) <= LIMIT


def test_a_the_loss_is_no_root():
    """ "Mean square root error" is the mean squared error: a root would change every gradient."""
    a = TextA("mse", "mean")
    root = {name: gradient / (2 * math.sqrt(a.loss)) for name, gradient in a.gradients.items()}
    assert differs(root["V"], a.gradients["V"])


def test_a_weights_collect_all_steps():
    """The chain rule written for one weight has no sum over t: one step is not the gradient."""
    a = TextA("mse", "mean")
    delta, x, h = a.delta(), a.x.numpy(), a.h
    for t in range(1, a.T + 1):
        assert differs(np.outer(delta[t], x[t - 1]), a.gradients["W"])
        assert differs(np.outer(delta[t], h[t - 1]), a.gradients["U"])


def test_a_the_recursion_starts_at_the_last_step():
    """delta without the term from t + 1 is right for t = T and for no other step."""
    a = TextA("mse", "mean")
    delta, eps = a.delta(), a.eps()
    alone = [None, *(a.slope(a.z[t]) * (a.V.T @ eps[t]) for t in range(1, a.T + 1))]
    assert error(alone[a.T], delta[a.T]) == 0
    assert all(np.abs(alone[t] - delta[t]).max() > 1e-4 for t in range(1, a.T))


def test_a_diag_takes_the_slope_not_the_state():
    a = TextA("mse", "mean")
    wrong = a.collected(a.delta(slope=a.f))
    assert all(differs(wrong[name], a.gradients[name]) for name in "WUb")


# ---- B. A course: many to one, half the squared error of the last step, any f


class TextB:
    """T = 5 steps, I = 3, H = 4, K = 2 outputs of a dense layer on the last state."""

    T, INPUT, H, K = 5, 3, 4, 2

    def __init__(self, nonlinearity, h0=None):
        self.network = make(self.INPUT, self.H, self.K, nonlinearity=nonlinearity, many_to_one=True)
        self.x, self.y = randn(self.T, self.INPUT), randn(self.K, seed=1)
        self.h0 = randn(1, self.H, seed=2) if h0 is None else h0
        self.loss, self.gradients = backpropagate(
            self.network, self.x, self.y, self.h0, loss="half_squared_error"
        )
        self.W, self.U, self.b, self.V, self.c = parameters(self.network)
        self.f, self.slope = FUNCTIONS[nonlinearity]
        self.z, self.h = run(self.f, self.x.numpy(), self.h0[0].numpy(), self.W, self.U, self.b)
        self.eps = self.V @ self.h[self.T] + self.c - self.y.numpy()

    def dh(self, step=None):
        """dL/dh^t for t = T .. 0 by (7.6): dh^t = tU (f'(z^{t+1}) * dh^{t+1})."""
        step = step or (lambda dh, slope: self.U.T @ (slope * dh))
        dh = [None] * self.T + [self.V.T @ self.eps]
        for t in range(self.T - 1, -1, -1):
            dh[t] = step(dh[t + 1], self.slope(self.z[t + 1]))
        return dh

    def collected(self, dh):
        delta = [None, *(self.slope(self.z[t]) * dh[t] for t in range(1, self.T + 1))]
        eps = [np.zeros(self.K)] * self.T + [self.eps]
        gradients = collect(delta, eps, self.x.numpy(), self.h, self.W, self.U)
        return {**gradients, "h0": dh[0][None]}


@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
def test_b_gradients(nonlinearity):
    b = TextB(nonlinearity)
    assert error(b.loss, (b.eps**2).sum() / 2) <= LIMIT
    assert_equal(b.gradients, b.collected(b.dh()))


@pytest.mark.parametrize("nonlinearity", FUNCTIONS)
def test_b_is_a_many_to_many_network_with_the_loss_of_the_last_step(nonlinearity):
    b = TextB(nonlinearity)
    network = make(b.INPUT, b.H, b.K, nonlinearity=nonlinearity)
    network.load_state_dict(b.network.state_dict())
    y = torch.full((b.T, b.K), math.nan, dtype=torch.float64)  # only the last one is read
    y[-1] = b.y
    options = {"loss": "half_squared_error", "reduction": "last"}
    _, gradients = backpropagate(network, b.x, y, b.h0, **options)
    assert_equal(gradients, b.collected(b.dh()))


def test_b_the_loss_is_half_the_squared_error():
    """It is called mean squared error; that of the K outputs has other gradients."""
    b = TextB("tanh")
    _, mean = backpropagate(b.network, b.x, b.y, b.h0, loss="mse")
    assert error(mean["U"] * b.K / 2, b.gradients["U"]) <= LIMIT
    network = make(b.INPUT, 4, 3, many_to_one=True)
    y = randn(3)
    _, half = backpropagate(network, b.x, y, b.h0, loss="half_squared_error")
    _, mean = backpropagate(network, b.x, y, b.h0, loss="mse")
    assert differs(mean["U"], half["U"])


def test_b_the_order_of_the_factors():
    """(7.6), dh f' tU, is right for rows with U; columns need tU (f' * dh)."""
    b = TextB("tanh")
    rows = b.dh(lambda dh, slope: dh @ np.diag(slope) @ b.U)
    assert error(rows[0], b.dh()[0]) <= LIMIT
    for wrong in (lambda dh, slope: slope * (b.U.T @ dh), lambda dh, slope: (dh * slope) @ b.U.T):
        collected = b.collected(b.dh(wrong))
        assert differs(collected["U"], b.gradients["U"])


def test_b_the_first_step_belongs_to_the_sum():
    """(7.8) leaves it out of dU, which is right for an initial state of zero and no other."""

    def without_first(b):
        delta = [None, *(b.slope(b.z[t]) * b.dh()[t] for t in range(1, b.T + 1))]
        return sum(np.outer(delta[t], b.h[t - 1]) for t in range(2, b.T + 1))

    zero = TextB("tanh", h0=torch.zeros(1, 4, dtype=torch.float64))
    assert error(without_first(zero), zero.gradients["U"]) <= LIMIT
    b = TextB("tanh")
    assert differs(without_first(b), b.gradients["U"])


def test_b_the_recursion_holds_for_many_to_one_only():
    """With a loss at every step each dh^t gets its own V^T eps^t."""
    b = TextB("tanh")
    network = make(b.INPUT, b.H, b.K)
    y = randn(b.T, b.K, seed=3)
    options = {"loss": "half_squared_error", "reduction": "sum"}
    _, gradients = backpropagate(network, b.x, y, b.h0, **options)
    eps = [None, *(b.V @ h + b.c - target for h, target in zip(b.h[1:], y.numpy(), strict=True))]
    for own in (True, False):
        dh = [None] * b.T + [b.V.T @ eps[b.T]]
        for t in range(b.T - 1, -1, -1):
            dh[t] = b.U.T @ (b.slope(b.z[t + 1]) * dh[t + 1])
            if own and t > 0:
                dh[t] = dh[t] + b.V.T @ eps[t]
        delta = [None, *(b.slope(b.z[t]) * dh[t] for t in range(1, b.T + 1))]
        collected = collect(delta, eps, b.x.numpy(), b.h, b.W, b.U)
        collected["h0"] = dh[0][None]
        if own:
            assert_equal(gradients, collected)
        else:
            assert all(differs(collected[name], gradients[name]) for name in "WUb")


def test_b_a_batch_adds_up():
    """No batch in the text: with one, weights collect all rows, and 'mean' divides by them."""
    b = TextB("tanh")
    x, y, h0 = randn(b.T, 3, b.INPUT, seed=4), randn(3, b.K, seed=5), randn(1, 3, b.H, seed=6)
    _, mean = backpropagate(b.network, x, y, h0, loss="half_squared_error")
    rows = [
        backpropagate(b.network, x[:, r], y[r], h0[:, r], loss="half_squared_error")[1]
        for r in range(3)
    ]
    for name in "WUbVc":
        assert error(mean[name], sum(row[name] for row in rows) / 3) <= LIMIT
    assert error(mean["h0"][0] * 3, np.concatenate([row["h0"] for row in rows])) <= LIMIT


# ---- C. A question and its answer: one input, one sigmoid neuron, one linear output, no biases


class TextC:
    """z^t = v x^t + w y^{t-1}, y^t = sigma(z^t), y^0 = s, p^t = u y^t, E = sum (t^t - p^t)^2.

    The targets are the next tokens, t^t = x^{t+1}: of N tokens there are N - 1 pairs. Plain Python
    numbers; the derivatives are written out.
    """

    TOKENS = (0.3, -0.7, 1.1, 0.4, -0.2, 0.9, 0.1)
    V, W, U, S = 0.8, -1.3, 0.6, 0.25

    def __init__(self, v=V, w=W, u=U, s=S, tokens=None):
        tokens = self.TOKENS if tokens is None else tokens
        self.v, self.w, self.u, self.s = v, w, u, s
        self.x, self.t = [None, *tokens[:-1]], [None, *tokens[1:]]
        self.T = len(tokens) - 1
        self.y = [s]
        for t in range(1, self.T + 1):
            z = v * self.x[t] + w * self.y[t - 1]
            self.y.append(1 / (1 + math.exp(-z)))
        self.p = [None, *(u * y for y in self.y[1:])]
        self.E = math.fsum((self.t[t] - self.p[t]) ** 2 for t in range(1, self.T + 1))

    def delta(self, factor=True):
        """delta^t = sigma'(z^t) (2 (p^t - t^t) u + w delta^{t+1}); the text lacks the factor."""
        delta = [None] * (self.T + 1) + [0.0]
        for t in range(self.T, 0, -1):
            slope = self.y[t] * (1 - self.y[t])
            residual = 2 * (self.p[t] - self.t[t]) if factor else 1
            delta[t] = slope * (residual * self.u + self.w * delta[t + 1])
        return delta

    def gradients(self, delta=None):
        steps, delta = range(1, self.T + 1), delta or self.delta()
        return {
            "v": math.fsum(delta[t] * self.x[t] for t in steps),
            "w": math.fsum(delta[t] * self.y[t - 1] for t in steps),
            "u": math.fsum(2 * (self.p[t] - self.t[t]) * self.y[t] for t in steps),
            "s": self.w * delta[1],
        }

    def network(self, **options):
        network = make(1, 1, 1, nonlinearity="sigmoid", bias=False, **options)
        values = {"rnn.weight_ih_l0": self.v, "rnn.weight_hh_l0": self.w, "head.weight": self.u}
        state = {name: torch.tensor([[v]], dtype=torch.float64) for name, v in values.items()}
        network.load_state_dict(state)
        return network

    @classmethod
    def pairs(cls):
        tokens = torch.tensor(cls.TOKENS, dtype=torch.float64)[:, None]
        return tokens[:-1], tokens[1:]

    def of(self, network):
        """E and its gradients, as the network has them."""
        s = torch.tensor([[self.s]], dtype=torch.float64)
        E, gradients = backpropagate(network, *self.pairs(), s, reduction="sum")
        names = {"v": "W", "w": "U", "u": "V", "s": "h0"}
        return E, {name: gradients[theirs].item() for name, theirs in names.items()}


def test_c_gradients():
    c = TextC()
    E, gradients = c.of(c.network())
    assert abs(E - c.E) <= 1e-12
    for name, value in c.gradients().items():
        assert abs(gradients[name] - value) <= 1e-12, name


def test_c_the_formulas_are_derivatives():
    """Central differences of E, with an error of O(1e-5 ^ 2)."""
    c = TextC()
    for name, value in c.gradients().items():
        at = vars(c)[name]
        up, down = (TextC(**{**VALUES, name: at + step}).E for step in (1e-5, -1e-5))
        assert abs((up - down) / 2e-5 - value) <= 1e-8


VALUES = {"v": TextC.V, "w": TextC.W, "u": TextC.U, "s": TextC.S}


def test_c_two_tokens_by_hand():
    """One pair: E = (x2 - u sigma(v x1 + w s))^2."""
    c = TextC(tokens=[0.3, -0.7])
    y = 1 / (1 + math.exp(-(0.8 * 0.3 - 1.3 * 0.25)))
    by_hand = 2 * (0.6 * y + 0.7) * 0.6 * y * (1 - y)
    assert c.gradients()["v"] == pytest.approx(by_hand * 0.3, rel=1e-14)
    assert c.gradients()["s"] == pytest.approx(by_hand * -1.3, rel=1e-14)


def test_c_weights_change_after_the_whole_sequence():
    """Gradient descent on v, w, u and s, 20 times through the sequence."""
    rate, by_hand = 0.1, dict(VALUES)
    network = TextC().network()
    s = torch.tensor([[TextC.S]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([*network.parameters(), s], lr=rate)
    errors = []
    for _ in range(20):
        c = TextC(**by_hand)
        by_hand = {name: by_hand[name] - rate * g for name, g in c.gradients().items()}
        E, _ = network.loss(*TextC.pairs(), s, reduction="sum")
        optimizer.zero_grad()
        E.backward()
        optimizer.step()
        assert abs(E.item() - c.E) <= 1e-12
        errors.append(c.E)
    assert abs(s.item() - by_hand["s"]) <= 1e-12
    assert errors == sorted(errors, reverse=True)


def test_c_the_factors_missing_from_the_text():
    c = TextC()
    right = c.gradients()
    without = c.gradients(c.delta(factor=False))
    assert all(differs(without[name], right[name]) for name in "vws")
    for t in range(1, c.T + 1):  # dE/du without the sum, without the error, without both
        assert differs(2 * (c.p[t] - c.t[t]) * c.y[t], right["u"])
        assert differs(c.y[t], right["u"])
    assert differs(math.fsum(c.y[1:]), right["u"])


def test_c_truncated_gradients_are_others():
    """ "After the whole sequence" is full BPTT: with k steps of gradient the sums change."""
    c = TextC()
    _, full = c.of(c.network())
    _, truncated = c.of(c.network(truncate=2))
    delta = c.delta()
    for t in range(c.T, 0, -1):  # steps counted from 0: nothing crosses from step 2, 4, ... back
        arrives = 0 if t % 2 == 0 else c.w * delta[t + 1]
        delta[t] = c.y[t] * (1 - c.y[t]) * (2 * (c.p[t] - c.t[t]) * c.u + arrives)
    for name, value in c.gradients(delta).items():
        assert abs(truncated[name] - value) <= 1e-12, name
    assert differs(truncated["w"], full["w"])
    assert truncated["u"] == full["u"]


# ---- D. Lecture notes: the general recurrence, and the linear RNN in closed form


class TextD:
    """h_t = W_x x_t + W_h h_{t-1}, yhat_t = W_o h_t, F = 1/T sum l(yhat_t, y_t); no biases."""

    T, INPUT, H, K = 6, 3, 4, 2

    def __init__(self):
        self.network = make(self.INPUT, self.H, self.K, nonlinearity="identity", bias=False)
        self.x, self.y = randn(self.T, self.INPUT), randn(self.T, self.K, seed=1)
        self.h0 = randn(1, self.H, seed=2)
        self.loss, self.gradients = backpropagate(
            self.network, self.x, self.y, self.h0, loss="half_squared_error"
        )
        self.Wx, self.Wh, self.Wo = parameters(self.network)
        _, self.h = run(lambda z: z, self.x.numpy(), self.h0[0].numpy(), self.Wx, self.Wh, 0)
        self.slope = [None, *(self.Wo @ h for h in self.h[1:])]  # l'_t = yhat_t - y_t
        self.slope[1:] = [s - y for s, y in zip(self.slope[1:], self.y.numpy(), strict=True)]

    def back(self, t, i):
        """(W_h^T)^(t-i) W_o^T l'_t: the gradient of the loss of step t as it reaches h_i."""
        return np.linalg.matrix_power(self.Wh.T, t - i) @ self.Wo.T @ self.slope[t]

    def closed_form(self):
        T, pairs = self.T, [(t, i) for t in range(1, self.T + 1) for i in range(1, t + 1)]
        x, steps = [None, *self.x.numpy()], range(1, T + 1)
        return {
            "W": sum(np.outer(self.back(t, i), x[i]) for t, i in pairs) / T,
            "U": sum(np.outer(self.back(t, i), self.h[i - 1]) for t, i in pairs) / T,
            "V": sum(np.outer(self.slope[t], self.h[t]) for t in steps) / T,
            "h0": sum(self.back(t, 0) for t in steps)[None] / T,
            "x": np.stack(
                [self.Wx.T @ sum(self.back(t, i) for t in range(i, T + 1)) / T for i in steps]
            ),
        }


def test_d_closed_form():
    d = TextD()
    squares = [np.sum(slope**2) / 2 for slope in d.slope[1:]]
    assert error(d.loss, sum(squares) / d.T) <= LIMIT
    assert_equal(d.gradients, d.closed_form())


def sensitivities(nonlinearity):
    """(b_t, c_t, the network's dh_T/dtheta) of an RNN in which theta are W_h, row by row, and h_0.

    a_t = dh_t/dtheta = b_t + c_t a_{t-1}: b_t is what theta does in step t alone, c_t the Jacobian
    dh_t/dh_{t-1}.
    """
    d = TextD()
    rnn = torch_bptt.RNN(d.INPUT, d.H, nonlinearity=nonlinearity, bias=False, dtype=torch.float64)
    rnn.load_state_dict(d.network.rnn.state_dict())
    f, slope = FUNCTIONS[nonlinearity]
    z, h = run(f, d.x.numpy(), d.h0[0].numpy(), d.Wx, d.Wh, 0)
    gates = [None, *(np.diag(slope(z[t])) for t in range(1, d.T + 1))]
    b = [None, *(gates[t] @ np.kron(np.eye(d.H), h[t - 1]) for t in range(1, d.T + 1))]
    b[1:] = [np.hstack([b_t, np.zeros((d.H, d.H))]) for b_t in b[1:]]
    c = [None, *(gates[t] @ d.Wh for t in range(1, d.T + 1))]

    def last(weight_hh, h0):
        weights = {"weight_ih_l0": rnn.weight_ih_l0, "weight_hh_l0": weight_hh}
        return torch.func.functional_call(rnn, weights, (d.x, h0))[1][0]

    of_weight, of_h0 = torch.func.jacrev(last, (0, 1))(rnn.weight_hh_l0, d.h0)
    expected = torch.cat([of_weight.flatten(1), of_h0.flatten(1)], 1)
    return b, c, expected.detach().numpy()


def unrolled(b, c, a_0, order):
    """a_T = b_T + sum_i (c_T ... c_{i+1}) b_i + (c_T ... c_1) a_0; order arranges c_{i+1}, ..."""
    T = len(b) - 1

    def product(i):
        return functools.reduce(np.matmul, order(c[i + 1 :]), np.eye(len(c[1])))

    return sum(product(i) @ b[i] for i in range(1, T + 1)) + product(0) @ a_0


def newest_first(factors):
    return factors[::-1]


@pytest.mark.parametrize("nonlinearity", ["identity", "tanh"])
def test_d_forward_sensitivities(nonlinearity):
    b, c, expected = sensitivities(nonlinearity)
    H = len(c[1])
    a = a_0 = np.hstack([np.zeros((H, H * H)), np.eye(H)])  # dh_0/dW_h = 0, dh_0/dh_0 = I
    for b_t, c_t in zip(b[1:], c[1:], strict=True):
        a = b_t + c_t @ a
    assert error(a, expected) <= LIMIT
    assert error(unrolled(b, c, a_0, newest_first), expected) <= LIMIT


def test_d_a_learned_initial_state_has_a_sensitivity_of_its_own():
    """a_0 = 0 is assumed: then h_0 would have no gradient at all."""
    b, c, expected = sensitivities("tanh")
    H = len(c[1])
    assumed = unrolled(b, c, np.zeros((H, H * H + H)), newest_first)
    assert error(assumed[:, : H * H], expected[:, : H * H]) <= LIMIT
    assert differs(assumed[:, H * H :], expected[:, H * H :])


def test_d_the_order_of_the_product():
    """The Jacobians do not commute: c_t stands first, on the left."""
    b, c, expected = sensitivities("tanh")
    H = len(c[1])
    a_0 = np.hstack([np.zeros((H, H * H)), np.eye(H)])
    assert differs(unrolled(b, c, a_0, list), expected)
