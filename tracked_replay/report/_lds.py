"""How far scores can be trusted: what they predicted against what retraining gave."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from ._canvas import (
    FAINT,
    GREY,
    HELP,
    INK,
    MARGIN,
    TICK_STEPS,
    WIDTH,
    add_axes,
    check_length,
    drawing_style,
    finite,
    new_figure,
    number_axis,
    side_legend,
    title_of_first,
    write,
)
from ._text import compact, fitted_text, plain_text, signed

EMPHASISED = "magic"
_MAX_PANELS = 12
_MAX_ROWS = 40
_MANY_POINTS = 500
_PREDICTED_MARK, _ACTUAL_MARK = "○", "◆"
# The emphasised method comes first; the colours are Okabe and Ito's without those that mean help and harm.
_OTHER_COLORS = ("#009E73", "#CC79A7", "#8C6D00", "#56B4E9")
_OTHER_MARKERS = ("s", "^", "D", "v", "P", "X")
_OTHER_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))


def lds_scatter_figure(
    predicted: ArrayLike, actual: ArrayLike, target_names: Sequence[str], correlations: Sequence[Any], title: str
) -> Figure:
    """Draw predicted against actual measurements, one small square panel a target, one point a subset.

    `predicted`, `actual`: (subsets, targets). `target_names`: a name a target. `correlations`: one a target, with
    attributes `spearman`, `pearson` and `slope` or as a tuple of them; NaN is undefined. Both axes of a panel have the
    same scale and a dashed line where actual = predicted, so that a wrong slope shows. The first 12 targets are drawn;
    the title says so where there are more. Raises ValueError where shapes do not match or a value is NaN or Inf.
    """
    across, up = finite("predicted", predicted, 2), finite("actual", actual, 2)
    if across.shape != up.shape:
        raise ValueError(f"predicted has the shape {across.shape}, but actual has {up.shape}")
    targets = across.shape[1]
    check_length("target_names", len(target_names), targets, "targets")
    check_length("correlations", len(correlations), targets, "targets")
    said = [_correlation_in_words(correlation) for correlation in correlations]
    note = "Across: predicted measurement.  Up: actual one, after retraining.  A point a subset; dashed: equal."
    return scatter_panels(across, up, target_names, said, title, note)


def scatter_panels(
    across: np.ndarray, up: np.ndarray, names: Sequence[str], said: Sequence[str], title: str, note: str
) -> Figure:
    """Draw a small square panel a target: `across` and `up` (points, targets), its name and what is `said` of it."""
    targets = across.shape[1]
    shown = min(targets, _MAX_PANELS)
    columns = 4 if shown > 6 or shown == 4 else min(shown, 3)
    axis_room, gap, right, top = 0.55, 0.2, 0.35, 1.0  # inches; half of the last number hangs over
    pitch = (WIDTH - MARGIN - right + gap) / columns
    side = min(pitch - gap - axis_room, 3.6)
    down = side + 0.85
    rows = math.ceil(shown / columns)
    bottom = top + (rows - 1) * down + side + 0.4
    with drawing_style():
        figure = new_figure(bottom + 0.35, title_of_first(title, shown, targets, "targets"))
        for number in range(shown):
            row, column = divmod(number, columns)
            left, panel_top = MARGIN + column * pitch + axis_room, top + row * down
            axes = add_axes(figure, left, panel_top, side, side)
            _draw_scatter(axes, across[:, number], up[:, number], side)
            edge = left - axis_room
            for text, size, weight, above in (
                (names[number], 9, "bold", 0.4),
                (said[number], 7.5, "normal", 0.22),
            ):
                fitted = fitted_text(text, side + axis_room + gap - 0.05, size, weight, limit=40)
                write(figure, edge, panel_top - above, fitted, size=size, weight=weight)
        write(figure, MARGIN, bottom + 0.02, note, color=GREY)
    return figure


def _correlation_in_words(correlation: Any) -> str:
    if hasattr(correlation, "spearman"):
        spearman, slope = correlation.spearman, correlation.slope
    else:
        spearman, _, slope = correlation
    if not math.isfinite(spearman):
        return "Spearman undefined"
    usual = 0.01 <= abs(slope) < 100
    return f"Spearman {_hundredths(spearman)}, slope {_minus(f'{slope:.2f}') if usual else compact(slope)}"


def _hundredths(value: float) -> str:
    """A correlation with two digits after the point, three from 0.99 on: 0.994 is not 0.999."""
    return _minus(f"{value:.3f}" if abs(value) >= 0.99 else f"{value:.2f}")


def _minus(number: str) -> str:
    """A written number with a real minus sign, and none before zero."""
    return ("−" if float(number) else "") + number[1:] if number.startswith("-") else number


def _draw_scatter(axes: Axes, predicted: np.ndarray, actual: np.ndarray, side: float) -> None:
    """Draw one panel, `side` inches wide and high."""
    # In a power of ten where numbers are so large or small that matplotlib's own arithmetic would over- or underflow.
    largest = max(float(np.abs(predicted).max()), float(np.abs(actual).max()))
    unit = 1.0 if largest == 0 or 1e-100 < largest < 1e100 else 10.0 ** max(-300, math.floor(math.log10(largest)))
    predicted, actual = predicted / unit, actual / unit
    low, high = min(predicted.min(), actual.min()), max(predicted.max(), actual.max())
    room = 0.06 * (high - low)
    if room <= 1e-12 * max(abs(low), abs(high)):  # nothing varies: floats have no room for a closer look
        room = 0.05 * max(abs(low), abs(high)) or 1.0
    low, high = low - room, high + room
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.9, linestyle="--", zorder=1)
    size = 14 if len(predicted) <= _MANY_POINTS else 4
    axes.scatter(predicted, actual, s=size, color=HELP, alpha=0.75, linewidths=0, zorder=2)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    digits = _digits(low, high)
    ticks = _ticks_with_room(low, high, lambda value: (0.072 * len(_text(value * unit, digits)) + 0.06) / side)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _position: _text(value * unit, digits)))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _ticks_with_room(low: float, high: float, width: Callable[[float], float]) -> list[float]:
    """Round numbers that have room between `low` and `high`, else the ends; `width` is a number's share of the axis."""
    found = MaxNLocator(3, steps=TICK_STEPS).tick_values(low, high)
    ticks = [float(tick) for tick in found if low <= tick <= high]
    room = max(map(width, ticks), default=0.0) * (high - low)
    while len(ticks) > 1 and ticks[1] - ticks[0] < room:
        ticks = ticks[::2]
    return ticks if len(ticks) > 1 else [low, high]


