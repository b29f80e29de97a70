"""Microseconds per step, as slopes over T, from the CSV files of gpu.layers.

python -m gpu.report FILE.csv ...
"""

import sys
from pathlib import Path

from . import rows
from .clock import Line, line_through

OURS, THEIRS = "torch_bptt.RNN", "torch.nn.RNN"


def lines(table: list[dict[str, str]]) -> dict[tuple[str, str], dict[str, Line]]:
    """(case, pass) -> implementation -> the line through its medians.

    An implementation with one length, or none, has no line. Of rows that were measured twice the
    last counts.
    """
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in table:
        if row["status"] == "ok" and row["median_us"]:
            who = row["implementation"]
            who += f" by {row['forced_path']}" if row["forced_path"] else ""
            own = points.setdefault((row["case"], row["pass"], who), {})
            own[int(row["T"])] = float(row["median_us"])
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for (case, name, who), own in points.items():
        if len(own) > 1:
            found.setdefault((case, name), {})[who] = line_through(list(own.items()))
    return found


def table_of(found: dict[tuple[str, str], dict[str, Line]]) -> str:
    """Markdown: us per step and fixed us of each implementation, and how many times faster."""
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    compared = OURS in names and THEIRS in names
    head = ["case", "pass", *(f"{name}, us/step + us" for name in names)]
    head += ["times faster per step"] if compared else []
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for (case, name), own in found.items():
        cells = [
            f"{own[who].step:.3f} + {own[who].fixed:.0f}" if who in own else "" for who in names
        ]
        if compared:
            both = OURS in own and THEIRS in own and own[OURS].step > 0
            cells.append(f"{own[THEIRS].step / own[OURS].step:.2f}" if both else "")
        out.append("| " + " | ".join([case, name, *cells]) + " |")
    return "\n".join(out)


def troubles(table: list[dict[str, str]]) -> list[str]:
    """What has no time, and why, each reason once with the cases it stands for."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in table:
        if row["status"] not in ("ok", "kernels"):
            key = row["implementation"], row["pass"], row["status"]
            reasons.setdefault(key, []).append(row["case"])
    return [
        f"{who}, {name}: {status} ({len(cases)} rows, first {cases[0]})"
        for (who, name, status), cases in reasons.items()
    ]


def main(paths: list[str]) -> int:
    for path in map(Path, paths):
        table = rows.read(path)
        device = {(row["device"], row["torch"], row["cudnn"], row["commit"]) for row in table}
        print(f"\n{path.name}: {len(table)} rows; device, torch, cuDNN, commit: {sorted(device)}\n")
        print(table_of(lines(table)))
        for trouble in troubles(table):
            print(f"- {trouble}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
