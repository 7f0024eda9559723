"""What happens along training: loss, learning rate, and how influence builds up."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ._canvas import (
    FAINT,
    GREY,
    HARM,
    HARM_MARK,
    HELP,
    HELP_MARK,
    INK,
    LEGEND_ROOM,
    MARGIN,
    WIDTH,
    add_axes,
    check_length,
    checked_steps,
    drawing_style,
    finite,
    new_figure,
    number_axis,
    side_legend,
    step_axis,
    write,
)

_MAX_CURVES = 6
_MAX_NAMED_TARGETS = 8
_MAX_POINTS = 150
_MAX_EPOCH_LINES = 60
_MAX_GROUPS_NAMED = 4
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
# Okabe and Ito without blue and vermilion, which mean help and harm here.
_TARGET_COLORS = ("#009E73", "#CC79A7", "#56B4E9", "#8C6D00")
_LEFT = 0.95  # inches, as all below
_TOP = 0.65
_BETWEEN = 0.22
_BOTTOM = 0.65


def _stack(heights: Sequence[float], title: str, steps: np.ndarray, legend_room: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel a height, top to bottom, over the same steps."""
    figure = new_figure(_TOP + sum(heights) + _BETWEEN * (len(heights) - 1) + _BOTTOM, title)
    panels: list[Axes] = []
    top = _TOP
    for number, height in enumerate(heights):
        panel = add_axes(figure, _LEFT, top, WIDTH - _LEFT - MARGIN - legend_room, height)
        step_axis(panel, steps, labelled=number == len(heights) - 1)
        panels.append(panel)
        top += height + _BETWEEN
    return figure, panels


def _marker(steps: np.ndarray) -> str:
    """A line through one point is invisible; a marker is not."""
    return "o" if len(steps) == 1 else ""


def _draw_learning_rates(axes: Axes, steps: np.ndarray, rates: np.ndarray) -> None:
    groups = rates.shape[1]
    lines = [
        axes.plot(steps, rates[:, group], color=GREY, linestyle=_DASHES[group % len(_DASHES)], marker=_marker(steps))[0]
        for group in range(groups)
    ]
    number_axis(axes, "learning rate", 3)
    low, high = min(0.0, float(rates.min())), max(0.0, float(rates.max()))
    axes.set_ylim(1.15 * low, 1.15 * high if high > 0 or low < 0 else 1.0)
    if 1 < groups <= _MAX_GROUPS_NAMED:
        side_legend(axes, lines, [f"parameter group {group}" for group in range(groups)], 1.0)


def _checked_rates(learning_rates: ArrayLike, steps: np.ndarray) -> np.ndarray:
    """Return learning rates as (steps, groups); one group may come as (steps,)."""
    array = np.asarray(learning_rates)
    rates = finite("learning_rates", array[:, None] if array.ndim == 1 else array, 2)
    check_length("learning_rates", len(rates), len(steps), "steps")
    return rates


def _checked_per_step(name: str, values: ArrayLike, steps: np.ndarray) -> np.ndarray:
    array = finite(name, values, 1)
    check_length(name, len(array), len(steps), "steps")
    return array


def _checked_curves(name: str, curves: ArrayLike, labels: Sequence[str], steps: np.ndarray) -> np.ndarray:
    """Return curves as (examples, steps); zero examples are allowed."""
    array = np.asarray(curves)
    check_length(f"{name}_labels", len(labels), len(array) if array.ndim else 0, f"curves in {name}_curves")
    if array.size == 0 and not labels:
        return np.zeros((0, len(steps)))
    array = finite(f"{name}_curves", array, 2)
    check_length(f"each curve in {name}_curves", array.shape[1], len(steps), "steps")
    return array


