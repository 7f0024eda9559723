from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from tracked_replay.report import (
    figure_png_bytes,
    influence_over_training_figure,
    influence_share_over_training_figure,
    training_figure,
)

STEPS = np.arange(10)
RATES = np.linspace(0.1, 0.0, 10)
HELPFUL = -np.cumsum(np.ones((2, 10)), axis=1)
HARMFUL = np.cumsum(np.full((3, 10), 0.5), axis=1)


def influence(**changes: Any) -> Figure:
    given: dict[str, Any] = {
        "helpful_curves": HELPFUL,
        "harmful_curves": HARMFUL,
        "steps": STEPS,
        "learning_rates": RATES,
        "title": "T",
        "helpful_labels": ["_a", "$b$"],
        "harmful_labels": ["c\n", "d", "e"],
    }
    return influence_over_training_figure(**(given | changes))


def training(**changes: Any) -> Figure:
    given: dict[str, Any] = {
        "steps": STEPS,
        "losses": np.linspace(2, 1, 10),
        "learning_rates": RATES,
        "epoch_ends": [4, 9],
        "evaluation_accuracy": [0.5, 0.75],
    }
    return training_figure(**(given | changes))


def legends(figure: Figure) -> dict[str, list[str]]:
    found = figure.findobj(Legend)
    return {each.get_title().get_text(): [text.get_text() for text in each.get_texts()] for each in found}  # type: ignore[attr-defined]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def curves(figure: Figure, panel: int = 0) -> list[np.ndarray]:
    """Lines over steps, without the straight ones that mark zero or an epoch."""
    return [np.asarray(line.get_ydata()) for line in figure.axes[panel].lines if line.get_color() not in ("#D5D8DC",)]


def test_every_curve_is_drawn_and_named() -> None:
    figure = influence()
    drawn = curves(figure)
    for curve in (*HELPFUL, *HARMFUL):
        assert any(np.array_equal(curve, line) for line in drawn)
    assert legends(figure) == {
        "▲ harm: raise the loss": ["c\\n", "d", "e"],
        "▼ help: lower the loss": ["_a", "$b$"],
    }
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if "$" in text.get_text())


def test_learning_rates_and_loss_lie_below() -> None:
    losses = np.linspace(2, 1, 10)
    figure = influence(learning_rates=np.stack([RATES, RATES / 2], axis=1), losses=losses)
    assert len(figure.axes) == 3
    np.testing.assert_array_equal(curves(figure, 1), [RATES, RATES / 2])
    np.testing.assert_array_equal(curves(figure, 2), [losses])
    assert len(influence().axes) == 2


def test_more_curves_than_can_be_told_apart_are_said() -> None:
    figure = influence(harmful_curves=np.ones((9, 10)), harmful_labels=list("abcdefghi"))
    assert legends(figure)["▲ harm, the first 6 of 9"] == list("abcdef")


@pytest.mark.parametrize("empty", [np.zeros((0, 10)), []])
def test_one_side_may_be_empty(empty: Any) -> None:
    figure = influence(helpful_curves=empty, helpful_labels=[])
    assert list(legends(figure)) == ["▲ harm: raise the loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"helpful_labels": ["a"]}, "helpful_labels has 1 entries, but there are 2 curves"),
        ({"harmful_curves": HARMFUL[:, :9]}, "harmful_curves has 9 entries, but there are 10 steps"),
        ({"harmful_curves": HARMFUL * np.nan}, r"harmful_curves holds 30 values .* the first at \[0, 0\]"),
        ({"helpful_curves": HELPFUL[0], "helpful_labels": ["a"] * 10}, "must have 2 axes"),
        ({"learning_rates": RATES[:9]}, "learning_rates has 9 entries, but there are 10 steps"),
        ({"learning_rates": 0.1}, "learning_rates must have 2 axes"),
        ({"losses": np.ones(11)}, "losses has 11 entries"),
        ({"steps": []}, "steps is empty"),
        ({"steps": STEPS[::-1]}, "steps must rise"),
        (
            {"helpful_curves": [], "helpful_labels": [], "harmful_curves": [], "harmful_labels": []},
            "both empty",
        ),
    ],
)
def test_wrong_influence_curves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(**changes)


def test_shares_of_a_target_sum_to_one_hundred_percent_whatever_its_scale() -> None:
    absolute = np.array([[1.0, 3.0, 0.0, 4.0], [1e308, 1e308, 1e308, 1e308], [2e-300, 0, 0, 0]])
    figure = influence_share_over_training_figure(absolute, ["a", "b", "c"], np.arange(4))
    drawn = curves(figure)
    np.testing.assert_allclose(drawn[:3], [[12.5, 37.5, 0, 50], [25] * 4, [100, 0, 0, 0]])
    np.testing.assert_allclose(drawn[3], np.mean(drawn[:3], axis=0))
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths[3] > 2 * max(widths[:3])
    assert legends(figure) == {"": ["mean of the targets", "a", "b", "c"]}


