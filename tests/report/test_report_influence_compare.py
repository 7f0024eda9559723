"""Two runs' influence scores side by side: the page, the text, the figure."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from test_report_compare import HOSTILE, RUN_A, RUN_B, Page, check_page, columns, texts

from tracked_replay.compare.influence import InfluenceComparison, InfluenceTable, compare_influence
from tracked_replay.compare.result import Difference
from tracked_replay.replay import Target
from tracked_replay.report import (
    figure_png_bytes,
    influence_comparison_html,
    influence_comparison_text,
    influence_scatter_figure,
)

NAMES = ("cat", "dog", "frog")
A = np.random.default_rng(0).normal(size=(3, 90))
B = A + 0.3 * np.random.default_rng(1).normal(size=(3, 90)) * np.array([[0], [1], [1]])
PIXELS = np.full((4, 5), 200, dtype=np.uint8)


def compared(a: np.ndarray = A, b: np.ndarray = B, name: str = "target") -> InfluenceComparison:
    """Scores of two runs on targets of some name, which is followed by the number of the target."""
    targets = tuple(Target(place, f"{name} {place}", (place,), (1.0,)) for place in range(len(a)))
    labels = np.arange(a.shape[1]) % 3
    found = compare_influence(*(InfluenceTable(run, "", targets, s, labels) for run, s in ((RUN_A, a), (RUN_B, b))))
    return dataclasses.replace(
        found,
        training_a="1" * 32,
        training_b="2" * 32,
        training="They replayed two training runs that end in different states.",
        inputs=(Difference("seed", "0", "1"),),
    )


def test_every_part_has_its_place() -> None:
    found = compared()
    page = check_page(influence_comparison_html(found, b"png", NAMES))
    assert page.headings == [
        "≠The scores of A and B are different.",
        "Both sides",
        "What the runs were computed from",
        "Targets",
        "Score against score",
        "Examples that moved most",
    ]
    assert page.row("seed") == ["seed", "0", "1"]
    assert page.row("target 0") == ["target 0", "0 of 90", "1.000", "1.000", "20 of 20", "20 of 20"]
    second = found.targets[1]
    assert page.row("target 1")[1:3] == ["90 of 90", f"{second.spearman:.2f}"]
    assert page.row("target 1")[4] == f"{second.helpful.common} of 20"
    first = second.moved_in_rank[0]
    assert page.row(f"{first.train_index}{NAMES[first.label]}")[1:3] == [f"{first.rank_a:g}", f"{first.rank_b:g}"]
    assert f"compare --run-a {'1' * 32} --run-b {'2' * 32}" in page.words
    assert "Target target 0" not in page.words  # nothing moved there
    assert page.attributes("img")[0]["src"] == "data:image/png;base64,cG5n"


def test_pictures_of_moved_examples_are_embedded_once() -> None:
    found = compared()
    shown = {example.train_index for target in found.targets for example in target.moved_in_rank}
    html = influence_comparison_html(found, None, NAMES, {index: PIXELS for index in (*shown, 999)})
    page = Page(html)
    assert html.count("url(data:image/png;base64,") == len(shown)
    assert len(re.findall("url[(]", html)) == len(shown)
    spans = [span for span in page.attributes("span") if span.get("role") == "img"]
    assert {span["class"] for span in spans} == {f"picture t{index}" for index in shown}
    index = min(shown)
    assert {span["aria-label"] for span in spans if span["class"] == f"picture t{index}"} == {
        f"training example {index}, label {NAMES[index % 3]}"
    }


def test_identical_runs_have_no_moved_examples() -> None:
    found = dataclasses.replace(compared(A, A), training_b="1" * 32, training="Both replayed the same training run.")
    page = check_page(influence_comparison_html(found, None, NAMES))
    assert page.headings[0] == "=The scores of A and B are identical, bit for bit."
    assert "Examples that moved most" not in page.headings
    assert "Where they part" not in page.words
    text = influence_comparison_text(found, NAMES)
    assert text.startswith("The scores of A and B are identical, bit for bit.\n")
    assert "moved most" not in text


def test_scores_that_differ_by_rounding_are_not_called_different() -> None:
    found = compared(A, A * (1 + 2**-30))
    sentence = "Same ranking; the scores differ only by rounding (largest difference 9e-10 of the largest score)."
    page = check_page(influence_comparison_html(found, None, NAMES))
    assert found.verdict == "different"
    assert page.headings[0] == f"≈{sentence}"
    assert influence_comparison_text(found, NAMES).startswith(f"{sentence}\n")
    assert "different" not in influence_comparison_text(dataclasses.replace(found, training=""), NAMES)
    scaled = compared(A, 1.5 * A)
    page = check_page(influence_comparison_html(scaled, None, NAMES))
    assert page.headings[0].startswith("≠Same ranking, but the scores differ (largest difference 0.3 of")


def test_correlations_are_explained() -> None:
    page = check_page(influence_comparison_html(compared(), None, NAMES))
    assert page.words.index("Spearman correlation (of the ranks)") == page.words.index("Spearman")
    assert page.words.index("Pearson correlation (of the scores)") == page.words.index("Pearson")
    assert "  Spearman: correlation of the ranks, Pearson: of the scores" in influence_comparison_text(
        compared(), NAMES
    )


def test_incomparable_runs_have_a_reason() -> None:
    found = InfluenceComparison(RUN_A, RUN_B, "incomparable", "No target in common.", 3, (), ("0", "1"), ("2",))
    page = check_page(influence_comparison_html(found, None, NAMES))
    assert page.headings == ["?The scores of A and B cannot be compared.", "Both sides"]
    assert "Targets that only A has: 0, 1." in page.words
    assert influence_comparison_text(found, NAMES).splitlines() == [
        "The scores of A and B cannot be compared.",
        f"A: {RUN_A}",
        f"B: {RUN_B}",
        "No target in common.",
    ]


def test_without_variation_the_correlation_is_undefined() -> None:
    found = compared(np.zeros((1, 9)), np.arange(9.0)[None])
    page = check_page(influence_comparison_html(found, None, NAMES))
    assert page.row("target 0")[2:] == ["undefined", "undefined", "none", "0 of 8"]
    assert "undefined" in influence_comparison_text(found, NAMES)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(text: str) -> None:
    found = compared(name=text)
    found = dataclasses.replace(
        found,
        a=text,
        b=text,
        summary=text,
        training=text,
        training_a=text,
        training_b=text + "!",
        only_a=(text,) * 3,
        inputs=(Difference(text, text, None),) * 30,
    )
    html = influence_comparison_html(found, None, (text,) * 3, {}, {text: "javascript:alert(1)"})
    page = check_page(html)
    html.encode("utf-8")
    pictured = Page(influence_comparison_html(found, None, (text,) * 3, {index: PIXELS for index in range(90)}))
    for parsed in (page, pictured):
        assert not {"script", "iframe", "object"} & {name for name, _ in parsed.tags}
        assert not any(attribute.startswith("on") for _, attributes in parsed.tags for attribute in attributes)
    plain = influence_comparison_text(found, (text,) * 3)
    assert len(plain.splitlines()) <= 26
    assert max(map(columns, plain.splitlines())) <= 100
    assert len(re.findall("^moved most on .*, rank .*, score changed by [0-9.]+$", plain, re.MULTILINE)) == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2066]", plain)
    assert "49" not in " ".join(page.headings)
    influence_scatter_figure(found, A, B)


def test_many_targets_fit_the_terminal() -> None:
    found = compared(np.tile(A, (20, 1)), np.tile(B, (20, 1)), name="n" * 200)
    lines = influence_comparison_text(found, NAMES).splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 100
    assert "  and 52 more" in lines
    page = check_page(influence_comparison_html(found, None, NAMES))
    assert "The first 8 of 40 targets with a difference" in page.words


def test_the_figure_has_a_point_an_example_on_equal_axes() -> None:
    figure = influence_scatter_figure(compared(), A, B)
    assert len(figure.axes) == 3
    for place, axes in enumerate(figure.axes):
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_aspect() == 1
        (points,) = [found for found in axes.collections if isinstance(found, PathCollection)]
        np.testing.assert_allclose(points.get_offsets(), np.stack([A[place], B[place]], axis=1))
        (line,) = axes.get_lines()
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert "equal bit for bit" in texts(figure)
    assert figure_png_bytes(figure).startswith(b"\x89PNG")


def test_the_figure_draws_8_targets_and_says_so() -> None:
    a, b = np.tile(A, (4, 1)), np.tile(B, (4, 1))
    figure = influence_scatter_figure(compared(a, b), a, b)
    assert len(figure.axes) == 8
    assert texts(figure)[0].endswith("(the first 8 of 12 targets that both have)")


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 2 entries, but there are 3 targets"):
        influence_scatter_figure(compared(), A[:2], B[:2])
    with pytest.raises(ValueError, match="but b has"):
        influence_scatter_figure(compared(), A, B[:, :5])
    with pytest.raises(ValueError, match="NaN or Inf"):
        influence_scatter_figure(compared(), A * np.nan, B)