def _digits(low: float, high: float) -> int:
    """Significant digits that tell ticks apart: losses of 2.3412 and 2.3419 are both 2.34."""
    return min(9, max(2, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))))


def _text(value: float, digits: int) -> str:
    return _minus(f"{value + 0.0:.{digits}g}")


def lds_by_drop_figure(
    drops: ArrayLike,
    means: Mapping[str, ArrayLike],
    lows: Mapping[str, ArrayLike],
    highs: Mapping[str, ArrayLike],
    title: str,
) -> Figure:
    """Draw the linear datamodeling score of each method by the share of training examples removed, with intervals.

    `drops`: (shares,), each above 0 and below 1, rising. `means`, `lows`, `highs`: method → (shares,); NaN where it is
    undefined. The method `magic` stands out and its numbers are written beside its points. One share gives one row a
    method. Raises ValueError where lengths or methods do not match or an interval ends before it starts.
    """
    shares = finite("drops", drops, 1)
    if shares.min() <= 0 or shares.max() >= 1 or np.any(np.diff(shares) <= 0):
        raise ValueError(f"drops must rise and lie above 0 and below 1, but are {shares.tolist()}")
    if not means:
        raise ValueError("there are no methods: means is empty")
    for name, other in (("lows", lows), ("highs", highs)):
        if set(other) != set(means):
            raise ValueError(f"{name} has the methods {sorted(other)}, but means has {sorted(means)}")
    methods = sorted(means, key=lambda method: method != EMPHASISED)  # the others keep their order
    values = {method: _interval(method, means, lows, highs, len(shares)) for method in methods}
    with drawing_style():
        if len(shares) == 1:
            return _rows_of_methods(shares[0], values, title)
        return _lines_of_methods(shares, values, title)


