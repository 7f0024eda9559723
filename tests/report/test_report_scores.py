import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tracked_replay.report import figure_png_bytes, score_histogram_figure
from tracked_replay.report._canvas import GREY, HARM, HELP


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def bars(figure: Figure, panel: int = 0) -> list[Rectangle]:
    return [patch for patch in figure.axes[panel].patches if isinstance(patch, Rectangle)]


def count(figure: Figure, color: str, panel: int = 0) -> float:
    return sum(bar.get_height() for bar in bars(figure, panel) if to_hex(bar.get_facecolor()) == color.lower())


def test_a_panel_says_how_many_scores_are_negative_zero_and_positive() -> None:
    scores = np.concatenate([-np.arange(1.0, 1201.0), np.zeros(3), np.arange(1.0, 8.0)])
    shown = texts(score_histogram_figure({"digit 7": scores}, "Scores"))
    for expected in ("Scores", "digit 7", "1,200 help", "3 zero", "7 harm"):
        assert expected in shown


@pytest.mark.parametrize("seed", range(5))
def test_every_score_is_in_a_bar_of_its_sign(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.standard_t(2, 1000) * 10.0 ** generator.integers(-12, 3)
    scores[:50] = 0
    figure = score_histogram_figure({"a": scores}, "T")
    assert count(figure, HELP) == np.count_nonzero(scores < 0)
    assert count(figure, GREY) == 50
    assert count(figure, HARM) == np.count_nonzero(scores > 0)
    for bar in bars(figure):
        color = to_hex(bar.get_facecolor())
        if color == HELP.lower():
            assert bar.get_x() + bar.get_width() <= 1e-12
        if color == HARM.lower():
            assert bar.get_x() >= -1e-12


@pytest.mark.parametrize(
    "scores",
    [[0.0], [0.0] * 5, [-3e-9] * 100, [2.0], [1e308, -1e308, 5e-324], [5e-324], [-5e-324, 1e300], [1, -2, 0]],
)
def test_degenerate_scores_draw(scores: list[float]) -> None:
    figure = score_histogram_figure({"a": np.array(scores)}, "T")
    figure_png_bytes(figure)
    assert count(figure, HELP) == sum(score < 0 for score in scores)
    assert count(figure, GREY) == sum(score == 0 for score in scores)
    assert count(figure, HARM) == sum(score > 0 for score in scores)


def test_the_axis_shows_real_scores_and_has_a_line_at_zero() -> None:
    figure = score_histogram_figure({"a": np.array([-2e-3, 1e-3])}, "T")
    figure_png_bytes(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["−2.0e-03", "0", "+1.0e-03"]
    assert axes.get_yscale() == "log"
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.0, 0.0]]


def test_targets_beyond_twelve_are_named_in_the_title() -> None:
    figure = score_histogram_figure({f"t{i}": np.array([1.0]) for i in range(14)}, "x" * 500)
    assert len(figure.axes) == 12
    title = figure.texts[0].get_text()
    assert title.endswith("(the first 12 of 14 targets)")
    assert len(score_histogram_figure({f"t{i}": np.ones(1) for i in range(12)}, "T").axes) == 12


def test_counts_of_a_large_data_set_do_not_overlap() -> None:
    scores = np.repeat([-1.0, 0.0, 1.0], [25_042, 12_345, 24_958])
    figure = score_histogram_figure({f"t{i}": scores for i in range(3)}, "T")
    figure_png_bytes(figure)
    boxes = [text.get_window_extent() for text in figure.texts]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_names_are_literal() -> None:
    figure = score_histogram_figure({"_$x$\n": np.ones(2)}, "$y")
    figure_png_bytes(figure)
    assert {"_$x$\\n", "$y"} <= set(texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "no targets"),
        ({"a": np.zeros(0)}, "scores of target a is empty"),
        ({"a": np.zeros((2, 2))}, r"must have 1 axes, but its shape is \(2, 2\)"),
        ({"a": np.ones(2), "b\n": np.array([1.0, np.nan])}, r"target b\\n holds 1 values .* the first at \[1\]"),
        ({"a": np.array([np.inf])}, "NaN or Inf"),
        ({"a": np.array(["x"])}, "real numbers"),
        ({"a": np.array([1j])}, "real numbers"),
    ],
)
def test_wrong_scores_are_refused(scores: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_histogram_figure(scores, "T")


def test_a_thirteenth_target_is_checked_though_not_drawn() -> None:
    scores = {f"t{i}": np.ones(1) for i in range(12)} | {"late": np.array([np.nan])}
    with pytest.raises(ValueError, match="late"):
        score_histogram_figure(scores, "T")