def influence_over_training_figure(
    helpful_curves: ArrayLike,
    harmful_curves: ArrayLike,
    steps: ArrayLike,
    learning_rates: ArrayLike,
    title: str,
    *,
    helpful_labels: Sequence[str],
    harmful_labels: Sequence[str],
    losses: ArrayLike | None = None,
) -> Figure:
    """Draw how the scores of the most helpful and most harmful training examples build up along training.

    `helpful_curves`, `harmful_curves`: (examples, steps), the sum of an example's score over the steps up to each one;
    one of them may hold no example, and the first 6 of each are drawn. `helpful_labels`, `harmful_labels`: a name a
    curve. `steps`: (steps,), rising. `learning_rates`: (steps,) or (steps, groups), and `losses`: (steps,), the
    training loss, are drawn below. Raises ValueError where lengths do not match or a value is NaN or Inf.
    """
    at = checked_steps(steps)
    rates = _checked_rates(learning_rates, at)
    loss = None if losses is None else _checked_per_step("losses", losses, at)
    helpful = _checked_curves("helpful", helpful_curves, helpful_labels, at)
    harmful = _checked_curves("harmful", harmful_curves, harmful_labels, at)
    if not len(helpful) and not len(harmful):
        raise ValueError("there is no curve to draw: helpful_curves and harmful_curves are both empty")
    with drawing_style():
        figure, panels = _stack([2.9, 0.9] + [0.9] * (loss is not None), title, at, LEGEND_ROOM)
        sides = (
            (harmful, harmful_labels, HARM, f"{HARM_MARK} harm", "raise the loss", 1.0),
            (helpful, helpful_labels, HELP, f"{HELP_MARK} help", "lower the loss", 0.48),
        )
        for curves, labels, color, side, meaning, top in sides:
            lines = [
                panels[0].plot(at, curve, color=color, linestyle=dash, marker=_marker(at))[0]
                for curve, dash in zip(curves, _DASHES, strict=False)
            ]
            some = len(curves) > _MAX_CURVES
            heading = f"{side}, the first {_MAX_CURVES} of {len(curves)}" if some else f"{side}: {meaning}"
            side_legend(panels[0], lines, labels[: len(lines)], top, heading)
        panels[0].axhline(0.0, color=INK, linewidth=0.9)
        number_axis(panels[0], "score, summed up to the step")
        _draw_learning_rates(panels[1], at, rates)
        if loss is not None:
            panels[2].plot(at, loss, color=GREY, linewidth=0.9, marker=_marker(at))
            number_axis(panels[2], "training loss", 3)
    return figure


def _shares(absolute: np.ndarray) -> np.ndarray:
    """Return each row divided by its sum, in percent; a row of zeros stays zero."""
    peak = absolute.max(axis=1, keepdims=True)
    relative = absolute / np.where(peak > 0, peak, 1.0)  # the sum of huge values would overflow
    total = relative.sum(axis=1, keepdims=True)
    return 100 * relative / np.where(total > 0, total, 1.0)


