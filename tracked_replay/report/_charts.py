"""Charts as inline SVG: they take the page's colours, light or dark, and need no other file.

Sizes and places are in CSS pixels, and a chart is never shown larger, so that its text keeps its size.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from ._numbers import decimal, signed_decimal

_BINS = 60
_SPARK = (96, 26)  # width, height
_SPARK_POINTS = 40
_SHARE_POINTS = 150
_SCATTER_POINTS = 400


def _svg(width: int, height: int, words: str, body: Markup, kind: str = "chart") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">{}</svg>').format(
        kind, width, height, width, words, body
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _path(kind: str, x: np.ndarray, y: np.ndarray, *, closed: bool = False) -> Markup:
    points = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    return Markup('<path class="{}" d="M{}{}"/>').format(kind, points, "Z" if closed else "")


def _means(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` means of neighbouring values."""
    starts = np.unique(np.linspace(0, len(values), min(most, len(values)), endpoint=False).astype(int))
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def histogram(scores: np.ndarray, words: str) -> Markup:
    """Draw how many of the scores (training examples,) have which size; bars grow with the logarithm of the count."""
    width, height, base = 360, 132, 104
    unit = float(np.abs(scores).max()) or 1.0  # in units of the largest, so that no size over- or underflows
    values = scores / unit
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    span = high - low or 1.0
    left, right = 8.0, width - 8.0

    def place(value: np.ndarray | float) -> np.ndarray:
        return left + (np.asarray(value) - low) / span * (right - left)

    sides = []
    for kind, side in (("help", values < 0), ("harm", values > 0)):
        end = low if kind == "help" else high
        bins = max(1, round(_BINS * abs(end) / span))
        counts, edges = np.histogram(values[side], np.sort(np.linspace(0.0, end, bins + 1)) if end else 1)
        sides.append((kind, counts, edges))
    zeros = int(np.count_nonzero(values == 0))
    most = max(1, zeros, *(int(counts.max()) for _, counts, _ in sides))

    def tall(counts: np.ndarray | int) -> np.ndarray:
        # Of counts plus one: a single example has a bar, too.
        return (base - 14) * np.log1p(counts) / np.log1p(most)

    body = Markup("")
    for kind, counts, edges in sides:
        there = counts > 0
        bars = zip(place(edges[:-1][there]), place(edges[1:][there]), tall(counts[there]), strict=True)
        drawn = "".join(f"M{a:.1f} {base}V{base - up:.1f}H{b:.1f}V{base}Z" for a, b, up in bars)
        if drawn:
            body += Markup('<path class="{}" d="{}"/>').format(kind, drawn)
    zero = float(place(0.0))
    if zeros:
        body += _line("none", zero, base, zero, base - float(tall(zeros)))
    body += _line("axis", left, base, right, base) + _line("axis", zero, base + 5, zero, 10)
    body += _text(zero, base + 20, "0", "middle")
    if zero - left > 50:
        body += _text(left, base + 20, signed_decimal(low * unit))
    if right - zero > 50:
        body += _text(right, base + 20, signed_decimal(high * unit), "end")
    return _svg(width, height, words, body)


def sparkline(along: np.ndarray, low: float, high: float, kind: str) -> Markup:
    """Draw a cumulative score (steps,) on a scale from `low` to `high`, zero among them."""
    width, height = _SPARK
    values = np.append(0.0, _means(along, _SPARK_POINTS))
    span = high - low or 1.0
    x = np.linspace(1, width - 1, len(values))
    y = 2 + (high - values) / span * (height - 4)
    zero = 2 + high / span * (height - 4)
    return Markup('<svg class="spark" viewBox="0 0 {} {}" width="{}" aria-hidden="true">{}{}</svg>').format(
        width, height, width, _line("axis", 0, zero, width, zero), _path(f"line {kind}", x, y)
    )


def share_chart(absolute: np.ndarray, words: str) -> Markup:
    """Draw which share of the influence each part of the training has; `absolute`: (steps,), never negative.

    Steps count from 0, as in the trace.
    """
    width, height, base = 360, 132, 104
    left, right = 8.0, width - 8.0
    values = _means(absolute / (float(absolute.max()) or 1.0), _SHARE_POINTS)
    top = float(values.max()) or 1.0
    edges = np.linspace(left, right, len(values) + 1)
    x = np.concatenate([[left], np.repeat(edges, 2)[1:-1], [right]])
    y = np.concatenate([[base], base - (base - 14) * np.repeat(values, 2) / top, [base]])
    body = _path("share", x, y, closed=True) + _line("axis", left, base, right, base)
    body += _text(left, base + 20, "step 0") + _text(right, base + 20, f"step {len(absolute) - 1:,}", "end")
    return _svg(width, height, words, body)


def scatter(predicted: np.ndarray, actual: np.ndarray, words: str) -> Markup:
    """Draw what was predicted (subsets,) against what came (subsets,), on axes of the same scale."""
    size, left, top = 300, 62, 8
    side = size - left - top
    predicted, actual = predicted[:_SCATTER_POINTS], actual[:_SCATTER_POINTS]
    low = float(min(predicted.min(), actual.min()))
    high = float(max(predicted.max(), actual.max()))
    span = high - low or 1.0

    def place(values: np.ndarray) -> np.ndarray:
        return 8 + (values - low) / span * (side - 16) if high > low else np.full(len(values), side / 2)

    body = Markup('<rect class="frame" x="{}" y="{}" width="{}" height="{}"/>').format(left, top, side, side)
    body += _line("equal", left, top + side, left + side, top)
    for a, b in zip(left + place(predicted), top + side - place(actual), strict=True):
        body += Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(a, b)
    ends = _apart(low, high)
    body += _text(left + 8, top + side + 16, ends[0]) + _text(left + side - 8, top + side + 16, ends[1], "end")
    body += _text(left - 6, top + side - 6, ends[0], "end") + _text(left - 6, top + 14, ends[1], "end")
    body += _text(left + side / 2, top + side + 36, "predicted", "middle")
    body += Markup('<text transform="translate(16 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(
        top + side / 2, "after retraining"
    )
    return _svg(size, size, words, body, "chart scatter")


def _apart(low: float, high: float) -> tuple[str, str]:
    """Two numbers with as many digits as tell them apart."""
    for digits in range(2, 10):
        ends = (decimal(low, digits), decimal(high, digits))
        # The ends may not look the same, nor the gap between them like nothing.
        if ends[0] != ends[1] and abs(float(f"{low:.{digits - 1}e}") - low) <= 0.05 * (high - low):
            return ends
    return decimal(low, 3), decimal(high, 3)
