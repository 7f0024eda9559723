"""How far the states of two trainings are apart, step by step."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from ._canvas import (
    FAINT,
    GREY,
    HARM,
    INK,
    MARGIN,
    WIDTH,
    add_axes,
    check_length,
    checked_steps,
    drawing_style,
    new_figure,
    side_legend,
    step_axis,
    write,
)
from ._compare import ending
from ._text import _MINUS, _width

if TYPE_CHECKING:
    from tracked_replay.compare.result import Comparison

# Okabe and Ito without blue and vermilion, which mean help and harm elsewhere.
_KINDS = {"parameters": ("#009E73", "--"), "buffers": ("#CC79A7", ":"), "momentum": ("#56B4E9", "-.")}
_MAX_COLUMNS = 280
_MAX_ROWS = 240
_MAX_MARKED = 60
_MAX_TICKS = 6
_MAX_UNEVENNESS = 4
_NO_DIFFERENCE = "#E4E7EA"
_TITLE = "How far the states are apart along the training"
_LEFT = 2.15  # inches, as all below
_RIGHT = 1.95
_TOP = 0.95
_LINES_HEIGHT = 2.1
_BETWEEN = 0.35
_BOTTOM = 0.65
_ROW_HEIGHT = 0.15
_NAME_HEIGHT = 0.115
_NAME_SIZE = 6.5  # points
_KIND_ROOM = 0.85
_MIN_MAP_HEIGHT = 1.0
_MAX_MAP_HEIGHT = 8.4


class _Drift(NamedTuple):
    """What is drawn.

    Attributes:
        steps: (steps,), rising.
        names: of the tensors.
        apart: (tensors, steps), largest absolute difference; NaN where it is unknown.
        low, high: decades that the positive differences lie in; `high` is above `low`.
    """

    steps: np.ndarray
    names: list[str]
    apart: np.ndarray
    low: int
    high: int

    @property
    def any_positive(self) -> bool:
        return bool((self.apart > 0).any())

    @property
    def floor(self) -> float:
        """Where a difference of 0 lies on the axis of decades, below all others."""
        return self.low - max(0.5, 0.12 * (self.high - self.low))

    @property
    def uneven(self) -> bool:
        """Whether the states lie so far from evenly apart that some columns would be too thin to be seen.

        States are often closest right after two trainings part, where most is to be seen.
        """
        gaps = np.diff(self.steps)
        return len(gaps) > 0 and bool(gaps.max() > _MAX_UNEVENNESS * gaps.min())

    @property
    def places(self) -> np.ndarray:
        """Where each state is drawn, (steps,): at its step, or side by side with the one before."""
        return np.arange(len(self.steps), dtype=np.float64) if self.uneven else self.steps

    @property
    def edges(self) -> np.ndarray:
        """Where one state's column ends and the next one's begins, (steps + 1,)."""
        places = self.places
        if len(places) == 1:
            return places[0] + np.array([-0.5, 0.5])
        middles = (places[1:] + places[:-1]) / 2
        return np.concatenate([[2 * places[0] - middles[0]], middles, [2 * places[-1] - middles[-1]]])

    def place_of(self, step: int) -> float | None:
        """Where a step is marked: at the left edge if before the first state; ``None`` if after the last."""
        if step > self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.places, left=self.edges[0]))


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _checked_drift(comparison: Comparison) -> _Drift:
    drift = comparison.drift
    steps = checked_steps(drift.steps)
    check_length("drift.largest_absolute", len(drift.largest_absolute), len(drift.tensors), "tensors")
    for name, row in zip(drift.tensors, drift.largest_absolute, strict=True):
        check_length(f"the row of {ending(name, 40)}", len(row), len(steps), "steps")
    apart = np.array(drift.largest_absolute, dtype=np.float64)  # None becomes NaN
    apart[~np.isfinite(apart)] = np.nan
    positive = apart[apart > 0]
    low, high = (
        (int(np.floor(np.log10(positive.min()))), int(np.ceil(np.log10(positive.max())))) if len(positive) else (0, 1)
    )
    return _Drift(steps, list(drift.tensors), apart, low, max(high, low + 1))


def _decades(drift: _Drift, apart: np.ndarray) -> np.ndarray:
    """Differences as powers of ten; 0 lies on the floor, NaN stays."""
    with np.errstate(divide="ignore"):
        return np.where(apart == 0, drift.floor, np.log10(apart))


def _largest(apart: np.ndarray, axis: int) -> np.ndarray:
    """Largest known difference; NaN where none is known."""
    known = np.where(np.isnan(apart), -1.0, apart).max(axis=axis)
    return np.where(known < 0, np.nan, known)


def _decade_ticks(drift: _Drift) -> list[int]:
    return list(range(drift.low, drift.high + 1, max(1, -(-(drift.high - drift.low) // _MAX_TICKS))))


def _decade_name(value: float, floor: float) -> str:
    if value == floor:
        return "0"
    return f"1e{int(value)}".replace("-", _MINUS) if value else "1"


def _draw_lines(axes: Axes, drift: _Drift) -> None:
    marker = "." if len(drift.steps) <= _MAX_MARKED else ""
    largest = _decades(drift, _largest(drift.apart, 0))
    lines = axes.plot(drift.places, largest, color=INK, linewidth=2.4, marker=marker)
    names = [f"all {len(drift.names):,} tensors" if len(drift.names) > 1 else "the tensor"]
    kinds = np.array([_kind(name) for name in drift.names])
    if len(set(kinds)) > 1:
        for kind, (color, dashes) in _KINDS.items():
            rows = drift.apart[kinds == kind]
            if len(rows):
                of_kind = _decades(drift, _largest(rows, 0))
                lines += axes.plot(drift.places, of_kind, color=color, linestyle=dashes, linewidth=1.1)
                names.append(f"{kind} ({len(rows):,})")
    ticks = _decade_ticks(drift) if drift.any_positive else []
    axes.yaxis.set_major_locator(FixedLocator([drift.floor, *ticks]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: _decade_name(value, drift.floor)))
    axes.set_ylim(
        drift.floor - 0.05 * (drift.high - drift.floor), drift.high if drift.any_positive else drift.floor + 1
    )
    axes.set_ylabel("largest |a − b|")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    side_legend(axes, lines, names, 1.0, "largest over")


def _together(drift: _Drift) -> int:
    """How many neighbouring states share a column, where there are more than can be seen."""
    return -(-len(drift.steps) // _MAX_COLUMNS)


def _columns(drift: _Drift) -> tuple[np.ndarray, np.ndarray]:
    """Edges (columns + 1,) and differences (tensors, columns); a column holds the largest of its states."""
    starts = np.arange(0, len(drift.steps), _together(drift))
    edges = drift.edges
    parts = np.split(drift.apart, starts[1:], axis=1)
    return np.append(edges[starts], edges[-1]), np.stack([_largest(part, 1) for part in parts], axis=1)


def _fitting(name: str, inches: float) -> str:
    """The end of a name, as much of it as there is room for."""
    limit = 48
    while limit > 2 and _width(ending(name, limit), _NAME_SIZE, "normal") > 72 * inches:
        limit -= 1
    return ending(name, limit)


def _name_kinds(axes: Axes, names: list[str], height: float) -> bool:
    """Name each kind of tensors beside its rows, if there is room for all; whether it was done."""
    runs = [(kind, len(list(run))) for kind, run in groupby(names, key=_kind)]
    if any(kind not in _KINDS or count * height < _KIND_ROOM * len(names) for kind, count in runs):
        return False
    start = 0
    place = -(_LEFT - MARGIN - 0.05) / (WIDTH - _LEFT - _RIGHT)
    for kind, count in runs:
        axes.text(
            place,
            start + count / 2,
            kind,
            transform=axes.get_yaxis_transform(),
            rotation=90,
            fontsize=8,
            fontweight="bold",
            color=GREY,
            va="center",
            ha="center",
        )
        if start:
            axes.axhline(start, color=INK, linewidth=0.8)
        start += count
    return True


def _name_rows(axes: Axes, names: list[str], height: float) -> None:
    """Name every row, or every so many where there are too many to read."""
    room = _LEFT - MARGIN - 0.1
    if _name_kinds(axes, names, height):
        names, room = [name.partition("/")[2] for name in names], room - 0.2
    every = -(-len(names) // int(height / _NAME_HEIGHT))
    places = range(0, len(names), every)
    axes.yaxis.set_major_locator(FixedLocator([place + 0.5 for place in places]))
    axes.set_yticklabels([_fitting(names[place], room) for place in places], fontsize=_NAME_SIZE)
    axes.tick_params(axis="y", length=2)


def _draw_map(axes: Axes, drift: _Drift, height: float) -> None:
    # Unknown cells are left out, and the hatching behind them shows.
    axes.patch.set(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0.0)
    colours = colormaps["viridis_r"].with_extremes(under=_NO_DIFFERENCE)
    edges, apart = _columns(drift)
    cells = np.ma.masked_invalid(_decades(drift, apart))
    rows = np.arange(len(drift.names) + 1)
    axes.pcolormesh(edges, rows, cells, cmap=colours, norm=Normalize(drift.low, drift.high))
    axes.set_ylim(len(drift.names), 0)
    _name_rows(axes, drift.names, height)


def _draw_scale(figure: Figure, axes: Axes, drift: _Drift, top: float) -> None:
    """The colours' meaning, right of the map: no difference, unknown, and the decades."""
    patches = [Patch(facecolor=_NO_DIFFERENCE, edgecolor=GREY, linewidth=0.5)]
    names = ["0"]
    if np.isnan(drift.apart).any():
        patches.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", linewidth=0.5))
        names.append("unknown")
    legend = axes.legend(
        patches, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, alignment="left"
    )
    legend.set_title("each tensor")
    legend.get_title().set_fontweight("bold")
    if drift.any_positive:
        bar = add_axes(figure, WIDTH - _RIGHT + 0.12, top + 0.6, 0.14, 1.4)
        colours = ScalarMappable(Normalize(drift.low, drift.high), "viridis_r")
        figure.colorbar(colours, cax=bar, ticks=_decade_ticks(drift)).outline.set_linewidth(0.5)
        bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: _decade_name(value, np.nan)))
        bar.set_ylabel("largest |a − b|")