def _interval(
    method: str, means: Mapping[str, ArrayLike], lows: Mapping[str, ArrayLike], highs: Mapping[str, ArrayLike], n: int
) -> np.ndarray:
    """Mean, low and high of a method as (3, shares); a mean without an interval has an interval of no width."""
    rows = []
    for name, given in (("means", means), ("lows", lows), ("highs", highs)):
        row = np.asarray(given[method], dtype=np.float64)
        check_length(f"{name} of {plain_text(method)}", row.size, n, "drop shares")
        if np.isinf(row).any():
            raise ValueError(f"{name} of {plain_text(method)} holds Inf")
        rows.append(row.reshape(-1))
    mean, low, high = rows
    low, high = np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high)
    if np.any(low > high):
        raise ValueError(f"lows of {plain_text(method)} lie above its highs")
    return np.stack([mean, low, high])


def _look(method: str, number: int) -> dict[str, Any]:
    """Colour, marker and dash of the method at a place; the emphasised one has a look of its own."""
    if method == EMPHASISED:
        return {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 2.6, "markersize": 5.5, "zorder": 4}
    return {
        "color": _OTHER_COLORS[number % len(_OTHER_COLORS)],
        "marker": _OTHER_MARKERS[number % len(_OTHER_MARKERS)],
        "linestyle": _OTHER_DASHES[number % len(_OTHER_DASHES)],
        "linewidth": 1.2,
        "markersize": 5,
        "zorder": 3,
    }


def _looks(methods: Sequence[str]) -> list[dict[str, Any]]:
    others = [method for method in methods if method != EMPHASISED]
    return [_look(method, others.index(method) if method in others else 0) for method in methods]


