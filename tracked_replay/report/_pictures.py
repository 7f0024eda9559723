"""A target beside the training images that helped and harmed it most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ._canvas import (
    GREY,
    HARM,
    HARM_MARK,
    HELP,
    HELP_MARK,
    INK,
    MARGIN,
    WIDTH,
    add_axes,
    drawing_style,
    new_figure,
    write,
)
from ._text import compact, fitted_text, signed

_MAX_PICTURES = 32
_COLUMNS = (4, 8)  # fewest, most
_TARGET_SIZE = 1.75  # inches, as all below
_ROWS_LEFT = MARGIN + _TARGET_SIZE + 0.35
_ROWS_TOP = 0.6
_HEADING = 0.26
_LINE = 0.155
_GAP = 0.1
_FOOTER = 0.45
_SHARP_UP_TO = 96  # pixels; a larger image is shrunk in its cell, and picking single pixels would alias


@dataclass(frozen=True, eq=False)
class Picture:
    """One image with what is known about it.

    `pixels`: uint8, (H, W) grey or (H, W, 3) red-green-blue. `label`: the class as text. `index`: position in its
    data set, below 0 for a picture of several examples. `score`: ∂measurement/∂weight for a training image, the
    measurement's value for a target. `caption`: one more short line. Raises ValueError for other pixels and for a
    score that is NaN or Inf.
    """

    pixels: np.ndarray
    label: str
    index: int
    score: float | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            found = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"picture {self.index}: pixels must be a uint8 array, but are {found}")
        if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or pixels.size == 0:
            raise ValueError(f"picture {self.index}: pixels must be (H, W) or (H, W, 3), but are {pixels.shape}")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"picture {self.index}: the score is {self.score}, not a finite number")


def _draw_picture(
    figure: Figure, picture: Picture, left: float, top: float, size: float, room: float, color: str, signature: str
) -> None:
    """Draw the image `size` inches wide and sign it underneath, in lines at most `room` inches wide."""
    axes = add_axes(figure, left, top, size, size)
    axes.set_xticks([])
    axes.set_yticks([])
    interpolation = "nearest" if max(picture.pixels.shape[:2]) <= _SHARP_UP_TO else "antialiased"
    axes.imshow(picture.pixels, cmap="gray", vmin=0, vmax=255, interpolation=interpolation)
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=1.8)
    # Every line is a text of its own: a right-to-left label cannot reorder the number beside it.
    lines = [
        (picture.label, "normal", INK),
        *([(f"#{picture.index}", "normal", GREY)] if picture.index >= 0 else []),
        (signature, "bold", color),
        (picture.caption, "normal", GREY),
    ]
    for number, (text, weight, ink) in enumerate(lines):
        shown = fitted_text(text, room, 8, weight)
        if shown:
            place = top + size + 0.06 + number * _LINE
            write(figure, left + size / 2, place, shown, weight=weight, color=ink, align="center")


def _draw_row(
    figure: Figure,
    pictures: Sequence[Picture],
    heading: str,
    color: str,
    top: float,
    cell: float,
    columns: int,
    pitch: float,
) -> None:
    write(figure, _ROWS_LEFT, top, heading, size=10, weight="bold", color=color)
    if not pictures:
        write(figure, _ROWS_LEFT, top + _HEADING + 0.1, "none among the training images", color=GREY)
    for position, picture in enumerate(pictures):
        row, column = divmod(position, columns)
        left = _ROWS_LEFT + column * cell
        signature = "no score" if picture.score is None else signed(picture.score)
        _draw_picture(figure, picture, left, top + _HEADING + row * pitch, cell - _GAP, cell - 0.04, color, signature)


def _check_pictures(helpful: Sequence[Picture], harmful: Sequence[Picture]) -> None:
    if not helpful and not harmful:
        raise ValueError("there is no training image to draw: helpful and harmful are both empty")
    for name, pictures, sign in (("helpful", helpful, -1), ("harmful", harmful, 1)):
        if len(pictures) > _MAX_PICTURES:
            raise ValueError(f"{name} holds {len(pictures)} pictures; at most {_MAX_PICTURES} can be drawn")
        for picture in pictures:
            # The row's heading says what its images do to the loss; it must be true of each of them.
            if picture.score is not None and picture.score * sign < 0:
                allowed = "negative" if sign < 0 else "positive"
                raise ValueError(
                    f"{name} holds training image {picture.index} with score {picture.score}; "
                    f"its scores must be {allowed} or 0"
                )


def extremes_figure(target: Picture, helpful: Sequence[Picture], harmful: Sequence[Picture], title: str) -> Figure:
    """Draw the target at the left, and beside it the images that helped it most over those that harmed it most.

    `helpful` (scores ≤ 0) and `harmful` (scores ≥ 0) are drawn in the given order, at most 8 side by side and 32 in
    all each; one of them may be empty. Raises ValueError where both are, or where a score has the wrong sign.
    """
    helpful, harmful = list(helpful), list(harmful)
    _check_pictures(helpful, harmful)
    columns = min(max(len(helpful), len(harmful), _COLUMNS[0]), _COLUMNS[1])
    cell = min((WIDTH - MARGIN - _ROWS_LEFT + _GAP) / columns, 1.25)
    lines = 4 if any(picture.caption for picture in (*helpful, *harmful)) else 3
    pitch = cell - _GAP + 0.06 + lines * _LINE + 0.12

    def row_height(pictures: Sequence[Picture]) -> float:
        return _HEADING + (math.ceil(len(pictures) / columns) * pitch if pictures else 0.4)

    harm_top = _ROWS_TOP + row_height(helpful) + 0.1
    bottom = max(harm_top + row_height(harmful), _ROWS_TOP + _HEADING + _TARGET_SIZE + 5 * _LINE)
    with drawing_style():
        figure = new_figure(bottom + _FOOTER, title)
        write(figure, MARGIN, _ROWS_TOP, "target", size=10, weight="bold")
        measured = "" if target.score is None else f"measurement {compact(target.score)}"
        size = _TARGET_SIZE
        _draw_picture(figure, target, MARGIN, _ROWS_TOP + _HEADING, size, size, INK, measured)
        heading = f"{HELP_MARK} help: lower the loss of the target"
        _draw_row(figure, helpful, heading, HELP, _ROWS_TOP, cell, columns, pitch)
        heading = f"{HARM_MARK} harm: raise the loss of the target"
        _draw_row(figure, harmful, heading, HARM, harm_top, cell, columns, pitch)
        note = (
            "Under each image: label, # index in its data set, "
            "score (how the target's loss changes per unit of weight on that training image)."
        )
        write(figure, MARGIN, bottom + 0.1, note, color=GREY)
    return figure
