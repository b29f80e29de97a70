"""The implementations that are compared, each an object with four members:

    name, version                    as they stand in the results
    unable(problem, backward)        why it cannot solve a problem (not installed, an option it does
                                     not have), or None
    prepare(problem, backward)       the problem as a function of no arguments; each call solves it
                                     once and returns tensors: output, h_n and, when backward, the
                                     gradients of x, h0 and every parameter in the order of nn.RNN's

`torch_bptt.bench` says what a problem holds. To add a provider, write a file beside this one with
a class like `torch_bptt.bench.ModuleProvider`, import what it needs only inside `unable` and
`prepare`, and list it here. It runs in the threads that torch was told to use.
"""

from torch_bptt.bench import BASELINE, OURS

PROVIDERS = {provider.name: provider for provider in (BASELINE, OURS)}