def _span(values: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Lower and upper limit of an axis of correlations; zero and one always lie inside."""
    every = np.concatenate([row.ravel() for row in values.values()])
    every = every[np.isfinite(every)]
    return min(0.0, every.min(initial=0.0)) - 0.06, max(1.0, every.max(initial=1.0)) + 0.06


def _lines_of_methods(shares: np.ndarray, values: Mapping[str, np.ndarray], title: str) -> Figure:
    top, left, height, legend_room = 0.65, 0.95, 3.4, 1.9  # inches
    figure = new_figure(top + height + 0.7, title)
    axes = add_axes(figure, left, top, WIDTH - left - MARGIN - legend_room, height)
    lines: list[Line2D] = []
    # Shares stand at equal distances: 0.01, 0.05, 0.1, 0.2 would crowd at one end of a linear axis. The methods stand
    # side by side, so that intervals do not cover each other.
    places = np.arange(len(shares))
    apart = min(0.06, 0.4 / len(values))
    for number, ((method, (mean, low, high)), look) in enumerate(
        zip(values.items(), _looks(list(values)), strict=True)
    ):
        at = places + apart * (number - (len(values) - 1) / 2)
        axes.vlines(at, low, high, color=look["color"], linewidth=0.6 * look["linewidth"], zorder=look["zorder"])
        lines += axes.plot(at, mean, **look)
        if method == EMPHASISED:
            for place, value, end in zip(at, mean, high, strict=True):
                if math.isfinite(value):
                    axes.annotate(
                        _hundredths(value),
                        (place, end),
                        xytext=(0, 5),
                        textcoords="offset points",
                        ha="center",
                        va="bottom",
                        size=8,
                        weight="bold",
                    )
    side_legend(axes, lines, list(values), 1.0)
    axes.axhline(0.0, color=INK, linewidth=0.9)
    number_axis(axes, "linear datamodeling score")
    low_limit, high_limit = _span(values)
    axes.set_ylim(low_limit, high_limit + 0.04)
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_xticks(places, [_percent(share) for share in shares])
    axes.set_xlabel("share of the training examples removed")
    return figure


def _rows_of_methods(share: float, values: Mapping[str, np.ndarray], title: str) -> Figure:
    top, left, numbers, pitch = 0.65, 1.5, 1.75, 0.36  # inches
    height = pitch * len(values) + 0.1
    figure = new_figure(top + height + 0.75, title)
    axes = add_axes(figure, left, top, WIDTH - left - MARGIN - numbers, height)
    axes.axvline(0.0, color=INK, linewidth=0.9)
    for row, ((method, columns), look) in enumerate(zip(values.items(), _looks(list(values)), strict=True)):
        mean, low, high = columns[:, 0]
        weight = "bold" if method == EMPHASISED else "normal"
        axes.hlines(row, low, high, color=look["color"], linewidth=look["linewidth"], zorder=look["zorder"])
        axes.plot([mean], [row], **look)
        baseline = top + 0.05 + pitch * (row + 0.5) - 0.06
        write(
            figure,
            left - 0.1,
            baseline,
            fitted_text(method, left - 0.3, 9, weight),
            size=9,
            weight=weight,
            align="right",
        )
        words = (
            f"{_hundredths(mean)}  ({_hundredths(low)} to {_hundredths(high)})" if math.isfinite(mean) else "undefined"
        )
        write(figure, WIDTH - MARGIN - numbers + 0.1, baseline, words, size=8.5, weight=weight)
    axes.set_ylim(len(values) - 0.5 + 0.05 / pitch, -0.5 - 0.05 / pitch)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(*_span(values))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(compact))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"linear datamodeling score, {_percent(share)} of the training examples removed")
    return figure


def _percent(share: float) -> str:
    return f"{compact(100 * share)} %"


def counterfactual_figure(
    target_names: Sequence[str], recorded: ArrayLike, predicted: ArrayLike, actual: ArrayLike, title: str
) -> Figure:
    """Draw for every target how its measurement changes, as predicted and after retraining.

    `target_names`: a name a target. `recorded`, `predicted`, `actual`: (targets,) measurements. Changes are against
    the recorded measurement, which stands beside the name and at the line in the middle: they are often much smaller
    than the differences between targets. The first 40 targets are drawn; the title says so where there are more.
    Raises ValueError where lengths do not match or a value is NaN or Inf.
    """
    base = finite("recorded", recorded, 1)
    check_length("target_names", len(target_names), len(base), "targets")
    changes = []
    for name, values in (("predicted", predicted), ("actual", actual)):
        measurement = finite(name, values, 1)
        check_length(name, len(measurement), len(base), "targets")
        changes.append(finite(f"the change from recorded to {name}", measurement - base, 1))
    shown = min(len(base), _MAX_ROWS)
    top, left, numbers, pitch = 0.95, 2.6, 1.75, 0.27  # inches
    height = pitch * shown + 0.1
    with drawing_style():
        figure = new_figure(top + height + 0.7, title_of_first(title, shown, len(base), "targets"))
        axes = add_axes(figure, left, top, WIDTH - left - MARGIN - numbers, height)
        for row in range(shown):
            baseline = top + 0.05 + pitch * (row + 0.5) - 0.06
            write(figure, MARGIN, baseline, fitted_text(target_names[row], left - MARGIN - 1.05, 8.5), size=8.5)
            for right, text in (
                (left - 0.15, compact(base[row])),
                (WIDTH - MARGIN - 0.85, signed(changes[0][row])),
                (WIDTH - MARGIN, signed(changes[1][row])),
            ):
                write(figure, right, baseline, text, size=8.5, align="right")
        _draw_changes(axes, changes[0][:shown], changes[1][:shown])
        axes.set_ylim(shown - 0.5 + 0.05 / pitch, -0.5 - 0.05 / pitch)
        headings = (
            (MARGIN, "target", INK, "left"),
            (left - 0.15, "recorded", INK, "right"),
            (WIDTH - MARGIN - 0.85, f"{_PREDICTED_MARK} predicted", HELP, "right"),
            (WIDTH - MARGIN, f"{_ACTUAL_MARK} actual", INK, "right"),
        )
        for place, text, color, align in headings:
            write(figure, place, top - 0.22, text, weight="bold", color=color, align=align)
    return figure


def _draw_changes(axes: Axes, predicted: np.ndarray, actual: np.ndarray) -> None:
    """One row a target: both changes, and a line between them as long as the error."""
    rows = np.arange(len(predicted))
    scale = float(max(np.abs(predicted).max(), np.abs(actual).max()))
    unit = scale or 1.0  # in units of the largest, so that no size over- or underflows
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.hlines(rows, predicted / unit, actual / unit, color=GREY, linewidth=1.2, zorder=2)
    axes.plot(actual / unit, rows, linestyle="", marker="D", markersize=5, color=INK, zorder=3)
    hollow: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": HELP, "markeredgewidth": 1.6}
    axes.plot(predicted / unit, rows, linestyle="", marker="o", markersize=9, zorder=4, **hollow)
    both = np.concatenate([predicted, actual]) / unit
    low, high = min(0.0, float(both.min())), max(0.0, float(both.max()))
    room = 0.06 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    ends = [low] * (-low > 0.3 * (high - low)) + [0.0] + [high] * (high > 0.3 * (high - low))
    axes.set_xticks(ends)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: signed(value * unit)))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("change of the measurement; 0 is the recorded run")