def test_a_target_without_influence_is_left_out_of_the_mean_and_said() -> None:
    figure = influence_share_over_training_figure([[1.0, 1.0], [0.0, 0.0]], ["a", "b"], [0, 1])
    np.testing.assert_allclose(curves(figure), [[50, 50], [50, 50]])
    assert "targets without any influence, left out: 1 of 2" in texts(figure)
    figure_png_bytes(influence_share_over_training_figure([[0.0, 0.0]], ["a"], [0, 1]))


def test_many_steps_are_averaged_in_groups_and_the_note_says_so() -> None:
    absolute = np.arange(1.0, 402.0)[None]
    figure = influence_share_over_training_figure(absolute, ["a"], np.arange(401))
    line = figure.axes[0].lines[0]
    shares = 100 * absolute[0] / absolute.sum()
    np.testing.assert_allclose(line.get_ydata()[0], shares[:3].mean())
    np.testing.assert_allclose(line.get_ydata()[-1], shares[399:].mean())
    np.testing.assert_allclose(line.get_xdata()[[0, -1]], [1, 399.5])
    assert "each point is the mean of 3 steps" in texts(figure)


def test_many_targets_share_one_legend_entry() -> None:
    figure = influence_share_over_training_figure(np.ones((9, 4)), ["x"] * 9, np.arange(4))
    assert legends(figure) == {"": ["mean of the targets", "each of 9 targets"]}
    assert len(figure.axes[0].lines) == 10


@pytest.mark.parametrize(
    ("absolute", "names", "message"),
    [
        (np.ones((2, 3)), ["a", "b"], "has 3 entries, but there are 4 steps"),
        (np.ones((2, 4)), ["a"], "target_names has 1 entries, but there are 2 rows"),
        (np.zeros((0, 4)), [], "absolute_influence is empty"),
        (-np.ones((1, 4)), ["a"], "must not be negative"),
        (np.full((1, 4), np.inf), ["a"], "NaN or Inf"),
    ],
)
def test_wrong_shares_are_refused(absolute: np.ndarray, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence_share_over_training_figure(absolute, names, np.arange(4))


def test_training_shows_loss_accuracy_and_learning_rate() -> None:
    figure = training()
    assert len(figure.axes) == 3
    np.testing.assert_array_equal(curves(figure, 0)[0], np.linspace(2, 1, 10))
    np.testing.assert_array_equal(curves(figure, 1), [[50.0, 75.0]])
    np.testing.assert_array_equal(curves(figure, 2), [RATES])
    assert "last: 75.0 %" in texts(figure)
    assert len(training(evaluation_accuracy=None).axes) == 2


def test_the_running_mean_is_centred_and_says_its_width() -> None:
    losses = np.random.default_rng(0).normal(size=100)
    figure = training(
        steps=np.arange(100), losses=losses, learning_rates=np.ones(100), epoch_ends=[], evaluation_accuracy=None
    )
    mean = curves(figure)[1]
    np.testing.assert_allclose(mean[50], losses[48:53].mean())
    np.testing.assert_allclose(mean[[0, -1]], [losses[:3].mean(), losses[-3:].mean()])
    assert "mean of 5 steps" in texts(figure)


def test_epoch_ends_are_marked_until_there_are_too_many() -> None:
    marked = [line.get_xdata()[0] for line in training().axes[0].lines if line.get_color() == "#D5D8DC"]
    assert marked == [4, 9]
    many = training(epoch_ends=np.linspace(0, 9, 61), evaluation_accuracy=None)
    assert len(many.axes[0].lines) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": []}, "losses is empty"),
        ({"losses": np.ones(9)}, "losses has 9 entries, but there are 10 steps"),
        ({"losses": np.full(10, np.nan)}, "losses holds 10 values"),
        ({"learning_rates": np.ones((9, 2))}, "learning_rates has 9 entries"),
        ({"evaluation_accuracy": [0.5]}, "evaluation_accuracy has 1 entries, but there are 2 epoch ends"),
        ({"evaluation_accuracy": [50.0, 75.0]}, "between 0 and 1"),
        ({"epoch_ends": []}, "there are 0 epoch ends"),
    ],
)
def test_wrong_training_curves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(**changes)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: influence(),
        lambda: influence(helpful_curves=HELPFUL * 0, harmful_curves=HARMFUL * 0),
        lambda: training(),
        lambda: training(steps=[7], losses=[1.0], learning_rates=[0.0], epoch_ends=[], evaluation_accuracy=None),
        lambda: training(losses=np.zeros(10), learning_rates=np.zeros(10)),
        lambda: influence_share_over_training_figure(np.ones((1, 1)), ["a"], [0]),
        lambda: influence_share_over_training_figure(np.ones((9, 500)), ["$"] * 9, np.arange(500)),
    ],
)
def test_figures_draw_inside_their_frame_with_the_same_bytes_twice(figure: Any) -> None:
    drawn = figure()
    assert figure_png_bytes(drawn) == figure_png_bytes(figure())
    for text in drawn.findobj(Text):
        # Labels of ticks beyond the axis are kept by matplotlib but not drawn.
        if text.get_text() and text.get_visible() and text not in tick_labels(drawn):
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= drawn.bbox.x1
            assert box.y0 >= 0
            assert box.y1 <= drawn.bbox.y1


def tick_labels(figure: Figure) -> set[Text]:
    return {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
    }
