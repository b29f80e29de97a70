"""Curves of the tutorial's section on vanishing and exploding gradients: `make figures`."""

import svg
import torch


def powers():
    """||W^k|| of the matrix of spectral radius 0.9 whose powers rise to 39 first."""
    W = torch.tensor([[0.9, 10.0], [0.0, 0.9]], dtype=torch.float64)
    steps = range(1, 121)
    norms = [torch.linalg.matrix_norm(torch.linalg.matrix_power(W, k), 2).item() for k in steps]
    plot = svg.Plot(
        "Norms of the powers of a matrix of spectral radius 0.9",
        "k", "norm of W^k", range(0, 121, 20), range(-6, 3),
    )  # fmt: skip
    plot.curve(list(zip(steps, norms, strict=True)), "norm of W^k", svg.RED)
    plot.curve([(k, 0.9**k) for k in steps], "0.9^k", svg.BLUE, "6 4")
    return plot


def gradient_norm():
    """||dL/dh_{t-k}|| over k for three spectral radii, H = 64, linear and tanh, noise as drive."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    hidden, steps = 64, 60
    base = torch.randn(hidden, hidden, **draw)
    base = base / torch.linalg.eigvals(base).abs().max()
    drive, carried = 0.5 * torch.randn(steps, hidden, **draw), torch.randn(hidden, **draw)
    carried = carried / carried.norm()
    plot = svg.Plot(
        "Norm of the gradient over distance, for three spectral radii",
        "steps back from the loss", "norm of the gradient", range(0, 61, 10), range(-14, 7, 2),
    )  # fmt: skip
    for radius, color in ((1.25, svg.RED), (1.0, svg.GREEN), (0.8, svg.BLUE)):
        W = radius * base
        for tanh in (False, True):
            slopes, h = [], torch.zeros_like(carried)
            for u in drive:
                z = u + h @ W.T
                h = torch.tanh(z) if tanh else z
                slopes.append(1 - h**2 if tanh else torch.ones_like(h))
            d, norms = carried, [1.0]
            for slope in reversed(slopes):
                d = (slope * d) @ W
                norms.append(d.norm().item())
            label = f"{radius}, {'tanh' if tanh else 'linear'}"
            plot.curve(list(enumerate(norms)), label, color, "6 4" if tanh else None)
    return plot


FIGURES = {"powers.svg": powers, "gradient-norm.svg": gradient_norm}

if __name__ == "__main__":
    svg.write(FIGURES)
