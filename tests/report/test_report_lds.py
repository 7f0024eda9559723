from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from tracked_replay.report import counterfactual_figure, figure_png_bytes, lds_by_drop_figure, lds_scatter_figure


class Numbers(NamedTuple):
    spearman: float
    pearson: float
    slope: float


GOOD = Numbers(0.9971, 0.9, 1.02)
PREDICTED = np.array([[2.341, 0.1], [2.343, 0.3], [2.349, 0.2]])
ACTUAL = np.array([[2.342, 0.1], [2.344, 0.5], [2.346, 0.2]])
METHODS = ("tracin", "magic", "random")


def scatter(**changes: Any) -> Figure:
    given: dict[str, Any] = {
        "predicted": PREDICTED,
        "actual": ACTUAL,
        "target_names": ["21", "mean:all"],
        "correlations": [GOOD, (-0.5, -0.4, 0.25)],
        "title": "T",
    }
    return lds_scatter_figure(**(given | changes))


def by_drop(shares: int = 3, **changes: Any) -> Figure:
    means = {method: np.full(shares, 0.9 - 0.3 * place) for place, method in enumerate(METHODS)}
    given: dict[str, Any] = {
        "drops": np.array([0.01, 0.05, 0.1, 0.2])[:shares],
        "means": means,
        "lows": {method: mean - 0.1 for method, mean in means.items()},
        "highs": {method: mean + 0.05 for method, mean in means.items()},
        "title": "T",
    }
    return lds_by_drop_figure(**(given | changes))


def counterfactual(**changes: Any) -> Figure:
    given: dict[str, Any] = {
        "target_names": ["21", "mean:all"],
        "recorded": np.array([2.0, 0.5]),
        "predicted": np.array([2.03, 0.49]),
        "actual": np.array([2.034, 0.488]),
        "title": "T",
    }
    return counterfactual_figure(**(given | changes))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def points(axes: Axes) -> np.ndarray:
    return np.asarray(axes.collections[0].get_offsets())


def curves(axes: Axes) -> list[Any]:
    """Lines with a point for each drop share or target, without those that mark zero."""
    return [line for line in axes.lines if line.get_marker() not in ("None", "", None)]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    figure_png_bytes(figure)
    shown = [text for text in figure.texts if text.get_text()]
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        shown += [label for place, label in ticks if low <= place <= high]
    boxes = [text.get_window_extent() for text in shown]
    return [
        (shown[i].get_text(), shown[j].get_text())
        for i in range(len(boxes))
        for j in range(i)
        if boxes[i].overlaps(boxes[j])
    ]


def test_a_point_a_subset_and_the_correlation_in_words() -> None:
    figure = scatter()
    figure_png_bytes(figure)
    for column, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(points(axes), np.stack([PREDICTED[:, column], ACTUAL[:, column]], axis=1))
    for expected in ("T", "21", "mean:all", "Spearman 0.997, slope 1.02", "Spearman −0.50, slope 0.25"):
        assert expected in texts(figure)


def test_both_axes_of_a_panel_have_the_same_scale_and_the_line_of_equality() -> None:
    figure = scatter(predicted=100 * PREDICTED)
    figure_png_bytes(figure)
    for axes in figure.axes:
        assert axes.get_xlim() == axes.get_ylim()
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        low, high = axes.get_xlim()
        assert (points(axes) >= low).all()
        assert (points(axes) <= high).all()


def test_ticks_of_values_that_differ_late_can_be_told_apart() -> None:
    wide = 0.001 * np.arange(6.0)[:, None]
    figure = scatter(predicted=12.34 + wide, actual=12.34 + wide, target_names=["a"], correlations=[GOOD])
    figure_png_bytes(figure)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(ticks)) == len(ticks) >= 2


def test_an_undefined_correlation_says_so() -> None:
    nan = float("nan")
    same = np.full((3, 2), 0.5)
    figure = scatter(predicted=same, actual=same, correlations=[Numbers(nan, nan, nan), (nan, nan, nan)])
    assert texts(figure).count("Spearman undefined") == 2
    figure_png_bytes(figure)


@pytest.mark.parametrize(("slope", "size"), [(-1e7, 1e-7), (-0.0001, 1e-5), (123456.0, 0.003)])
def test_no_text_of_twelve_panels_overlaps_and_a_thirteenth_is_in_the_title(slope: float, size: float) -> None:
    generator = np.random.default_rng(0)
    values = (1 + 10 * generator.uniform(size=13)) * 100 * size + generator.normal(size=(24, 13)) * size
    names = ["a long name of a target " * 3] * 13
    figure = scatter(predicted=values, actual=values, target_names=names, correlations=[(-0.999, 0, slope)] * 13)
    assert len(figure.axes) == 12
    assert figure.texts[0].get_text().endswith("(the first 12 of 13 targets)")
    assert overlapping(figure) == []


@pytest.mark.parametrize("size", [1e307, 1e150, 1e-150, 1e-310, 0.0])
def test_measurements_of_any_size_are_drawn(size: float) -> None:
    figure_png_bytes(scatter(predicted=size * PREDICTED, actual=-size * ACTUAL))
    figure_png_bytes(counterfactual(recorded=np.zeros(2), predicted=size * np.array([1, -2]), actual=[0, size]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actual": ACTUAL[:2]}, r"predicted has the shape \(3, 2\), but actual has \(2, 2\)"),
        ({"target_names": ["a"]}, "target_names has 1 entries, but there are 2 targets"),
        ({"correlations": [GOOD]}, "correlations has 1 entries, but there are 2 targets"),
        ({"predicted": PREDICTED * np.nan}, "predicted holds 6 values that are NaN or Inf"),
        ({"predicted": np.zeros((0, 2))}, "predicted is empty"),
    ],
)
def test_wrong_scatter_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter(**changes)


