"""Measurements on an NVIDIA GPU, one part per module; ``benchmarks/gpu_check.py`` runs them.

python benchmarks/gpu_check.py --dry-run

cases.py      what is measured, most valuable first
clock.py      CUDA events, turns, medians and slopes
networks.py   a case as tensors and as calls
rows.py       the CSV files, written row by row, and facts about the device
cudnn.py      part: torch.nn.RNN alone; needs nothing but torch
compare.py    part: torch_bptt.RNN and torch.nn.RNN, taking turns
constants.py  part: latencies of the device, from constants.cu
report.py     microseconds per step from the CSV files
"""
