"""What all figures share: size, style, placing in inches, checks of inputs, and the bytes of the PNG.

Only `matplotlib.figure.Figure` is used. pyplot would choose a backend and keep every figure alive.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from ._text import FONT, compact, fitted_text

DPI = 120
WIDTH = 1000 / DPI  # inches
MARGIN = 0.2  # inches, as all below
LEGEND_ROOM = 2.0
# Blue and vermilion of Okabe and Ito: told apart with every common form of colour blindness, and in print.
HELP = "#0072B2"
HARM = "#C44E00"
INK = "#222222"
GREY = "#5F6368"
FAINT = "#D5D8DC"
HELP_MARK = "▼"
HARM_MARK = "▲"
TICK_STEPS = [1, 2, 5, 10]

_STYLE = {
    "font.family": FONT,
    "font.size": 9.0,
    "text.color": INK,
    # Labels come from data sets: "$5 bill" is text, not the start of a formula.
    "text.parse_math": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.5,
    "lines.linewidth": 1.4,
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw with our settings on top of matplotlib's defaults, whatever matplotlibrc the machine has."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(height: float, title: str) -> Figure:
    """Return an empty figure, `WIDTH` × `height` inches, with its title at the upper left."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    shown = fitted_text(title, WIDTH - 2 * MARGIN, 12, "bold", limit=120)
    write(figure, MARGIN, MARGIN, shown, size=12, weight="bold")
    return figure


def title_of_first(title: str, shown: int, count: int, of: str) -> str:
    """Return a title that says so where only the first `shown` of `count` things are drawn."""
    if shown == count:
        return title
    return fitted_text(title, WIDTH - 2 * MARGIN - 3.2, 12, "bold", limit=80) + f" (the first {shown} of {count} {of})"


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes whose upper left corner lies `left` and `top` inches from the figure's; sizes in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def write(
    figure: Figure,
    left: float,
    top: float,
    text: str,
    *,
    size: float = 8.0,
    weight: str = "normal",
    color: str = INK,
    align: str = "left",
) -> Text:
    """Write one line whose top lies `top` inches below the figure's upper edge; `left` is where `align` says."""
    across, down = figure.get_size_inches()
    # "top" would hang each line by its own tallest glyph, and lines side by side would not share a baseline.
    baseline = top + size / 72
    return figure.text(
        left / across,
        1 - baseline / down,
        text,
        fontsize=size,
        fontweight=weight,
        color=color,
        horizontalalignment=align,
        verticalalignment="baseline",
        parse_math=False,
    )


def number_axis(axes: Axes, name: str, ticks: int = 5) -> None:
    """Label the vertical axis and give it about `ticks` short numbers."""
    axes.set_ylabel(name)
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=TICK_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(compact))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def step_axis(axes: Axes, steps: np.ndarray, *, labelled: bool) -> None:
    """Let the horizontal axis span `steps` (steps,); only the lowest panel of a stack is `labelled`."""
    room = 0.01 * float(steps[-1] - steps[0]) or 0.5
    axes.set_xlim(float(steps[0]) - room, float(steps[-1]) + room)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICK_STEPS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _position: f"{step:,.0f}"))
    axes.tick_params(axis="x", labelbottom=labelled)
    if labelled:
        axes.set_xlabel("training step")


def side_legend(axes: Axes, lines: Sequence[Line2D], names: Sequence[str], top: float, heading: str = "") -> None:
    """Put a legend right of the axes, in `LEGEND_ROOM`, its top at `top` (0 is the bottom of the axes, 1 their top)."""
    if not lines:
        return
    # Named afterwards: matplotlib drops an entry whose name starts with an underscore.
    legend = Legend(
        axes,
        lines,
        [f"line {number}" for number in range(len(lines))],
        loc="upper left",
        bbox_to_anchor=(1.01, top),
        borderaxespad=0,
        handlelength=2.8,
        title=heading or None,
        alignment="left",
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(fitted_text(name, LEGEND_ROOM - 0.5, 8))
    legend.get_title().set_fontweight("bold")
    # Not axes.legend, which keeps only the last of several.
    axes.add_artist(legend)


def finite(name: str, values: ArrayLike, ndim: int) -> np.ndarray:
    """Return `values` as a float64 array with `ndim` axes; refuse what is empty, not a number, NaN or Inf."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, but its type is {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, but its shape is {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    array = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = ", ".join(str(position) for position in bad[0])
        raise ValueError(f"{name} holds {len(bad)} values that are NaN or Inf, the first at [{where}]")
    return array


def checked_steps(steps: ArrayLike) -> np.ndarray:
    """Return `steps` (steps,) as float64; refuse steps that do not rise."""
    array = finite("steps", steps, 1)
    if np.any(np.diff(array) <= 0):
        raise ValueError("steps must rise strictly from each step to the next")
    return array


def check_length(name: str, found: int, expected: int, of: str) -> None:
    """Refuse a length that does not fit; the sentence names both sides."""
    if found != expected:
        raise ValueError(f"{name} has {found} entries, but there are {expected} {of}")


def figure_png_bytes(figure: Figure, dpi: float = DPI) -> bytes:
    """Return the figure as PNG; the same figure gives the same bytes.

    `dpi` is in pixels per inch: at 120 every figure of this package is 1000 pixels wide. The file names no software
    and no time.
    """
    if not dpi > 0:
        raise ValueError(f"dpi is {dpi}; it must be positive")
    buffer = io.BytesIO()
    with drawing_style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
