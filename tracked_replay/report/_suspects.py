"""A grid of suspicious training images: what each is labelled, and what the model says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ._canvas import GREY, HARM, INK, MARGIN, WIDTH, drawing_style, new_figure, write
from ._pictures import _GAP, _LINE, Picture, _draw_picture
from ._text import fitted_text

_COLUMNS = 8
_TOP = 0.85  # inches, as all below
_FOOTER = 0.35
_LINES = 4


@dataclass(frozen=True, eq=False)
class Suspect:
    """One training image, with its label, its index and perhaps a caption.

    `says`: what the model says of it; empty where it names no class. `differs`: whether that is another class than
    the label.
    """

    picture: Picture
    says: str = ""
    differs: bool = False


def suspects_figure(suspects: Sequence[Suspect], title: str, question: str) -> Figure:
    """Draw images in the given order, 8 side by side, under the question that their ranking answers.

    A frame is coloured where the model says another class than the label. Raises ValueError where there is no image.
    """
    if not suspects:
        raise ValueError("there is no training image to draw: suspects is empty")
    cell = (WIDTH - 2 * MARGIN + _GAP) / _COLUMNS
    pitch = cell - _GAP + 0.06 + _LINES * _LINE + 0.12
    bottom = _TOP + math.ceil(len(suspects) / _COLUMNS) * pitch
    with drawing_style():
        figure = new_figure(bottom + _FOOTER, title)
        write(figure, MARGIN, 0.5, fitted_text(question, WIDTH - 2 * MARGIN, 9, limit=200), size=9, color=GREY)
        for place, suspect in enumerate(suspects):
            row, column = divmod(place, _COLUMNS)
            left, top = MARGIN + column * cell, _TOP + row * pitch
            color = HARM if suspect.differs else INK
            _draw_picture(figure, suspect.picture, left, top, cell - _GAP, cell - 0.04, color, suspect.says)
        note = "Under each image: its label, # its index, → what the model says and how probable it finds that."
        if any(suspect.picture.caption for suspect in suspects):
            note += " “truly”: before it was flipped."
        write(figure, MARGIN, bottom + 0.05, note, color=GREY)
    return figure
