"""What torch.utils.flop_counter counts of the operators: two for each multiply-add of a matrix
product, as it does for PyTorch's own."""

from torch.utils.flop_counter import register_flop_formula

from torch_bptt.operators import ops


@register_flop_formula(ops.rnn_forward, get_raw=True)
def _(x, h0, weight_ih, *others, **options):
    *_, hidden, features = weight_ih.shape
    return 2 * x.shape[:-1].numel() * hidden * (features + hidden)


@register_flop_formula(ops.rnn_backward, get_raw=True)
def _(
    grad_h, grad_h_n, x, h0, h, f, weight_ih, weight_hh, activation, wanted, batch_sizes=None,
    *others, **options,
):  # fmt: skip
    *_, hidden, features = weight_ih.shape
    of_x, of_h0, of_weight_ih, of_weight_hh, *_ = wanted
    rows = linked = x.shape[:-1].numel()
    if not of_h0:  # then d does not go back beyond the first step of each sequence
        sequences = x.shape[-2] if batch_sizes is None else int(batch_sizes[:1].sum())
        linked -= weight_ih.shape[:-2].numel() * sequences
    return 2 * hidden * (
        rows * features * (of_x + of_weight_ih) + rows * hidden * of_weight_hh + linked * hidden
    )  # fmt: skip


@register_flop_formula([ops.adjoint_scan, ops.tangent_scan], get_raw=True)
def _(rows, *others, **options):
    return 2 * rows.numel() * rows.shape[-1]
