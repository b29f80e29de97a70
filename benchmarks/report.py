"""Tables and plots, drawn from the CSV files of run.py and from nothing else.

python benchmarks/report.py                          tables of all in benchmarks/results
python benchmarks/report.py FILE.csv --plots FOLDER  and pictures: ratios, times, fraction of peak
python benchmarks/report.py FILE.csv --readme        tables into README.md, between its marks
"""

import argparse
import statistics
from pathlib import Path

import table
from table import distinct, ratio, select

from torch_bptt.bench import OURS, PASSES

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN = "<!-- benchmarks: begin; written by benchmarks/report.py --readme -->"
END = "<!-- benchmarks: end -->"


def milliseconds(median: str) -> str:
    """Three digits that count."""
    return f"{float(median):.3g}" if float(median) < 1000 else f"{float(median):.0f}"


def ratios(pairs: list[list[float]]) -> str:
    """For each pass how many times slower than OURS, the geometric mean of several."""
    means = [statistics.geometric_mean(found) if found else None for found in pairs]
    return " / ".join(f"{mean:.{1 if mean >= 10 else 2}f}x" if mean else "-" for mean in means)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def times(rows: list[table.Row]) -> str:
    """One row for each case, one column for each provider, all of one dtype and thread count."""
    cases = distinct(rows, "case")
    providers = sorted(distinct(rows, "provider"), key=lambda name: name != OURS.name)
    columns = [[*cases, "geometric mean"]]
    for provider in providers:
        cells, by_pass = [], [[] for _ in PASSES]
        for case in cases:
            some = select(rows, case=case)
            found = [select(some, provider=provider, pass_=name) for name in PASSES]
            cell = " / ".join(milliseconds(row[0]["median_ms"]) if row else "-" for row in found)
            here = [ratio(some, provider, name) for name in PASSES]
            here = [[r.median] if r and provider != OURS.name else [] for r in here]
            cells.append(f"{cell}, {ratios(here)}" if any(here) else cell)
            for all_cases, one in zip(by_pass, here, strict=True):
                all_cases += one
        columns.append([*cells, ratios(by_pass) if any(by_pass) else ""])
    return markdown(["case", *providers], [list(line) for line in zip(*columns, strict=True)])


def memory(rows: list[table.Row]) -> str:
    """One row for each case, dtype and thread count."""
    providers = distinct(rows, "provider")
    lines = []
    for key in dict.fromkeys((row["case"], row["dtype"], row["threads"]) for row in rows):
        found = select(rows, **dict(zip(("case", "dtype", "threads"), key, strict=True)))
        extra = {
            row["provider"]: f"{row['extra_mib']} MiB, "
            f"{float(row['extra_mib']) / float(row['output_mib']):.2f}x"
            for row in found
        }
        output = f"{found[0]['output_mib']} MiB"
        lines.append([*key, output, *(extra.get(provider, "-") for provider in providers)])
    return markdown(["case", "dtype", "threads", "output", *providers], lines)


def versions(rows: list[table.Row]) -> str:
    """What was measured, on what, when."""
    last = rows[-1]
    named = {row["provider"]: row["version"] for row in rows}
    commits = ", ".join(commit or "unknown" for commit in distinct(rows, "commit"))
    return (
        f"{last['cpu']}, {last['cpus']} CPUs, {last['isa']}; commit {commits}, "
        f"{last['date']}; {', '.join(f'{name} {version}' for name, version in named.items())}."
    )


def report(rows: list[table.Row], groups: list[str]) -> str:
    """All tables of one file, each with a line that says what it shows."""
    parts = [versions(rows)]
    for group in groups:
        of_group = select(rows, group=group)
        if of_group and group == "memory":
            what = "Memory of a training step beyond inputs, outputs and gradients, and this over "
            parts += [what + "the output:", memory(of_group)]
        elif of_group:
            for device, dtype, threads in table.settings(of_group):
                what = f"{dtype}, {table.count(threads)}, median milliseconds, {' / '.join(PASSES)}"
                what += f", and how many times slower than {OURS.name}"
                what += "" if device == "cpu" else f", {device}"
                what += "" if group == "main" else f", {group}"
                some = select(of_group, device=device, dtype=dtype, threads=threads)
                parts += [what + ":", times(some)]
    return "\n\n".join(parts)


def fill(readme: str, text: str) -> str:
    """The README with what lies between the marks replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has to have the lines\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="*", type=Path, help="(all in benchmarks/results)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw pictures; one CSV")
    parser.add_argument("--readme", action="store_true", help="fill in README.md")
    options = parser.parse_args()
    paths = options.csv or sorted((HERE / "results").glob("*.csv"))
    if not paths:
        parser.error("there are no results yet: python benchmarks/run.py makes them")
    if options.plots and len(paths) != 1:
        parser.error(f"--plots takes one CSV, not {len(paths)}")
    results = {path: table.read(path) for path in paths}
    for path, rows in results.items():
        if not rows:
            parser.error(f"{path} has no rows")
    if options.readme:
        tables = "\n\n".join(report(rows, ["main", "memory"]) for rows in results.values())
        README.write_text(fill(README.read_text(), tables))
    else:
        print("\n\n".join(report(rows, distinct(rows, "group")) for rows in results.values()))
    if options.plots:
        import plots

        for path in plots.draw(results[paths[0]], options.plots):
            print(f"plot is in {path}")


if __name__ == "__main__":
    main()
