"""Influence scores of two runs side by side: the figure, the page, and the short table for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ._canvas import check_length, finite, title_of_first
from ._compare import _MAX_SUMMARY, _SYMBOLS, COLUMNS, _amount, _text_names, rendered, shown, wrapped
from ._lds import _hundredths, scatter_panels
from ._numbers import decimal, signed_decimal
from ._text import plain_text
from ._thumbnails import picture_rules

if TYPE_CHECKING:
    # For its types alone, as in _compare.
    from tracked_replay.compare.influence import InfluenceComparison, MovedExample, Overlap, TargetComparison

INFLUENCE_COMPARISON_TARGETS = 8  # in the figure, and with their moved examples on the page
_TEXT_TARGETS = 8
_TEXT_MOVED = 3
_MAX_LABEL = 24
_PICTURE_BUDGET = 3_000_000  # characters of data URIs
_HEADLINES = {
    "identical": "The scores of A and B are identical, bit for bit.",
    "different": "The scores of A and B are different.",
    "incomparable": "The scores of A and B cannot be compared.",
}


class _Moved(NamedTuple):
    """A moved example as it is shown."""

    picture: str
    number: int
    label: Markup
    words: str
    scores: tuple[str, str]
    change: str
    ranks: tuple[str, str]


class _Target(NamedTuple):
    """A target with the examples that moved most on it."""

    name: Markup
    tables: Sequence[tuple[str, Sequence[_Moved]]]


def influence_scatter_figure(comparison: InfluenceComparison, a: ArrayLike, b: ArrayLike) -> Figure:
    """Draw the scores of two runs against each other, a small square panel a target, a point a training example.

    `a`, `b`: (targets, training examples), scores on the targets of `comparison` in their order. Both axes of a panel
    have the same scale, and a dashed line where the scores are equal. The first 8 targets are drawn; the title says so
    where there are more. Raises ValueError where shapes do not match or a value is NaN or Inf.
    """
    one, two = finite("a", a, 2), finite("b", b, 2)
    if one.shape != two.shape:
        raise ValueError(f"a has the shape {one.shape}, but b has {two.shape}")
    check_length("a", len(one), len(comparison.targets), "targets")
    targets = comparison.targets[:INFLUENCE_COMPARISON_TARGETS]
    title = title_of_first(
        "Influence scores of two runs", len(targets), len(comparison.targets), "targets that both have"
    )
    note = "Across: score in A.  Up: score in B.  A point a training example; dashed: equal."
    said = ["equal bit for bit" if not target.differing else _spearman_words(target) for target in targets]
    names = [target.name for target in targets]
    return scatter_panels(
        one[:INFLUENCE_COMPARISON_TARGETS].T, two[:INFLUENCE_COMPARISON_TARGETS].T, names, said, title, note
    )


def _spearman_words(target: TargetComparison) -> str:
    return f"Spearman {_correlation(target.spearman)}"


def _correlation(value: float | None) -> str:
    return "undefined" if value is None else _hundredths(value)


def _overlap(overlap: Overlap) -> str:
    return f"{overlap.common} of {overlap.of}" if overlap.of else "none"


def _percent(share: float | None) -> str:
    """A share, never rounded to all."""
    if share is None:
        return "none"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"


def _label(label: int, label_names: Sequence[str]) -> str:
    return label_names[label] if 0 <= label < len(label_names) else str(label)


def _moved(example: MovedExample, label_names: Sequence[str], pictures: Mapping[int, np.ndarray]) -> _Moved:
    label = _label(example.label, label_names)
    index = example.train_index
    return _Moved(
        f"t{index}" if index in pictures else "",
        index,
        shown(label, _MAX_LABEL),
        f"training example {index}, label {plain_text(label)}",
        (signed_decimal(example.score_a, 3), signed_decimal(example.score_b, 3)),
        signed_decimal(example.score_b - example.score_a, 3),
        (_amount(example.rank_a), _amount(example.rank_b)),
    )


def _moved_targets(
    comparison: InfluenceComparison, label_names: Sequence[str], pictures: Mapping[int, np.ndarray]
) -> list[_Target]:
    found = []
    for target in [target for target in comparison.targets if target.differing][:INFLUENCE_COMPARISON_TARGETS]:
        tables = (
            ("Of the most helpful and most harmful examples: those whose rank changed most", target.moved_in_rank),
            ("Of all examples: those whose score changed most", target.moved_in_score),
        )
        rows = [
            (caption, [_moved(example, label_names, pictures) for example in examples])
            for caption, examples in tables
            if examples
        ]
        if rows:
            found.append(_Target(shown(target.name, 60), rows))
    return found


def influence_comparison_html(
    comparison: InfluenceComparison,
    figure_png: bytes | None,
    label_names: Sequence[str],
    pictures: Mapping[int, np.ndarray] = {},
    links: Mapping[str, str] = {},
) -> str:
    """Return a page on two runs' influence scores that needs nothing but itself.

    `figure_png`: the bytes of `influence_scatter_figure`, shown in the page. `label_names`: a name a label.
    `pictures`: training index → uint8 (H, W) or (H, W, 3), shown beside examples that moved. `links`: URLs by run ID;
    only http, https and relative ones become links. All text from outside is shown literally, long values cut with
    their length said.
    """
    differing = [target for target in comparison.targets if target.differing]
    moved = _moved_targets(comparison, label_names, pictures)
    used = {example.number for target in moved for _, examples in target.tables for example in examples}
    rules = picture_rules({f"t{index}": pictures[index] for index in sorted(used & set(pictures))}, _PICTURE_BUDGET)
    return rendered(
        "influence_compare.html.j2",
        links,
        comparison=comparison,
        headline=influence_comparison_headline(comparison),
        symbol="≈" if comparison.only_rounding else _SYMBOLS[comparison.verdict],
        summary=shown(comparison.summary, _MAX_SUMMARY),
        image=None if figure_png is None else base64.b64encode(figure_png).decode("ascii"),
        correlation=_correlation,
        overlap=_overlap,
        top_overlap=_percent(comparison.top_overlap),
        moved=moved,
        differing=differing,
        picture_rules=Markup(rules),  # noqa: S704
    )


def _text_row(name: str, *cells: str) -> str:
    widths = (23, 9, 9, 11, 11)
    return f"  {name:26s}" + "".join(f" {cell:>{width}s}" for cell, width in zip(cells, widths, strict=True))


def _text_targets(comparison: InfluenceComparison) -> list[str]:
    if not comparison.targets:
        return []
    rows = [
        _text_row(
            plain_text(target.name, 26),
            f"{target.differing:,} of {_amount(comparison.examples)}",
            _correlation(target.spearman),
            _correlation(target.pearson),
            _overlap(target.helpful),
            _overlap(target.harmful),
        )
        for target in comparison.targets[:_TEXT_TARGETS]
    ]
    more = len(comparison.targets) - _TEXT_TARGETS
    means = (_correlation(comparison.spearman), _correlation(comparison.pearson))
    return [
        _text_row("target", "scores that differ", "Spearman", "Pearson", "helpful", "harmful"),
        *rows,
        *([f"  and {more:,} more"] if more > 0 else []),
        _text_row("mean", "", *means, _percent(comparison.top_overlap), "(both)"),
        "  Spearman: correlation of the ranks, Pearson: of the scores; 1 where they go together",
        "  helpful, harmful: how many of the most helpful and most harmful examples both runs have",
    ]


def _text_moved(comparison: InfluenceComparison, label_names: Sequence[str]) -> list[str]:
    """The example that moved most on each of the first targets that differ."""
    lines = []
    for target in [target for target in comparison.targets if target.moved_in_score][:_TEXT_MOVED]:
        example = (target.moved_in_rank or target.moved_in_score)[0]
        label = plain_text(_label(example.label, label_names), 12)
        line = (
            f"moved most on {plain_text(target.name, 12)}: example {example.train_index} ({label}), "
            f"rank {_amount(example.rank_a)} → {_amount(example.rank_b)}, "
            f"score changed by {decimal(abs(example.score_b - example.score_a))}"
        )
        lines.append(plain_text(line, COLUMNS))
    return lines


def influence_comparison_headline(comparison: InfluenceComparison) -> str:
    """Return the verdict as one plain sentence; of scores that differ, how near they are."""
    return f"{comparison.closeness}." if comparison.closeness else _HEADLINES[comparison.verdict]


def influence_comparison_text(comparison: InfluenceComparison, label_names: Sequence[str]) -> str:
    """Return the comparison for the terminal: at most 26 lines of at most 100 characters, plain text."""
    return "\n".join(
        [
            influence_comparison_headline(comparison),
            *(f"{side}: {plain_text(name, COLUMNS - 3)}" for side, name in (("A", comparison.a), ("B", comparison.b))),
            *wrapped(comparison.summary, 4),
            *wrapped(comparison.training, 2),
            *_text_names("inputs", [value.name for value in comparison.inputs]),
            *_text_targets(comparison),
            *_text_moved(comparison, label_names),
        ]
    )
