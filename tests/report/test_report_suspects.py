"""The grid of suspicious images: every one in its place, with what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from tracked_replay.report import Picture, Suspect, figure_png_bytes, suspects_figure
from tracked_replay.report._canvas import HARM, INK


def suspect(index: int, *, differs: bool = True) -> Suspect:
    pixels = np.full((4, 4), index, dtype=np.uint8)
    return Suspect(Picture(pixels, f"label {index}", index, caption=f"truly {index}"), f"→ {index} 97%", differs)


@pytest.mark.parametrize("count", [1, 8, 9, 32])
def test_every_image_is_drawn_in_order_and_signed(count: int) -> None:
    suspects = [suspect(100 + number, differs=number % 2 == 0) for number in range(count)]
    figure = suspects_figure(suspects, "The title", "The question?")
    assert [int(axes.images[0].get_array()[0, 0]) for axes in figure.axes] == list(range(100, 100 + count))
    texts = [text.get_text() for text in figure.texts]
    assert "The question?" in texts
    for number in range(100, 100 + count):
        for line in (f"label {number}", f"#{number}", f"→ {number} 97%", f"truly {number}"):
            assert texts.count(line) == 1, line
    frames = [to_hex(axes.spines["left"].get_edgecolor()).upper() for axes in figure.axes]
    assert frames == [HARM.upper() if number % 2 == 0 else INK.upper() for number in range(count)]
    assert figure_png_bytes(figure).startswith(b"\x89PNG")


def test_images_do_not_overlap() -> None:
    figure = suspects_figure([suspect(number) for number in range(10)], "title", "question")
    boxes = [axes.get_position() for axes in figure.axes]
    for place, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
        for other in boxes[place + 1 :]:
            assert box.x1 < other.x0 or other.x1 < box.x0 or box.y1 < other.y0 or other.y1 < box.y0


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="suspects is empty"):
        suspects_figure([], "title", "question")
