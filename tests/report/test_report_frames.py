"""Pictures of a series along the training: what is where, in which colour, and how long the bars are."""

from __future__ import annotations

import numpy as np
import pytest

from tracked_replay.report import FRAME_EXAMPLES, Picture, training_frame

HELP, HARM, INK, FAINT = ((0, 114, 178), (196, 78, 0), (34, 34, 34), (213, 216, 220))
HOSTILE = [
    "$5 \\alpha$",
    "a\nb",
    "W" * 5000,
    "\x00\x1b",
    "\u202eevil",
    "<script>",
    "猫",
    "",
    "../../etc/passwd",
    "\ud800",
]


def picture(index: int, score: float | None = None, label: str = "ship", shade: int = 100) -> Picture:
    return Picture(np.full((8, 8), shade, dtype=np.uint8), label, index, score)


def frame(helpful: list[Picture], harmful: list[Picture], **changes: object) -> np.ndarray:
    given = {"step": 5, "last_step": 9, "largest": 1.0} | changes
    return training_frame(picture(3), helpful, harmful, **given)  # type: ignore[arg-type]


def of_color(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (pixels == color).all(axis=2)


def test_bars_are_as_long_as_the_scores_are_strong_on_one_scale() -> None:
    scores = (-2.0, -1.0, -0.2)
    pixels = frame([picture(index, score) for index, score in enumerate(scores)], [], largest=2.0)
    full, empty = (of_color(pixels, color).sum(axis=1) for color in (HELP, FAINT))
    bars = (full > 0) & (empty > 0)
    assert bars.sum() > 4
    assert set((full + empty)[bars].tolist()) == {3 * 80}
    assert set(full[bars].tolist()) == {80 + 40 + 8}


def test_each_side_has_its_colour_and_place() -> None:
    both = frame([picture(1, -1.0)], [picture(2, 0.5)])
    helpful, harmful = (np.argwhere(of_color(both, color)) for color in (HELP, HARM))
    assert helpful[:, 0].max() < harmful[:, 0].min()
    assert helpful[:, 1].min() > np.argwhere((both == 100).all(axis=2))[:, 1].min()  # the target is at the left
    assert both.shape == frame([], []).shape == frame([picture(i, -1.0) for i in range(9)], []).shape
    assert both.dtype == np.uint8
    many = [picture(index, -1.0, shade=10 + index) for index in range(FRAME_EXAMPLES + 1)]
    shades = np.unique(frame(many, []))
    assert {10 + index for index in range(FRAME_EXAMPLES)} <= set(shades.tolist())


def test_the_line_at_the_top_says_how_much_of_the_training_counts() -> None:
    def share(step: int) -> float:
        line = frame([], [], step=step)[34]
        dark, light = (int((line == color).all(axis=1).sum()) for color in (INK, FAINT))
        return dark / (dark + light)

    assert share(9) == 1.0
    assert share(4) == pytest.approx(0.5, abs=0.01)
    assert 0 < share(0) == pytest.approx(0.1, abs=0.01)
    assert frame([], [], step=0, last_step=0).any()


def test_words_fit_a_loss_and_another_measurement() -> None:
    assert not np.array_equal(frame([picture(1, -1.0)], []), frame([picture(1, -1.0)], [], is_loss=False))


@pytest.mark.parametrize("label", HOSTILE)
def test_any_label_can_be_drawn_and_stays_under_its_picture(label: str) -> None:
    plain, labelled = (frame([picture(1, -1.0, text)], [picture(2, 1.0)]) for text in ("x", label))
    changed = np.argwhere((plain != labelled).any(axis=2))
    if len(changed):
        edges = np.argwhere(of_color(plain, HARM))  # of the picture below, in the same column
        assert edges[:, 1].min() <= changed[:, 1].min()
        assert changed[:, 1].max() < edges[:, 1].min() + plain.shape[1] // FRAME_EXAMPLES
        assert changed[:, 0].max() < edges[:, 0].min()


def test_pictures_of_any_shape_and_size_are_drawn_whole() -> None:
    for shape in ((1, 1), (1, 200), (300, 7, 3), (32, 32, 3)):
        pixels = np.zeros(shape, dtype=np.uint8)
        found = training_frame(
            Picture(pixels, "a", 1), [Picture(pixels, "a", 1, -1.0)], [], step=0, last_step=0, largest=1.0
        )
        assert (found == 0).all(axis=2).any()
