"""A picture of the benchmarks' rows: one panel a question, logarithmic where sizes are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from measuring import Row

Rows = Mapping[str, Sequence[Row]]

GOAL = "#C44E00"


def picture(rows: Rows) -> Figure:
    """A panel for each benchmark that was run and has one, and one for all numbers that have a goal."""
    drawn: list[tuple[Callable[[Axes, Sequence[Row]], None], Sequence[Row]]] = [
        (panel, rows[name]) for name, panel in PANELS.items() if name in rows
    ]
    promised = [row for found in rows.values() for row in found if row.at_most is not None]
    if promised:
        drawn.append((_goals, promised))
    lines = max(1, -(-len(drawn) // 2))
    figure = Figure(figsize=(11, 4.2 * lines), layout="constrained")
    for place, (panel, found) in enumerate(drawn, start=1):
        axes = figure.add_subplot(lines, 2, place)
        panel(axes, found)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
    return figure


def _replay_cost(axes: Axes, rows: Sequence[Row]) -> None:
    each = [row for row in rows if row.key.endswith("_each")]
    counts = [int(str(row.parameters["targets"])) for row in each]
    axes.errorbar(counts, [row.value for row in each], _spread(each), marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(title="Replay: training steps a target", xlabel="targets", xticks=counts, xticklabels=counts)
    for row, count in zip(each, counts, strict=True):
        if row.at_most is not None:
            axes.plot(count, row.at_most, marker="_", markersize=18, color=GOAL)


def _scaling(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        sizes = [float(size) for size in row.raw]
        times = [min(found) for found in row.raw.values()]
        label = f"{row.parameters['over']}: exponent {row.value:.2f}"
        axes.plot([size / sizes[0] for size in sizes], [found / times[0] for found in times], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(title="Replay time, fastest round", xlabel="size ÷ smallest size", ylabel="time ÷ that at the smallest")
    axes.legend()


def _memory(axes: Axes, rows: Sequence[Row]) -> None:
    for key, label in (("memory", "memory mode"), ("stream", "stream mode"), ("disk", "states on disk")):
        found = [row for row in rows if row.key.startswith(f"{key}_") and row.key.split("_")[1].isdigit()]
        steps = [int(row.key.split("_")[1]) for row in found]
        axes.errorbar(steps, [row.value for row in found], _spread(found), marker="o", capsize=3, label=label)
    axes.set(xscale="log", yscale="log", title="Peak memory of a replay over the base", xlabel="steps T", ylabel="MB")
    axes.set_xticks(steps, [str(step) for step in steps], minor=False)
    axes.legend()


def _lds_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    found = [row for row in rows if row.key.startswith("an_hour")]
    axes.barh(
        [row.what.removeprefix("retrainings, ") for row in found], [row.value for row in found], xerr=_spread(found)
    )
    axes.invert_yaxis()
    axes.set(title="Retrainings an hour", xlim=(0, None))
    axes.locator_params(axis="x", nbins=5)


def _goals(axes: Axes, rows: Sequence[Row]) -> None:
    names = [row.what.partition(":")[0] for row in rows]
    shares = [row.value / float(row.at_most or 1) for row in rows]
    axes.plot(shares, range(len(rows)), "o")
    axes.axvline(1, color=GOAL)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", title="Value ÷ what it should be at most")


def _spread(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """How far the smallest and the largest round lie from the median."""
    return [row.value - min(row.values) for row in rows], [max(row.values) - row.value for row in rows]


PANELS: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "replay_cost": _replay_cost,
    "scaling": _scaling,
    "memory": _memory,
    "lds_throughput": _lds_throughput,
}
