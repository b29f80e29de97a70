"""The pictures: one of each kind for each device, dtype and number of threads in the rows.

ratio   by case, how many times slower than torch_bptt.RNN
time    along H, T and B
peak    by case, the fraction of the machine's arithmetic peak
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import table
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter
from table import Ratio, Row, distinct, ratio, select

from torch_bptt.bench import OURS, PASSES

matplotlib.use("Agg")
pyplot.rcParams.update(
    {
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.alpha": 0.3,
    }
)


Colors = dict[str, str]  # of the providers, the same in all pictures


def finish(figure: pyplot.Figure, axes: list[pyplot.Axes], title: str, path: Path) -> Path:
    """One legend for all axes, a title, and the file."""
    legend = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bars(axis: pyplot.Axes, colors: Colors, values: dict[str, list[Ratio | None]]) -> None:
    """For each case a group of bars, one for each provider, whiskers from low to high."""
    height = 0.8 / len(values)
    for index, (provider, by_case) in enumerate(values.items()):
        there = {at: value for at, value in enumerate(by_case) if value}
        if not there:
            continue
        axis.barh(
            [at + (index + 0.5) * height - 0.4 for at in there],
            [value.median for value in there.values()],
            height=0.9 * height,
            color=colors[provider],
            label=provider,
            xerr=[
                [value.median - value.low for value in there.values()],
                [value.high - value.median for value in there.values()],
            ],
            error_kw={"linewidth": 0.8, "alpha": 0.6},
        )
    axis.grid(axis="y", visible=False)


def by_case(
    rows: list[Row], colors: Colors, providers: list[str], value: Callable, label: str
) -> tuple:
    """A figure with a panel for each pass, in it bars of value(rows of a case, provider, pass)."""
    cases = distinct(rows, "case")
    height = 1.6 + len(cases) * (0.2 + 0.12 * len(providers))
    figure, axes = pyplot.subplots(1, len(PASSES), figsize=(11, height), sharex=True, sharey=True)
    for axis, name in zip(axes, PASSES, strict=True):
        of_case = [select(rows, case=case) for case in cases]
        values = {who: [value(some, who, name) for some in of_case] for who in providers}
        bars(axis, colors, values)
        axis.set_title(name)
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].invert_yaxis()
    return figure, axes


def ratios(rows: list[Row], colors: Colors) -> tuple:
    peers = [name for name in distinct(rows, "provider") if name != OURS.name]
    figure, axes = by_case(rows, colors, peers, ratio, f"times slower than {OURS.name}")
    for axis in axes:
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.xaxis.set_minor_formatter(NullFormatter())
    return figure, axes


def fraction(rows: list[Row], provider: str, name: str) -> Ratio | None:
    """Of the peak, in percent, on one case."""
    found = select(rows, provider=provider, pass_=name)
    if not found:
        return None
    [row] = found
    shortest = 1e3 * float(row["gflop"]) / float(row["peak_gflops"])  # ms
    return Ratio(*(100 * shortest / float(row[f"{q}_ms"]) for q in ("median", "p80", "p20")))


def peaks(rows: list[Row], colors: Colors) -> tuple:
    everyone = distinct(rows, "provider")
    figure, axes = by_case(rows, colors, everyone, fraction, "percent of the peak")
    axes[0].set_xlim(left=0)
    return figure, axes


def times(rows: list[Row], colors: Colors) -> tuple:
    """A panel for each size that is swept and each pass: a line for each provider."""
    sweeps = distinct(rows, "group")
    figure, axes = pyplot.subplots(
        len(PASSES), len(sweeps), figsize=(4 * len(sweeps), 7), sharex="col", squeeze=False
    )
    for column, sweep in zip(axes.T, sweeps, strict=True):
        size = sweep.removeprefix("sweep-")
        for axis, name in zip(column, PASSES, strict=True):
            some = select(rows, group=sweep, pass_=name)
            for provider in distinct(some, "provider"):
                line = select(some, provider=provider)
                x = [int(row[size]) for row in line]
                axis.plot(
                    x,
                    [float(row["median_ms"]) for row in line],
                    marker="o",
                    markersize=3,
                    color=colors[provider],
                    label=provider,
                )
                low, high = ([float(row[q]) for row in line] for q in ("p20_ms", "p80_ms"))
                axis.fill_between(x, low, high, color=colors[provider], alpha=0.2, linewidth=0)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title(name)
        column[-1].set_xlabel(fixed(rows, sweep))
    for line in axes:
        line[0].set_ylabel("ms")
    return figure, list(axes.flat)


def fixed(rows: list[Row], sweep: str) -> str:
    """What grows along a sweep, and what stays: H = I; T 100, B 32."""
    some = select(rows, group=sweep)
    size = sweep.removeprefix("sweep-")
    same = [s for s in "TBIH" if s != size and all(row[s] == row[size] for row in some)]
    stay = [f"{s} {some[0][s]}" for s in "TBIH" if len(distinct(some, s)) == 1]
    return f"{' = '.join([size, *same])}; {', '.join(stay)}"


def draw(rows: list[Row], folder: Path) -> Iterator[Path]:
    """All pictures that the rows allow, into a folder."""
    colors = {provider: f"C{n}" for n, provider in enumerate(distinct(rows, "provider"))}
    for device, dtype, threads in table.settings(rows):
        here = select(rows, device=device, dtype=dtype, threads=threads)
        timed = [row for row in here if row["pass"] in PASSES]
        groups = {
            name: select(timed, group=name)
            for name in distinct(timed, "group")
            if not name.startswith("sweep-")
        }
        swept = [row for row in timed if row["group"].startswith("sweep-")]
        figures = {f"time-{device}": (times, swept)} if swept else {}
        for name, some in groups.items() if device == "cpu" else ():
            figures |= {f"ratio-{name}": (ratios, some), f"peak-{name}": (peaks, some)}
        last = here[-1]
        title = f"{last['cpu']}, {last['isa']}, {table.count(threads)}, {dtype}"
        for name, (make, some) in figures.items():
            yield finish(
                *make(some, colors), title, folder / f"{name}-{dtype}-threads{threads}.png"
            )
