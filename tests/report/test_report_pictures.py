import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from tracked_replay.report import Picture, extremes_figure, figure_png_bytes

HOSTILE = ["$5 \\alpha$", "a\nb", "W" * 500, "\x00\x1b", "\u202eevil", "<script>", "猫", "שלום"]


def picture(index: int, score: float | None = None, label: str = "ship", size: int = 8, color: bool = False) -> Picture:
    shape = (size, size, 3) if color else (size, size)
    pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
    return Picture(pixels, label, index, score)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_each_image_is_signed_with_label_index_and_score() -> None:
    figure = extremes_figure(picture(21, 0.0342, "seven"), [picture(5, -1.2e-3, "cat")], [picture(6, 2e-4, "dog")], "T")
    shown = texts(figure)
    for expected in ("T", "seven", "#21", "measurement 0.0342", "cat", "#5", "−1.2e-03", "dog", "#6", "+2.0e-04"):
        assert shown.count(expected) == 1
    assert any("help: lower the loss of the target" in text for text in shown)
    assert any("harm: raise the loss of the target" in text for text in shown)


@pytest.mark.parametrize(("size", "color"), [(8, False), (28, False), (32, True)])
def test_images_hold_the_given_pixels_and_stay_sharp(size: int, color: bool) -> None:
    given = [
        picture(1, size=size, color=color),
        picture(2, -1.0, size=size, color=color),
        picture(3, 1.0, size=9),
    ]
    figure = extremes_figure(given[0], given[1:2], given[2:], "T")
    drawn = [axes.images[0] for axes in figure.axes]
    assert len(drawn) == 3
    for image, source in zip(drawn, given, strict=True):
        np.testing.assert_array_equal(np.asarray(image.get_array()), source.pixels)
        assert image.get_interpolation() == "nearest"
    assert drawn[2].get_clim() == (0, 255)  # a dim image stays dim


def test_helpful_images_lie_above_harmful_ones_right_of_the_target() -> None:
    figure = extremes_figure(picture(0), [picture(1, -1.0)], [picture(2, 1.0)], "T")
    target, helpful, harmful = (axes.get_position() for axes in figure.axes)
    assert target.x1 < helpful.x0
    assert target.x1 < harmful.x0
    assert helpful.y0 > harmful.y1
    assert target.width > helpful.width


@pytest.mark.parametrize("counts", [(8, 8), (1, 3), (0, 2), (2, 0), (32, 11)])
def test_no_texts_overlap_and_all_lie_inside_the_figure(counts: tuple[int, int]) -> None:
    long = "W" * 50
    helpful = [Picture(picture(i).pixels, long, 10**6 + i, -1e-3, long) for i in range(counts[0])]
    harmful = [Picture(picture(i).pixels, long, 10**6 + i, 1e-3, long) for i in range(counts[1])]
    figure = extremes_figure(picture(0, 0.5, long), helpful, harmful, long * 9)
    figure_png_bytes(figure)
    boxes = [text.get_window_extent() for text in figure.texts]
    frame = figure.bbox
    for box in boxes:
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-0.5).overlaps(b.padded(-0.5))]
    assert not overlapping


def test_hostile_text_is_drawn_literally() -> None:
    helpful = [picture(i, -1.0, label) for i, label in enumerate(HOSTILE)]
    figure = extremes_figure(picture(9, label="$x$"), helpful, [], "$\\frac{$ \u202e")
    figure_png_bytes(figure)
    shown = texts(figure)
    for expected in ("$x$", "$\\frac{$ \\u202e", "a\\nb", "\\x00\\x1b", "<script>", "\\u732b"):
        assert expected in shown
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())
    assert not any(set(text) & set("\n\x00\x1b\u202e") for text in shown)


def test_one_empty_side_says_so() -> None:
    assert "none among the training images" in texts(extremes_figure(picture(0), [], [picture(1, 1.0)], "T"))


def test_zero_scores_and_missing_scores_draw_on_either_side() -> None:
    shown = texts(extremes_figure(picture(0), [picture(1, 0.0)], [picture(2, 0.0), picture(3)], "T"))
    assert shown.count("0") == 2
    assert "no score" in shown


def test_a_large_image_is_not_drawn_by_picking_pixels() -> None:
    figure = extremes_figure(picture(0, size=224), [picture(1, -1.0)], [], "T")
    assert figure.axes[0].images[0].get_interpolation() != "nearest"


def test_the_same_figure_gives_the_same_bytes_and_names_no_software() -> None:
    def drawn() -> bytes:
        return figure_png_bytes(extremes_figure(picture(0, 1.0), [picture(1, -1.0)], [picture(2, 1.0)], "T"))

    first = drawn()
    assert first == drawn()
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first
    assert b"tEXt" not in first


def test_a_figure_is_1000_pixels_wide() -> None:
    data = figure_png_bytes(extremes_figure(picture(0), [picture(1, -1.0)], [], "T"))
    assert int.from_bytes(data[16:20], "big") == 1000


def test_the_machines_own_settings_change_nothing_and_are_left_alone() -> None:
    def drawn() -> bytes:
        return figure_png_bytes(extremes_figure(picture(0), [picture(1, -1.0)], [], "$T$"))

    first = drawn()
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "image.cmap": "jet"}):
        before = dict(matplotlib.rcParams)
        assert drawn() == first
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys, numpy as np, tracked_replay.report as r;"
        "p = r.Picture(np.zeros((8, 8), np.uint8), 'a', 0, 0.0);"
        "r.figure_png_bytes(r.extremes_figure(p, [p], [p], 't'));"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert not {'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8)),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((64,), np.uint8),
        np.zeros((0, 8), np.uint8),
        [[0, 1], [2, 3]],
    ],
)
def test_wrong_pixels_are_refused(pixels: object) -> None:
    with pytest.raises(ValueError, match="picture 7: pixels must be"):
        Picture(pixels, "a", 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -np.inf])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        picture(1, score)


def test_a_score_of_the_wrong_sign_is_refused() -> None:
    with pytest.raises(ValueError, match=r"helpful holds training image 1 with score 0\.5"):
        extremes_figure(picture(0), [picture(1, 0.5)], [], "T")
    with pytest.raises(ValueError, match=r"harmful holds training image 2 with score -0\.5"):
        extremes_figure(picture(0), [], [picture(2, -0.5)], "T")


def test_nothing_to_draw_and_too_much_are_refused() -> None:
    with pytest.raises(ValueError, match="both empty"):
        extremes_figure(picture(0), [], [], "T")
    with pytest.raises(ValueError, match="at most 32"):
        extremes_figure(picture(0), [picture(1, -1.0)] * 33, [], "T")


@pytest.mark.parametrize("dpi", [0, -1, float("nan")])
def test_a_resolution_that_is_not_positive_is_refused(dpi: float) -> None:
    with pytest.raises(ValueError, match="dpi"):
        figure_png_bytes(Figure(), dpi=dpi)
