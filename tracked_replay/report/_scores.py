"""How the scores of all training examples are spread, one small panel a target."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ._canvas import (
    FAINT,
    GREY,
    HARM,
    HELP,
    INK,
    MARGIN,
    WIDTH,
    add_axes,
    drawing_style,
    finite,
    new_figure,
    title_of_first,
    write,
)
from ._text import fitted_text, plain_text, signed

_MAX_PANELS = 12
_MAX_COLUMNS = 3
_BINS = 120  # side by side in all panels of a row
_TOP = 0.92  # inches, as all below
_PANEL_HEIGHT = 1.15
_PITCH = 1.95
_AXIS_ROOM = 0.5
_GAP = 0.25
_RIGHT = 0.35  # half of the last number hangs over the last panel


def _draw_bars(axes: Axes, scores: np.ndarray, bins_across: int) -> int:
    """Draw the bars in units of the largest |score|, so that no size of score overflows; return the highest count."""
    scale = float(np.abs(scores).max()) or 1.0
    units = scores / scale
    low, high = min(float(units.min()), 0.0), max(float(units.max()), 0.0)
    width = (high - low) / bins_across or 0.2
    most = 1
    # An edge lies at zero, so that no bar mixes help and harm.
    for side, color, end in ((scores < 0, HELP, low), (scores > 0, HARM, high)):
        if not side.any():
            continue
        bins = max(1, math.ceil(abs(end) / width - 1e-9))
        edges = np.sort(np.sign(end) * width * np.arange(bins + 1))
        counts, edges = np.histogram(np.clip(units[side], edges[0], edges[-1]), edges)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=color, edgecolor="white", linewidth=0.3)
        most = max(most, int(counts.max()))
    zeros = int(np.count_nonzero(scores == 0))
    if zeros:
        axes.bar([0.0], [zeros], 0.5 * width, color=GREY, zorder=3)
    axes.axvline(0.0, color=INK, linewidth=0.9, linestyle="--", zorder=4)
    room = 0.04 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    axes.set_xticks(_ticks(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda unit, _position: signed(unit * scale)))
    return max(most, zeros)


def _ticks(low: float, high: float) -> list[float]:
    """Ends and zero; an end so close to zero that the numbers would overlap is left out."""
    return [low] * (-low > 0.3 * (high - low)) + [0.0] + [high] * (high > 0.3 * (high - low))


def _count_axis(axes: Axes, most: int) -> None:
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.7, 2.0 * most)
    decades = max(1, math.ceil(math.log10(most)))
    # Plain counts: matplotlib's own labels of a log axis are formulas, and the figures parse none.
    axes.yaxis.set_major_locator(LogLocator(10 ** math.ceil(decades / 4)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _position: f"{count:,.0f}"))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_panel(
    figure: Figure, name: str, scores: np.ndarray, left: float, top: float, width: float, bins: int
) -> None:
    axes = add_axes(figure, left, top, width, _PANEL_HEIGHT)
    _count_axis(axes, _draw_bars(axes, scores, bins))
    below, zeros, above = (int(np.count_nonzero(side)) for side in (scores < 0, scores == 0, scores > 0))
    # From the panel's edge, not from its axis: three numbers of six digits need the room.
    edge, right = left - _AXIS_ROOM, left + width
    write(figure, edge, top - 0.38, fitted_text(name, right - edge, 9, "bold", limit=40), size=9, weight="bold")
    counts_top = top - 0.2
    write(figure, edge, counts_top, f"{below:,} help", size=7.5, color=HELP)
    write(figure, (edge + right) / 2, counts_top, f"{zeros:,} zero", size=7.5, color=GREY, align="center")
    write(figure, right, counts_top, f"{above:,} harm", size=7.5, color=HARM, align="right")


def score_histogram_figure(scores: dict[str, np.ndarray], title: str) -> Figure:
    """Draw a histogram of scores for each target, with the numbers of negative, zero and positive scores.

    `scores`: name of the target → (training examples,) scores, ∂measurement/∂weight. Counts are on a log axis, scores
    on an axis of each panel's own. The first 12 targets are drawn; the title says so where there are more. Raises
    ValueError where there is no target, or a target's scores are empty, not one-dimensional, NaN or Inf.
    """
    if not scores:
        raise ValueError("there are no targets: scores is empty")
    arrays = {name: finite(f"scores of target {plain_text(name)}", values, 1) for name, values in scores.items()}
    shown = list(arrays.items())[:_MAX_PANELS]
    title = title_of_first(title, len(shown), len(arrays), "targets")
    columns = min(len(shown), _MAX_COLUMNS)
    rows = math.ceil(len(shown) / columns)
    pitch = (WIDTH - MARGIN - _RIGHT + _GAP) / columns
    bottom = _TOP + (rows - 1) * _PITCH + _PANEL_HEIGHT + 0.35
    with drawing_style():
        figure = new_figure(bottom + 0.35, title)
        for position, (name, values) in enumerate(shown):
            row, column = divmod(position, columns)
            left = MARGIN + column * pitch + _AXIS_ROOM
            _draw_panel(figure, name, values, left, _TOP + row * _PITCH, pitch - _GAP - _AXIS_ROOM, _BINS // columns)
        note = "Across: score (< 0 helps: lowers the loss, > 0 harms: raises it).  Up: training examples, log scale."
        write(figure, MARGIN, bottom + 0.02, note, color=GREY)
    return figure