def _state_axis(axes: Axes, drift: _Drift, *, labelled: bool) -> None:
    """Let the horizontal axis span all columns, and name it by the states' numbers."""
    step_axis(axes, drift.places, labelled=labelled)
    axes.set_xlim(drift.edges[0], drift.edges[-1])
    if labelled:
        axes.set_xlabel("steps taken before the state")
    if drift.uneven:
        names = dict(zip(drift.places, drift.steps, strict=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda place, _position: f"{names[place]:,.0f}" if place in names else "")
        )


def _mark_first_step(figure: Figure, panels: list[Axes], drift: _Drift, step: int) -> None:
    place = drift.place_of(step)
    if place is None:
        return
    for panel in panels:
        panel.axvline(place, color=HARM, linewidth=1.2, zorder=5, clip_on=False)
    across = WIDTH - _LEFT - _RIGHT
    share = (place - drift.edges[0]) / (drift.edges[-1] - drift.edges[0])
    align = "left" if share < 0.5 else "right"
    write(figure, _LEFT + share * across, _TOP - 0.2, f"first divergent step {step:,}", color=HARM, align=align)


def _empty_figure() -> Figure:
    figure = new_figure(1.1, _TITLE)
    write(figure, MARGIN, 0.6, "There are no states along the training to compare.", color=GREY)
    return figure