def _thinned(steps: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return steps (points,), shares (targets, points) and how many neighbouring steps are averaged into a point.

    Thousands of noisy points on 600 pixels are a filled area in which no line can be followed.
    """
    together = -(-len(steps) // _MAX_POINTS)
    starts = np.arange(0, len(steps), together)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(shares, starts, axis=1) / sizes, together


def influence_share_over_training_figure(
    absolute_influence: ArrayLike,
    target_names: Sequence[str],
    steps: ArrayLike,
    title: str = "When in training the influence arises",
) -> Figure:
    """Draw the share of the total absolute influence that each training step carries.

    `absolute_influence`: (targets, steps), the sum over training examples of |score of that step|, so never negative.
    `target_names`: a name a target. `steps`: (steps,), rising. A thin line a target, and their mean thick. Over 150
    steps, a point is the mean share of several neighbouring steps; targets without any influence are left out; a note
    says both. Raises ValueError where lengths do not match or a value is negative, NaN or Inf.
    """
    at = checked_steps(steps)
    absolute = finite("absolute_influence", absolute_influence, 2)
    check_length("each row of absolute_influence", absolute.shape[1], len(at), "steps")
    check_length("target_names", len(target_names), len(absolute), "rows in absolute_influence")
    if absolute.min() < 0:
        raise ValueError(f"absolute_influence must not be negative, but its smallest value is {absolute.min()}")
    moved = absolute.max(axis=1) > 0
    at_points, shares, together = _thinned(at, _shares(absolute)[moved])
    notes = [f"each point is the mean of {together} steps"] if together > 1 else []
    names = [name for name, keep in zip(target_names, moved, strict=True) if keep]
    with drawing_style():
        figure, (panel,) = _stack([3.2], title, at, LEGEND_ROOM)
        named = len(names) <= _MAX_NAMED_TARGETS
        lines = [
            panel.plot(
                at_points,
                share,
                color=_TARGET_COLORS[number % len(_TARGET_COLORS)] if named else GREY,
                linestyle=_DASHES[number // len(_TARGET_COLORS)] if named else "-",
                linewidth=0.9,
                alpha=0.9 if named else 0.4,
                marker=_marker(at_points),
            )[0]
            for number, share in enumerate(shares)
        ]
        if not named:
            lines, names = lines[:1], [f"each of {len(shares)} targets"]
        if len(shares):
            mean = panel.plot(at_points, shares.mean(axis=0), color=INK, linewidth=2.6, marker=_marker(at_points))[0]
            lines, names = [mean, *lines], ["mean of the targets", *names]
        side_legend(panel, lines, names, 1.0)
        number_axis(panel, "share of all |influence|, % a step")
        panel.set_ylim(0, 1.1 * float(shares.max()) if len(shares) else 1.0)
        still = int(np.count_nonzero(~moved))
        if still:
            notes.append(f"targets without any influence, left out: {still} of {len(moved)}")
        if notes:
            write(figure, _LEFT, _TOP - 0.2, "; ".join(notes), color=GREY)
    return figure


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Return the mean of `half` values before to `half` after each position, of fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    positions = np.arange(len(values))
    starts, ends = np.maximum(0, positions - half), np.minimum(len(values), positions + half + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_losses(axes: Axes, steps: np.ndarray, losses: np.ndarray) -> None:
    half = len(losses) // 50  # centred: a mean of the past alone lies above a falling loss
    single = axes.plot(steps, losses, color=GREY, linewidth=0.7, alpha=0.6, marker=_marker(steps))[0]
    lines, names = [single], ["each step"]
    if half:
        lines += axes.plot(steps, _running_mean(losses, half), color=HELP, linewidth=2.0)
        names.append(f"mean of {2 * half + 1} steps")
    number_axis(axes, "training loss")
    axes.set_ylim(bottom=min(0.0, float(losses.min())))
    side_legend(axes, lines, names, 1.0)


def _draw_accuracy(axes: Axes, epoch_ends: np.ndarray, accuracy: np.ndarray) -> None:
    (line,) = axes.plot(epoch_ends, 100 * accuracy, color=HELP, marker="o", markersize=3, linewidth=1.0)
    number_axis(axes, "evaluation\naccuracy, %", 4)
    side_legend(axes, [line], [f"last: {100 * accuracy[-1]:.1f} %"], 1.0)


def training_figure(
    steps: ArrayLike,
    losses: ArrayLike,
    learning_rates: ArrayLike,
    epoch_ends: ArrayLike,
    evaluation_accuracy: ArrayLike | None = None,
    title: str = "Training",
) -> Figure:
    """Draw the training loss of each step with its running mean, evaluation accuracy if given, and learning rates.

    `steps`: (steps,), rising. `losses`: (steps,). `learning_rates`: (steps,) or (steps, groups). `epoch_ends`:
    (epochs,), the last step of each epoch, may be empty. `evaluation_accuracy`: (epochs,), between 0 and 1, after each
    epoch. Raises ValueError where lengths do not match or a value is NaN or Inf.
    """
    at = checked_steps(steps)
    loss = _checked_per_step("losses", losses, at)
    rates = _checked_rates(learning_rates, at)
    ends = finite("epoch_ends", epoch_ends, 1) if np.size(epoch_ends) else np.zeros(0)
    accuracy = None
    if evaluation_accuracy is not None:
        accuracy = finite("evaluation_accuracy", evaluation_accuracy, 1)
        check_length("evaluation_accuracy", len(accuracy), len(ends), "epoch ends")
        if accuracy.min() < 0 or accuracy.max() > 1:
            raise ValueError("evaluation_accuracy must lie between 0 and 1")
    with drawing_style():
        figure, panels = _stack([2.6] + [1.1] * (accuracy is not None) + [0.9], title, at, LEGEND_ROOM)
        if len(ends) <= _MAX_EPOCH_LINES:
            for panel in panels:
                for end in ends:
                    panel.axvline(end, color=FAINT, linewidth=0.8, zorder=0)
        _draw_losses(panels[0], at, loss)
        if accuracy is not None:
            _draw_accuracy(panels[1], ends, accuracy)
        _draw_learning_rates(panels[-1], at, rates)
    return figure