def test_each_method_has_a_line_and_its_intervals() -> None:
    figure = by_drop()
    (axes,) = figure.axes
    drawn = curves(axes)
    # magic comes first, whatever its place; the others keep theirs
    for line, mean in zip(drawn, (0.6, 0.9, 0.3), strict=True):
        np.testing.assert_allclose(line.get_ydata(), mean)
    for intervals, mean in zip(axes.collections, (0.6, 0.9, 0.3), strict=True):
        for segment in intervals.get_segments():  # type: ignore[attr-defined]
            np.testing.assert_allclose(segment[:, 1], [mean - 0.1, mean + 0.05])
    shown = texts(figure)
    assert {"magic", "tracin", "random", "1 %", "5 %", "10 %"} <= set(shown)
    assert shown.count("0.60") == 3


@pytest.mark.parametrize("shares", [1, 3])
def test_methods_differ_in_marker_and_dash_too_and_magic_stands_out(shares: int) -> None:
    drawn = curves(by_drop(shares).axes[0])
    assert len({line.get_marker() for line in drawn}) == 3
    if shares > 1:
        assert len({str(line.get_linestyle()) for line in drawn}) == 3
    assert drawn[0].get_linewidth() > max(line.get_linewidth() for line in drawn[1:])


def test_one_share_is_a_row_a_method_with_its_numbers() -> None:
    figure = by_drop(1)
    assert overlapping(figure) == []
    (axes,) = figure.axes
    assert [float(line.get_xdata()[0]) for line in curves(axes)] == pytest.approx([0.6, 0.9, 0.3])
    for expected in ("magic", "tracin", "0.60  (0.50 to 0.65)", "0.30  (0.20 to 0.35)"):
        assert expected in texts(figure)
    assert "linear datamodeling score, 1 % of the training examples removed" in texts(figure)


@pytest.mark.parametrize("shares", [1, 3])
def test_undefined_scores_leave_a_gap(shares: int) -> None:
    nan = {method: np.full(shares, np.nan) for method in METHODS}
    nan["tracin"] = np.full(shares, 0.4)
    figure = by_drop(shares, means=nan, lows=nan, highs=nan)
    figure_png_bytes(figure)
    if shares == 1:
        assert texts(figure).count("undefined") == 2


@pytest.mark.parametrize("shares", [1, 2])
def test_negative_scores_lie_inside_and_hostile_names_are_literal(shares: int) -> None:
    values = {"_$x$\n": np.full(shares, -0.8)}
    figure = by_drop(shares, means=values, lows=values, highs=values)
    figure_png_bytes(figure)
    axes = figure.axes[0]
    low, _ = axes.get_ylim() if shares > 1 else axes.get_xlim()
    assert low < -0.8
    assert "_$x$\\n" in texts(figure)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drops": [0.01, 0.05]}, "means of magic has 3 entries, but there are 2 drop shares"),
        ({"drops": [0.05, 0.01, 0.1]}, "must rise"),
        ({"drops": [0.0, 0.01, 0.1]}, "above 0"),
        ({"drops": []}, "drops is empty"),
        ({"means": {}}, "no methods"),
        ({"lows": {"magic": np.zeros(3)}}, "lows has the methods"),
        ({"highs": {method: np.full(3, -1.0) for method in METHODS}}, "lows of magic lie above its highs"),
        ({"highs": {method: np.full(3, np.inf) for method in METHODS}}, "highs of magic holds Inf"),
    ],
)
def test_wrong_scores_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_drop(**changes)


def test_every_target_has_its_predicted_and_actual_change_beside_the_recorded_value() -> None:
    figure = counterfactual()
    figure_png_bytes(figure)
    (axes,) = figure.axes
    actual, predicted = curves(axes)
    np.testing.assert_allclose(np.asarray(predicted.get_xdata()) * 0.034, [0.03, -0.01])
    np.testing.assert_allclose(np.asarray(actual.get_xdata()) * 0.034, [0.034, -0.012])
    for expected in ("21", "mean:all", "2", "0.5", "+3.0e-02", "+3.4e-02", "−1.0e-02", "−1.2e-02"):
        assert expected in texts(figure)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "+3.4e-02"]
    assert predicted.get_marker() != actual.get_marker()


def test_a_change_of_nothing_is_drawn_at_the_recorded_value() -> None:
    same = np.array([1.0, 2.0])
    figure = counterfactual(recorded=same, predicted=same, actual=same)
    figure_png_bytes(figure)
    for line in curves(figure.axes[0]):
        assert not np.asarray(line.get_xdata()).any()


@pytest.mark.parametrize("targets", [1, 8, 41])
def test_no_text_overlaps_and_targets_beyond_forty_are_in_the_title(targets: int) -> None:
    values = np.linspace(1e-6, 3, targets)
    figure = counterfactual(
        target_names=["x" * 50] * targets, recorded=values, predicted=values * 1.1, actual=values * 0.9
    )
    assert overlapping(figure) == []
    assert figure.texts[0].get_text() == ("T (the first 40 of 41 targets)" if targets > 40 else "T")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_names": ["a"]}, "target_names has 1 entries, but there are 2 targets"),
        ({"predicted": [1.0]}, "predicted has 1 entries, but there are 2 targets"),
        ({"actual": [1.0, np.nan]}, r"actual holds 1 values that are NaN or Inf, the first at \[1\]"),
    ],
)
def test_wrong_counterfactuals_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counterfactual(**changes)
