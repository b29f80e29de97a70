"""Tables and a plot, drawn from the CSV files of run.py and from nothing else.

python benchmarks/report.py                              tables of all in benchmarks/results
python benchmarks/report.py FILE.csv --plot FILE.png     speed-ups as a picture
python benchmarks/report.py FILE.csv --readme            tables into README.md, between its marks
"""

import argparse
from pathlib import Path

import table

from torch_bptt.bench import BASELINE, OURS, PASSES, geometric_mean

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN = "<!-- benchmarks: begin; written by benchmarks/report.py --readme -->"
END = "<!-- benchmarks: end -->"


def distinct(rows: list[table.Row], column: str) -> list[str]:
    """The values of a column, in the order of their first appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def select(rows: list[table.Row], **wanted: str) -> list[table.Row]:
    """Rows with these values; `pass_` is the column pass."""
    wanted = {column.rstrip("_"): value for column, value in wanted.items()}
    return [row for row in rows if all(row[c] == value for c, value in wanted.items())]


def speedup(rows: list[table.Row], case: str, name: str) -> tuple[float, float, float] | None:
    """BASELINE's time over OURS: with the medians, and the least and the most that the quantiles
    allow. None when either is missing."""
    found = [select(rows, case=case, provider=p.name, pass_=name) for p in (BASELINE, OURS)]
    if not all(found):
        return None
    theirs, ours = (row for [row] in found)
    pairs = (("median_ms", "median_ms"), ("p20_ms", "p80_ms"), ("p80_ms", "p20_ms"))
    return tuple(float(theirs[over]) / float(ours[under]) for over, under in pairs)


def milliseconds(median: str) -> str:
    """Three digits that count."""
    return f"{float(median):.3g}" if float(median) < 1000 else f"{float(median):.0f}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def times(rows: list[table.Row]) -> str:
    """One row for each case, one column for each provider, all of one dtype and thread count."""
    providers = distinct(rows, "provider")
    lines, ratios = [], {name: [] for name in PASSES}
    for case in distinct(rows, "case"):
        cells = [case]
        for provider in providers:
            found = [select(rows, case=case, provider=provider, pass_=name) for name in PASSES]
            medians = [milliseconds(row[0]["median_ms"]) if row else "-" for row in found]
            cells.append(" / ".join(medians))
        both = {name: speedup(rows, case, name) for name in PASSES}
        cells.append(" / ".join(f"{ratio[0]:.1f}x" if ratio else "-" for ratio in both.values()))
        for name, ratio in both.items():
            ratios[name] += ratio[:1] if ratio else ()
        lines.append(cells)
    means = " / ".join(f"{geometric_mean(r):.1f}x" if r else "-" for r in ratios.values())
    lines.append(["geometric mean", *[""] * len(providers), means])
    return markdown(["case", *providers, "speed-up"], lines)


def memory(rows: list[table.Row]) -> str:
    """One row for each case, dtype and thread count."""
    providers = distinct(rows, "provider")
    lines = []
    for case in distinct(rows, "case"):
        for dtype in distinct(rows, "dtype"):
            for threads in distinct(rows, "threads"):
                found = select(rows, case=case, dtype=dtype, threads=threads)
                if found:
                    extra = {
                        row["provider"]: f"{row['extra_mib']} MiB, "
                        f"{float(row['extra_mib']) / float(row['output_mib']):.2f}x"
                        for row in found
                    }
                    cells = [case, dtype, threads, f"{found[0]['output_mib']} MiB"]
                    lines.append(cells + [extra.get(provider, "-") for provider in providers])
    return markdown(["case", "dtype", "threads", "output", *providers], lines)


def report(rows: list[table.Row], groups: tuple[str, ...]) -> str:
    """All tables of one file, each with a line that says what it shows."""
    last = rows[-1]
    parts = [
        f"{last['cpu']}, {last['cpus']} CPUs, {last['isa']}; torch {last['torch']}, "
        f"torch_bptt {last['torch_bptt']}, commit {last['commit'] or 'unknown'}, {last['date']}."
    ]
    for group in groups:
        for dtype in distinct(rows, "dtype"):
            for threads in distinct(rows, "threads"):
                some = select(rows, group=group, dtype=dtype, threads=threads)
                if some and group != "memory":
                    what = f"{dtype}, {'1 thread' if threads == '1' else threads + ' threads'}"
                    what += f", median milliseconds, {' / '.join(PASSES)}"
                    parts += [what + (":" if group == "main" else f", {group}:"), times(some)]
        some = select(rows, group=group)
        if some and group == "memory":
            what = "Memory of a training step beyond inputs, outputs and gradients, and this over "
            parts += [what + "the output:", memory(some)]
    return "\n\n".join(parts)


def fill(readme: str, text: str) -> str:
    """The README with what lies between the marks replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has to have the lines\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def plot(rows: list[table.Row], path: Path) -> None:
    """Speed-up by case as bars, whiskers between the 20th and 80th percentiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["pass"] in PASSES]
    panels = list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))
    cases = distinct(rows, "case")
    size = (4 + 4 * len(panels), 1.5 + 0.3 * len(cases))
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=size,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (dtype, threads) in zip(axes[0], panels, strict=True):
        some = select(rows, dtype=dtype, threads=threads)
        for index, name in enumerate(PASSES):
            bars = {at: speedup(some, case, name) for at, case in enumerate(cases)}
            bars = {at: bar for at, bar in bars.items() if bar}
            median, low, high = zip(*bars.values(), strict=True)
            axis.barh(
                [at + 0.4 * index - 0.2 for at in bars],
                median,
                height=0.38,
                label=name,
                xerr=(
                    [m - lo for m, lo in zip(median, low, strict=True)],
                    [hi - m for m, hi in zip(median, high, strict=True)],
                ),
                error_kw={"linewidth": 0.8, "capsize": 2},
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{dtype}, threads: {threads}")
        axis.set_xlabel(f"times faster than {BASELINE.name}")
        axis.set_yticks(range(len(cases)), cases)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.grid(axis="x", which="both", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlim(left=min(0.9, axes[0][0].get_xlim()[0]))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"{rows[-1]['cpu']}, {rows[-1]['isa']}, torch {rows[-1]['torch']}")
    figure.savefig(path, dpi=120)
    print(f"plot is in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="*", type=Path, help="(all in benchmarks/results)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw speed-ups; one CSV")
    parser.add_argument("--readme", action="store_true", help="fill in README.md")
    options = parser.parse_args()
    paths = options.csv or sorted((HERE / "results").glob("*.csv"))
    if not paths:
        parser.error("there are no results yet: python benchmarks/run.py makes them")
    if options.plot and len(paths) != 1:
        parser.error(f"--plot takes one CSV, not {len(paths)}")
    results = {path: table.read(path) for path in paths}
    for path, rows in results.items():
        if not rows:
            parser.error(f"{path} has no rows")
    if options.readme:
        tables = "\n\n".join(report(rows, ("main", "memory")) for rows in results.values())
        README.write_text(fill(README.read_text(), tables))
    else:
        print("\n\n".join(report(rows, ("main", "odd", "memory")) for rows in results.values()))
    if options.plot:
        plot(results[paths[0]], options.plot)


if __name__ == "__main__":
    main()