def _drawn_rows(drift: _Drift) -> _Drift:
    """Where there are more tensors than rows that can be seen: those that differ somewhere come first."""
    if len(drift.names) <= _MAX_ROWS:
        return drift
    differ = ~(drift.apart == 0).all(axis=1)
    rows = np.sort(np.argsort(~differ, kind="stable")[:_MAX_ROWS])
    return drift._replace(names=[drift.names[row] for row in rows], apart=drift.apart[rows])


def _notes(drift: _Drift, rows: _Drift) -> list[str]:
    """What the eye would not see."""
    notes: list[str] = []
    if not drift.any_positive and not np.isnan(drift.apart).any():
        notes.append("no difference at any state")
    if drift.uneven:
        notes.append("states side by side, not to scale")
    if _together(drift) > 1:
        notes.append(f"below, a column is the largest of {_together(drift)} neighbouring states")
    if len(rows.names) < len(drift.names):
        notes.append(f"{len(rows.names)} of {len(drift.names):,} tensors have a row, first those that differ")
    return notes


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw how far the states of two trainings are apart.

    Above, the largest absolute difference over all tensors at each step and over those of each kind, on a log scale
    with a place for 0 below; under it a row a tensor. A vertical line marks the first divergent step, at the left edge
    where all states that are drawn come later. States far from evenly apart are drawn side by side. Over 280 states, a
    column of the lower panel is the largest of several neighbours; over 240 tensors, those that differ come first;
    notes say so. Without states along the training, a sentence stands in their place. Raises ValueError where the
    lengths in ``comparison.drift`` do not match.
    """
    with drawing_style():
        if not comparison.drift.steps or not comparison.drift.tensors:
            return _empty_figure()
        drift = _checked_drift(comparison)
        rows = _drawn_rows(drift)
        map_height = min(max(_ROW_HEIGHT * len(rows.names), _MIN_MAP_HEIGHT), _MAX_MAP_HEIGHT)
        map_room = max(map_height, 2.1 if drift.any_positive else _MIN_MAP_HEIGHT)
        figure = new_figure(_TOP + _LINES_HEIGHT + _BETWEEN + map_room + _BOTTOM, _TITLE)
        across = WIDTH - _LEFT - _RIGHT
        map_top = _TOP + _LINES_HEIGHT + _BETWEEN
        panels = [
            add_axes(figure, _LEFT, _TOP, across, _LINES_HEIGHT),
            add_axes(figure, _LEFT, map_top, across, map_height),
        ]
        for panel in panels:
            _state_axis(panel, drift, labelled=panel is panels[-1])
        _draw_lines(panels[0], drift)
        _draw_map(panels[1], rows, map_height)
        _draw_scale(figure, panels[1], rows, map_top)
        if comparison.first_divergent_step is not None:
            _mark_first_step(figure, panels, drift, comparison.first_divergent_step)
        write(figure, MARGIN, _TOP - 0.42, "; ".join(_notes(drift, rows)), color=GREY)
    return figure
