"""The pictures of ``diagnose``: each draws on the Axes given, or on new ones, and returns them."""

import torch


def _pyplot():
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed: pip install torch_bptt[plot]"
        ) from error
    return pyplot


def _axes(ax):
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def report(layers, weights):
    figure, axes = _pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    gradient_flow(layers, axes[0])
    saturation(layers, axes[1])
    eigenvalues(weights, axes[2])
    return figure


def gradient_flow(layers, ax=None):
    ax = _axes(ax)
    for layer in layers:
        norms = layer.rms_by_step
        # A logarithmic axis has no place for zero: the line ends there.
        ax.plot(
            torch.arange(len(norms), device="cpu"),
            norms.where(norms > 0, torch.nan),
            label=layer.label,
        )
    ax.set_yscale("log")
    ax.set(xlabel="step t", ylabel="norm of dL/dh_t, rms over rows", title="Gradient of the state")
    return _legend(ax)


def saturation(layers, ax=None):
    ax = _axes(ax)
    for layer in layers:
        share = 100 * layer.saturated_by_step
        ax.plot(torch.arange(len(share), device="cpu"), share, label=layer.label)
    ax.set(xlabel="step t", ylabel="saturated units, %", ylim=(-3, 103), title="Saturation")
    return _legend(ax)


def eigenvalues(weights, ax=None):
    ax = _axes(ax)
    angle = torch.linspace(0, 2 * torch.pi, 361, device="cpu")
    ax.plot(angle.cos(), angle.sin(), color="0.6", linewidth=1, label="unit circle")
    for layer in weights:
        values = layer.eigenvalues
        about = f"{layer.label}: radius {layer.spectral_radius:.2f}, σ_max {layer.sigma_max:.2f}"
        ax.plot(values.real, values.imag, ".", label=about)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set(xlabel="real part", ylabel="imaginary part", title="Eigenvalues of W_hh")
    return _legend(ax)


def jacobian_spectrum(layers, ax=None, label=None):
    ax = _axes(ax)
    for layer in layers:
        rates = layer.rates.flatten(0, 1)
        index = torch.arange(1, rates.shape[1] + 1, device="cpu")
        about = f"{label or layer.label}, {layer.window} steps"
        (line,) = ax.plot(index, rates.median(0).values, ".-", label=about)
        low, high = rates.amin(0), rates.amax(0)
        ax.fill_between(index, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(1, color="0.6", linewidth=1)
    ax.set(xlabel="index", ylabel="growth per step", title="Singular values of Jacobian products")
    return _legend(ax)


def _legend(ax):
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")
    return ax
