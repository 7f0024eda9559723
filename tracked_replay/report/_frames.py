"""A target and its strongest training examples up to a step, small: one picture of a series along the training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ._canvas import FAINT, GREY, HARM, HARM_MARK, HELP, HELP_MARK, INK
from ._pictures import _SHARP_UP_TO, Picture
from ._text import FONT, plain_text

FRAME_EXAMPLES = 4  # of each side
# Pixels, as all below. MLflow's grid shows a copy that is 256 wide: nothing may be too small at half the size.
_WIDTH = 512
_MARGIN = 8
_TEXT, _HEADING = 19, 21  # sizes of the letters
_LINE = 24
_TARGET = 112
_CELL, _EDGE, _BAR = 80, 4, 8
_LEFT = _TARGET + 3 * _MARGIN
_PITCH = (_WIDTH - _MARGIN - _LEFT + _MARGIN) // FRAME_EXAMPLES
_TOP = 46
_ROW = _LINE + 4 + _CELL + _BAR + 2 * _LINE + 10
_MOST_CHARACTERS = 24


@cache
def _font(size: int, weight: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family=FONT, weight=weight)), size)


def _fitted(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    """The text in characters that can be seen, cut until it has room."""
    limit = _MOST_CHARACTERS
    shown = plain_text(text, limit)
    while limit > 1 and font.getlength(shown) > room:
        limit = min(limit, len(shown)) - 1
        shown = plain_text(text, limit)
    return shown


def _square(pixels: np.ndarray, side: int) -> Image.Image:
    """A picture as large as a square allows, in the middle of it."""
    picture = Image.fromarray(pixels).convert("RGB")
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    sharp = max(picture.size) <= _SHARP_UP_TO
    picture = picture.resize(size, Image.Resampling.NEAREST if sharp else Image.Resampling.BOX)
    whole = Image.new("RGB", (side, side), "white")
    whole.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    return whole


def _write(
    draw: ImageDraw.ImageDraw, left: float, top: float, text: str, room: float, *, color: str = INK, bold: bool = False
) -> None:
    font = _font(_HEADING if bold else _TEXT, "bold" if bold else "normal")
    draw.text((left, top), _fitted(text, room, font), fill=color, font=font)


def _draw_row(
    whole: Image.Image, pictures: Sequence[Picture], heading: str, color: str, top: int, largest: float
) -> None:
    draw = ImageDraw.Draw(whole)
    _write(draw, _LEFT, top, heading, _WIDTH - _LEFT, color=color, bold=True)
    top += _LINE + 4
    if not pictures:
        _write(draw, _LEFT, top, "no example so far", _WIDTH - _LEFT, color=GREY)
    for place, picture in enumerate(pictures[:FRAME_EXAMPLES]):
        left = _LEFT + place * _PITCH
        whole.paste(Image.new("RGB", (_CELL, _CELL), color), (left, top))
        whole.paste(_square(picture.pixels, _CELL - 2 * _EDGE), (left + _EDGE, top + _EDGE))
        bar = top + _CELL + 4
        strength = min(1.0, abs(picture.score or 0.0) / largest) if largest else 0.0
        draw.rectangle((left, bar, left + _CELL - 1, bar + _BAR - 1), fill=FAINT)
        if strength:
            draw.rectangle((left, bar, left + max(1, round(strength * _CELL)) - 1, bar + _BAR - 1), fill=color)
        _write(draw, left, bar + _BAR + 2, picture.label, _PITCH - 4)
        _write(draw, left, bar + _BAR + _LINE, f"#{picture.index}", _PITCH - 4, color=GREY)


def training_frame(
    target: Picture,
    helpful: Sequence[Picture],
    harmful: Sequence[Picture],
    *,
    step: int,
    last_step: int,
    largest: float,
    is_loss: bool = True,
) -> np.ndarray:
    """Draw a target beside the training examples that helped and harmed it most up to a step.

    `helpful`, `harmful`: strongest first, each with its score summed over the steps up to and including `step`; the
    first 4 are drawn, and either may be empty. `last_step`: of the training, whose steps count from 0. `largest`: the
    absolute score that fills the bar under a picture, the same in all frames of a series. `is_loss`: whether the
    measurement is a loss, so that lower is better. Returns uint8 (H, 512, 3).
    """
    whole = Image.new("RGB", (_WIDTH, _TOP + 2 * _ROW), "white")
    draw = ImageDraw.Draw(whole)
    _write(draw, _MARGIN, 2, f"after step {step:,}", _WIDTH, bold=True)
    note = _fitted(f"steps 0 to {last_step:,}", _WIDTH, _font(_TEXT, "normal"))
    _write(draw, _WIDTH - _MARGIN - _font(_TEXT, "normal").getlength(note), 4, note, _WIDTH, color=GREY)
    track = _WIDTH - 2 * _MARGIN
    draw.rectangle((_MARGIN, 32, _MARGIN + track - 1, 36), fill=FAINT)
    draw.rectangle((_MARGIN, 32, _MARGIN + max(1, round(track * (step + 1) / (last_step + 1))) - 1, 36), fill=INK)
    _write(draw, _MARGIN, _TOP, "target", _TARGET, bold=True)
    whole.paste(Image.new("RGB", (_TARGET, _TARGET), INK), (_MARGIN, _TOP + _LINE + 4))
    whole.paste(_square(target.pixels, _TARGET - 4), (_MARGIN + 2, _TOP + _LINE + 6))
    under = _TOP + _LINE + 4 + _TARGET + 4
    _write(draw, _MARGIN, under, target.label, _TARGET)
    if target.index >= 0:
        _write(draw, _MARGIN, under + _LINE, f"#{target.index}", _TARGET, color=GREY)
    words = (
        ("helped most so far", "harmed most so far") if is_loss else ("lowered it most so far", "raised it most so far")
    )
    _draw_row(whole, helpful, f"{HELP_MARK} {words[0]}", HELP, _TOP, largest)
    _draw_row(whole, harmful, f"{HARM_MARK} {words[1]}", HARM, _TOP + _ROW, largest)
    return np.asarray(whole)
