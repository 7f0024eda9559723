import dataclasses
import itertools
import re
import unicodedata
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from tracked_replay.compare.result import (
    Cause,
    Comparison,
    Difference,
    Drift,
    TensorComparison,
    Tolerance,
    TraceDifference,
)
from tracked_replay.report import (
    comparison_figure,
    comparison_html,
    comparison_matrix_html,
    comparison_matrix_text,
    comparison_text,
    figure_png_bytes,
)
from tracked_replay.report._compare import _templates

RUN_A = "3f1c2b9a8d7e4f60a1b2c3d4e5f60718"
RUN_B = "9b8a7c6d5e4f30211223344556677889"
VOID = {"meta", "img", "br", "link", "input", "hr"}
SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    SCRIPT,
    "\"'><img src=x onerror=alert(1)>",
    "a\u202eevil\u2066\x1b[31m\n\ud800",
    "y" * 10_000,
    "{{ 7 * 7 }}",
    "猫" * 90,
)


class Page(HTMLParser):
    """A page taken apart: refuses tags that do not close, and keeps what is looked at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.cells: list[list[str]] = []
        self.folded = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data
        if {"h1", "h2"} & set(self.open):
            self.headings[-1] += data
        if "details" in self.open:
            self.folded += data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]

    def row(self, first: str) -> list[str]:
        return next([" ".join(cell.split()) for cell in row] for row in self.cells if row[0].strip().startswith(first))


def tensor(name: str, **changes: Any) -> TensorComparison:
    given: dict[str, Any] = {
        "name": name,
        "equal": False,
        "difference": "values",
        "dtype_a": "float32",
        "dtype_b": "float32",
        "shape_a": (64, 3),
        "shape_b": (64, 3),
        "elements": 192,
        "differing": 48,
        "beyond": 48,
        "largest_absolute": 3e-5,
        "largest_relative": 0.25,
        "largest_ulp": 4123,
        "median_ulp": 12.5,
        "first_index": (0, 2),
        "first_a": "0.5 (0x3f000000)",
        "first_b": "0.50000006 (0x3f000001)",
    }
    return TensorComparison(**(given | changes))


def equal_tensor(name: str) -> TensorComparison:
    return TensorComparison(name, True, "none", "float32", "float32", (64,), (64,), 64)


def drift(values: Any, steps: Any = None, names: Any = None) -> Drift:
    rows = tuple(tuple(row) for row in values)
    steps = range(len(rows[0])) if steps is None else steps
    return Drift(tuple(steps), tuple(names or (f"parameters/{row}" for row in range(len(rows)))), rows)


def differences(*names: str) -> tuple[Difference, ...]:
    return tuple(Difference(name, f"{name} on A", f"{name} on B") for name in names)


RICH = Comparison(
    RUN_A,
    RUN_B,
    "different",
    "The runs differ from step 2 on. No tolerance is in force.",
    first_divergent_step=2,
    first_difference="lr",
    first_tensor="parameters/head.weight",
    causes=(Cause("lr", "The learning rate differs from step 2 on."), Cause("versions", "torch differs.")),
    steps_a=4,
    steps_b=5,
    tensors=(
        tensor("parameters/head.weight"),
        tensor("parameters/head.bias", difference="dtype", dtype_b="bfloat16", differing=0, first_index=None),
        tensor("buffers/gone", difference="missing in b", dtype_b=None, shape_b=None, differing=0, first_index=None),
        tensor("buffers/odd", nan_on_one_side=3, nan_payloads=4, signed_zeros=5, subnormals=6, infinities=7),
        equal_tensor("momentum/head.weight"),
    ),
    tensors_step=4,
    first_tensors=(tensor("parameters/first.weight", largest_ulp=1),),
    trace=(TraceDifference("loss", 3, 2, "1.25", "1.5"),),
    generators=differences("torch.bin"),
    seeds=differences("seed"),
    config=differences("train.lr"),
    environment=differences(*(f"packages.{number}" for number in range(30))),
    other=(Difference("code", "aa", None),),
    drift=drift([[0, 0, 0, 1e-6, 1e-4], [0, 0, 0, None, 1e-2]]),
)
IDENTICAL = Comparison(
    RUN_A, RUN_B, "identical", "Every state is the same.", steps_a=4, steps_b=4, tensors=(equal_tensor("parameters/w"),)
)


def hostile(text: str) -> Comparison:
    """A comparison with `text` wherever a text from outside can stand."""
    difference = (Difference(text, text, text + "!"),)
    return dataclasses.replace(
        RICH,
        a=text,
        b=text,
        summary=text,
        tolerance=Tolerance(3, (text,)),
        first_tensor=text,
        causes=(Cause(text, text),) * 5,
        tensors=(
            *[
                tensor(text, difference=each, dtype_a=text, dtype_b=text, first_a=text, first_b=text)
                for each in ("values", text)
            ]
            * 6,
            equal_tensor(text),
            tensor(text, equal=True),
        ),
        first_tensors=(tensor(text),),
        trace=(TraceDifference(text, 0, 1, text, text),),  # type: ignore[arg-type]
        generators=difference,
        seeds=difference,
        config=difference * 20,
        environment=difference * 20,
        other=difference,
        drift=drift([[0.0, 1.0]] * 3, names=[text, f"momentum/{text}", "buffers/b"]),
    )


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def check_page(page: str, links: tuple[str, ...] = ()) -> Page:
    """Well-formed, accessible, and in need of nothing from outside."""
    parsed = Page(page)
    names = {name for name, _attributes in parsed.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    assert parsed.attributes("html") == [{"lang": "en"}]
    assert len(parsed.attributes("h1")) == len(parsed.attributes("main")) == len(parsed.attributes("title")) == 1
    for _name, attributes in parsed.tags:
        assert not any(attribute.startswith("on") for attribute in attributes)
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or "src" not in attributes
        assert attributes.get("href") is None or attributes["href"] in links
    assert not re.search(r"url\(|@import|srcset", page)
    assert len(re.findall("https?:", page)) == sum(page.count(f'href="{link}"') for link in links)
    ids = [attributes["id"] for _name, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes["aria-labelledby"] for _name, attributes in parsed.tags if "aria-labelledby" in attributes}
    assert labels <= set(ids)
    assert all(attributes.get("scope") in ("row", "col") for attributes in parsed.attributes("th"))
    assert len(parsed.attributes("caption")) == len(parsed.attributes("table"))
    assert len([1 for attributes in parsed.attributes("div") if attributes.get("tabindex") == "0"]) == len(
        parsed.attributes("table")
    )
    assert all(attributes["alt"] for attributes in parsed.attributes("img"))
    return parsed


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]  # type: ignore[attr-defined]


def heat_map(figure: Figure) -> QuadMesh:
    return next(mesh for mesh in figure.axes[1].collections if isinstance(mesh, QuadMesh))


def test_every_part_of_a_comparison_has_its_place() -> None:
    page = check_page(comparison_html(RICH, b"png"))
    assert page.headings == [
        "≠A and B are different, first at step 2.",
        "Where they part",
        "Likely causes",
        "Both sides",
        "Along the training",
        "Tensors that differ first",
        "Tensors of the last common state, after 4 steps",
        "Batch trace",
        "Config",
        "Seeds",
        "Generator states",
        "Code, data and other",
        "Environment",
    ]
    for words in (
        "The runs differ from step 2 on.",
        "Tolerance: none, every bit counts.",
        "the learning rate",
        "versions: torch differs.",
        f"{RUN_B}, 5 steps",
        "Of 5: 4 that differ, 1 equal bit for bit.",
        "Largest absolute difference over 2 tensors and 5 states (after 0 to 4 steps): 0.01, after 4 steps.",
    ):
        assert words in page.words
    assert page.attributes("img")[0]["src"] == "data:image/png;base64,cG5n"
    assert page.row("loss") == ["loss", "3", "2", "1.25", "1.5"]
    assert page.row("code") == ["code", "aa", "not there"]
    assert page.row("torch.bin") == ["torch.bin", "torch.bin on A", "torch.bin on B"]


def test_a_tensor_s_row_says_all_that_differs() -> None:
    page = check_page(comparison_html(RICH, None))
    assert page.row("parameters/head.weight") == [
        "parameters/head.weightfloat32 64×3",
        "values",
        "48 of 19225 %",
        "3e-05relative 0.25",
        "4,123median 12.5",
        "[0, 2]A: 0.5 (0x3f000000)B: 0.50000006 (0x3f000001)",
    ]
    assert page.row("parameters/head.bias")[0] == "parameters/head.biasA: float32 64×3B: bfloat16 64×3"
    assert page.row("buffers/gone")[:2] == ["buffers/goneA: float32 64×3B: missing", "missing in b"]
    kinds = ("NaN on one side: 3", "NaN with different bits: 4", "zero with different signs: 5")
    assert page.row("buffers/odd")[1] == "".join(
        ("values", *kinds, "with a subnormal side: 6", "with an infinite side: 7")
    )
    assert page.row("parameters/first")[4] == "1median 12.5"


def test_equal_tensors_and_long_lists_are_folded() -> None:
    page = check_page(comparison_html(RICH, None))
    assert "momentum/head.weight" in page.folded
    assert "packages.29 on B" in page.folded
    assert "30 values differ: packages.0, packages.1, packages.2 and 27 more" in page.folded
    assert "train.lr" not in page.folded
    assert len(page.attributes("img")) == 0


@pytest.mark.parametrize(
    ("differing", "elements", "share"),
    [(1, 10**6, "< 0.01 %"), (10**6 - 1, 10**6, "> 99.9 %"), (10**6, 10**6, "100 %"), (0, 0, "0 %")],
)
def test_a_share_is_never_rounded_to_none_or_all(differing: int, elements: int, share: str) -> None:
    found = tensor("parameters/w", differing=differing, elements=elements)
    page = check_page(comparison_html(dataclasses.replace(RICH, tensors=(found,)), None))
    assert page.row("parameters/w")[2] == f"{differing:,} of {elements:,}{share}"


def test_identical_is_said() -> None:
    page = check_page(comparison_html(IDENTICAL, None))
    assert page.headings[0] == "=A and B are identical, bit for bit."
    assert "Of 1: 0 that differ, 1 equal bit for bit." in page.words
    assert (
        "No difference was found in: config, seeds, generator states, code, data and other, environment." in page.words
    )
    assert "different" not in page.words
    assert comparison_text(IDENTICAL).startswith("A and B are identical, bit for bit.\n")


def test_a_tolerance_in_force_is_said_and_what_it_lets_pass_is_shown() -> None:
    passed = tensor("parameters/passed", equal=True, beyond=0)
    both = dataclasses.replace(
        IDENTICAL, tolerance=Tolerance(4, ("momentum/*", "lr")), tensors=(passed, equal_tensor("parameters/w"))
    )
    sentence = (
        "Tolerance: losses and floating-point tensor elements at most 4 ULP apart count as equal; "
        "left out of the verdict: momentum/*, lr."
    )
    page = check_page(comparison_html(both, None))
    assert page.headings[0] == "=A and B are identical within the tolerance."
    assert sentence in page.words
    assert "Of 2: 0 that differ, 1 that differ within the tolerance, 1 equal bit for bit." in page.words
    assert page.row("parameters/passed")[2] == "48 of 19225 %0 beyond the tolerance"
    assert "bit for bit" not in comparison_text(both)
    assert sentence in comparison_text(both).replace("\n", " ")


def test_of_files_the_first_state_is_named() -> None:
    files = dataclasses.replace(RICH, steps_a=None, steps_b=None, first_divergent_step=7, first_difference="state")
    page = check_page(comparison_html(files, None))
    assert page.headings[0] == "≠A and B are different, first at state 7."
    assert "Tensors, after 4 steps" in page.headings
    assert "No difference" not in check_page(comparison_html(dataclasses.replace(files, seeds=()), None)).words
    assert comparison_text(files).startswith("A and B are different, first at state 7.\n")


def test_what_cannot_be_compared_is_not_called_equal() -> None:
    neither = Comparison(
        "a.safetensors", "b.safetensors", "incomparable", "They have no tensor in common.", steps_a=3, steps_b=3
    )
    page = check_page(comparison_html(neither, None))
    assert page.headings == ["?A and B cannot be compared.", "Both sides"]
    assert "No difference" not in page.words
    assert comparison_text(neither).splitlines() == [
        "A and B cannot be compared.",
        "A: a.safetensors",
        "B: b.safetensors",
        "They have no tensor in common.",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_stays_text(text: str) -> None:
    comparison = hostile(text)
    html = comparison_html(comparison, figure_png_bytes(comparison_figure(comparison)), {text: "javascript:alert(1)"})
    page = check_page(html)
    allowed = set("\n")
    assert {c for c in "".join(page.text) if unicodedata.category(c).startswith("C")} <= allowed
    assert html.encode("utf-8")
    plain = comparison_text(comparison)
    assert len(plain.splitlines()) <= 26
    assert max(map(columns, plain.splitlines())) <= 100
    assert {c for c in plain if unicodedata.category(c).startswith("C")} <= allowed


def test_markup_is_shown_as_it_was_written() -> None:
    page = check_page(comparison_html(hostile(SCRIPT), None))
    assert page.row(SCRIPT)[0].startswith(SCRIPT)
    assert "49" not in check_page(comparison_html(hostile("{{ 7 * 7 }}"), None)).words


def test_invisible_characters_are_shown_and_set_apart() -> None:
    html = comparison_html(dataclasses.replace(RICH, a="a\u202e\u2066b"), None)
    assert '<bdi>a<span class="escape">\\u202e\\u2066</span>b</bdi>' in html


def test_templates_escape_even_what_is_not_prepared() -> None:
    assert _templates().from_string("{{ text }}").render(text="<b>") == "&lt;b&gt;"


def test_long_values_are_cut_around_what_differs() -> None:
    values = ("x" * 5000 + "A" + "z" * 5000, "x" * 5000 + "B" + "z" * 5000)
    page = check_page(comparison_html(dataclasses.replace(RICH, seeds=(Difference("seed", *values),)), None))
    for shown, letter in zip(page.row("seed")[1:], "AB", strict=True):
        assert f"x{letter}z" in shown
        assert shown.endswith("(from character 4,941, 10,001 characters in all)")
        assert len(shown) < 400
    plain = check_page(comparison_html(hostile("y" * 10_000), None))
    assert "(10,000 characters in all)" in plain.words
    assert max(map(len, re.findall("y+", plain.words))) == 600  # of the summary
    assert max(map(len, re.findall("y+", "".join(itertools.chain(*plain.cells))))) == 300


def test_tables_too_long_for_a_page_say_so() -> None:
    many = dataclasses.replace(RICH, environment=differences(*(f"name-{number:04}" for number in range(1234))))
    page = check_page(comparison_html(many, None))
    assert "The first 500 of 1,234; all of them are in comparison.json." in page.words
    assert "name-0499 on A" in page.words
    assert "name-0500" not in page.words


def test_sides_are_linked_only_to_what_a_link_may_hold() -> None:
    url = "https://tracking.example/#/runs/1?a=1"
    assert check_page(comparison_html(RICH, None, {RUN_A: url}), (url,)).attributes("a") == [
        {"href": url, "target": "_blank", "rel": "noopener noreferrer"}
    ]
    for bad in (
        "javascript:alert(1)",
        " javascript:alert(1)",
        "java\nscript:alert(1)",
        "data:text/html,x",
        "file:///etc",
    ):
        assert check_page(comparison_html(RICH, None, {RUN_A: bad})).attributes("a") == []


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_have_contrast_in_light_and_dark() -> None:
    page = comparison_html(RICH, None)
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    ]
    assert len(schemes) == 2
    assert "prefers-color-scheme: dark" in page
    inks = ("ink", "note", "link", "identical", "different", "incomparable")
    for scheme, ink, ground in itertools.product(schemes, inks, ("page", "box")):
        low, high = sorted((luminance(scheme[ink]), luminance(scheme[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_lines_and_heat_map_hold_the_differences() -> None:
    figure = comparison_figure(
        dataclasses.replace(
            RICH,
            drift=drift(
                [[0, 0, 1e-6, 1e-4], [0, 0, None, 1e-2], [0, 0, None, None]],
                steps=(0, 5, 10, 20),
                names=("parameters/a", "buffers/b", "momentum/c"),
            ),
            first_divergent_step=7,
        )
    )
    lines, rows = figure.axes[:2]
    largest, parameters, buffers, momentum = lines.lines[:4]
    np.testing.assert_array_equal(largest.get_xdata(), [0, 5, 10, 20])
    np.testing.assert_allclose(np.asarray(largest.get_ydata())[2:], [-6, -2])
    np.testing.assert_allclose(np.asarray(parameters.get_ydata())[2:], [-6, -4])
    np.testing.assert_allclose(np.asarray(buffers.get_ydata())[2:], [np.nan, -2])
    assert np.isnan(np.asarray(momentum.get_ydata())[2:]).all()
    assert largest.get_linewidth() > 2 * parameters.get_linewidth()
    floor = np.asarray(largest.get_ydata())[:2]
    assert (floor < -6).all()
    names = dict(zip(lines.get_yticks(), [label.get_text() for label in lines.get_yticklabels()], strict=True))
    assert names[floor[0]] == "0"
    assert names[-6.0] == "1e−6"
    cells = np.ma.asarray(heat_map(figure).get_array()).reshape(3, 4)
    np.testing.assert_array_equal(np.ma.getmaskarray(cells), [[0] * 4, [0, 0, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_allclose(cells[:, 3].compressed(), [-4, -2])
    mesh = heat_map(figure)
    equal, apart = mesh.cmap(mesh.norm([cells[0, 0], cells[0, 2]]))
    assert np.ptp(equal[:3]) < 0.05  # grey
    assert np.ptp(apart[:3]) > 0.5
    assert [line.get_xdata()[0] for line in (lines.lines[-1], rows.lines[-1])] == [7, 7]  # type: ignore[index]
    assert {"first divergent step 7", "unknown", "parameters/a", "buffers (1)"} <= set(texts(figure))


def test_states_far_from_evenly_apart_are_drawn_side_by_side() -> None:
    values = [[1e-6, 1e-5, 1e-4, 1e-3]]
    uneven = dataclasses.replace(RICH, drift=drift(values, steps=(121, 122, 130, 400)), first_divergent_step=120)
    figure = comparison_figure(uneven)
    figure.canvas.draw()
    lines = figure.axes[0]
    np.testing.assert_array_equal(lines.lines[0].get_xdata(), [0, 1, 2, 3])
    names = zip(
        figure.axes[1].get_xticks(), [label.get_text() for label in figure.axes[1].get_xticklabels()], strict=True
    )
    assert {(0.0, "121"), (3.0, "400")} <= set(names)
    assert lines.lines[-1].get_xdata() == [-0.5, -0.5]  # all states that are drawn come later
    assert {"first divergent step 120", "states side by side, not to scale"} <= set(texts(figure))
    later = comparison_figure(dataclasses.replace(uneven, first_divergent_step=126))
    assert later.axes[0].lines[-1].get_xdata() == [1.5, 1.5]
    after = comparison_figure(dataclasses.replace(uneven, first_divergent_step=401))
    assert not any("first divergent step" in text for text in texts(after))


def test_over_many_states_no_difference_falls_between_columns() -> None:
    values = np.zeros((2, 1000))
    values[1, 777] = 1e-3
    figure = comparison_figure(dataclasses.replace(RICH, drift=drift(values.tolist())))
    mesh = heat_map(figure)
    cells = np.ma.asarray(mesh.get_array()).reshape(2, -1)
    edges = np.asarray(mesh.get_coordinates())[0, :, 0]
    (column,) = np.flatnonzero(cells[1] == -3)
    assert edges[column] < 777 < edges[column + 1]
    assert cells.shape[1] <= 280
    assert "below, a column is the largest of 4 neighbouring states" in texts(figure)


def test_over_many_tensors_those_that_differ_have_rows() -> None:
    values = np.zeros((400, 2))
    values[[0, 390, 399], 1] = 1.0
    names = [f"parameters/{row}" for row in range(400)]
    figure = comparison_figure(dataclasses.replace(RICH, drift=drift(values.tolist(), names=names)))
    cells = np.ma.asarray(heat_map(figure).get_array()).reshape(-1, 2)
    assert len(cells) == 240
    assert np.count_nonzero(cells[:, 1] == 0) == 3
    assert any("240 of 400 tensors have a row" in text for text in texts(figure))


@pytest.mark.parametrize("tensors", [1, 80])
@pytest.mark.parametrize("steps", [1, 1000])
@pytest.mark.parametrize("value", [0.0, 5e-324, 1.7e308, None])
def test_a_figure_comes_out_at_any_size(tensors: int, steps: int, value: float | None) -> None:
    kinds = ("parameters", "buffers", "momentum", "odd")
    names = [f"{kinds[4 * row // tensors]}/layer.{row}" for row in range(tensors)]
    comparison = dataclasses.replace(RICH, drift=drift([[value] * steps] * tensors, names=names))
    figure = comparison_figure(comparison)
    png = figure_png_bytes(figure)
    assert png == figure_png_bytes(comparison_figure(comparison))
    assert figure.get_size_inches()[1] < 14
    assert any("no difference at any state" in text for text in texts(figure)) == (value == 0)
    check_page(comparison_html(comparison, png))


def test_no_states_no_panels() -> None:
    figure = comparison_figure(IDENTICAL)
    assert figure.axes == []
    assert "There are no states along the training to compare." in texts(figure)
    assert figure_png_bytes(figure)
    assert "No states along the training were at hand." in check_page(comparison_html(IDENTICAL, b"png")).words


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Drift((0, 1), ("a",), ((0.0,),)), "the row of a has 1 entries, but there are 2 steps"),
        (Drift((0, 1), ("a", "b"), ((0.0, 0.0),)), "drift.largest_absolute has 1 entries, but there are 2 tensors"),
        (Drift((1, 0), ("a",), ((0.0, 0.0),)), "steps must rise"),
    ],
)
def test_drift_that_does_not_fit_is_refused(wrong: Drift, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison_figure(dataclasses.replace(RICH, drift=wrong))


def test_the_terminal_shows_the_verdict_first_and_the_rest_shortly() -> None:
    lines = comparison_text(RICH).splitlines()
    assert lines[:4] == [
        "A and B are different, first at step 2.",
        f"A: {RUN_A}",
        f"B: {RUN_B}",
        "The runs differ from step 2 on. No tolerance is in force.",
    ]
    assert lines[4] == "first difference: step 2, the learning rate, tensor parameters/head.weight"
    assert lines[5:7] == ["likely cause: lr: The learning rate differs from step 2 on.", "other causes: versions"]
    table = [line.split() for line in lines]
    assert ["parameters/head.weight", "48", "of", "192", "4,123", "3e-05"] in table
    assert "buffers/gone" in comparison_text(RICH)
    assert any(line.startswith("tensors after 4 steps: 4 differ, 1 equal ") for line in lines)
    assert "batch trace: 1 differs: loss from step 3 on" in lines
    assert "config: 1 differs: train.lr" in lines
    assert lines[-1] == "environment: 30 values differ: packages.0, packages.1, packages.2 and 27 more"
    assert max(map(len, lines)) <= 100


ULP = "units in the last place: steps between neighbouring floating-point numbers"


def test_ulp_are_explained_where_they_are_first_spoken_of() -> None:
    page = check_page(comparison_html(RICH, None))
    assert page.words.index(f"ULP, {ULP}") == page.words.index("ULP")
    assert page.words.count(ULP) == 1
    assert "Subnormal: " not in page.words.split("Tensors of the last common state")[0]
    last = dataclasses.replace(RICH, first_tensors=())
    page = check_page(comparison_html(last, None))
    assert page.words.index(f"ULP, {ULP}") == page.words.index("ULP")
    assert "Subnormal: so close to 0 that fewer digits are kept." in page.words
    lines = comparison_text(RICH).splitlines()
    (place,) = [place for place, line in enumerate(lines) if line == f"  ULP, {ULP}"]
    assert lines[place + 1].startswith("batch trace: ")
    assert "ULP" not in comparison_text(IDENTICAL)
    tolerant = dataclasses.replace(RICH, tolerance=Tolerance(2), summary="Different beyond 2 ULP (1 apart).")
    assert ULP not in comparison_text(tolerant)  # said by the summary


PACKAGES = tuple(f"packages.installed.{name}" for name in "abcdefghijkl")
COLLAPSED = "12 packages differ: a, b, c and 9 more"


@pytest.mark.parametrize("causes", [(), (Cause("config", "train.lr is 1 in A and 2 in B"),), (Cause("versions", "a"),)])
def test_packages_are_one_line_where_they_explain_nothing(causes: tuple[Cause, ...]) -> None:
    verdict = "different" if causes else "identical"
    found = dataclasses.replace(RICH, verdict=verdict, causes=causes, environment=differences(*PACKAGES))  # type: ignore
    page = check_page(comparison_html(found, None))
    assert page.headings[-1] == "Environment"
    assert COLLAPSED in page.folded
    assert "packages.installed.l on A" in page.folded
    assert comparison_text(found).splitlines()[-1] == f"environment: {COLLAPSED}"
    few = dataclasses.replace(found, environment=differences(PACKAGES[0], "cpu.model"))
    page = check_page(comparison_html(few, None))
    assert ("1 package differs: a; 1 other value differs: cpu.model" in page.folded) == (
        causes[:1] != (("versions", "a"),)
    )
    assert page.row("cpu.model") == ["cpu.model", "cpu.model on A", "cpu.model on B"]


def test_the_terminal_shows_eight_tensors_and_counts_the_rest() -> None:
    many = dataclasses.replace(RICH, tensors=tuple(tensor(f"parameters/layer-{number}") for number in range(20)))
    found = comparison_text(many)
    assert "layer-7 " in found
    assert "layer-8 " not in found
    assert "  and 12 more" in found.splitlines()


def test_of_a_long_tensor_name_the_terminal_shows_the_end() -> None:
    long = dataclasses.replace(RICH, tensors=(tensor("parameters/" + "layer." * 30 + "weight"),))
    assert "layer.layer.weight " in comparison_text(long)


NAMES = ("run-a", "run-b", "run-c", SCRIPT)
D, S, X = "different", "identical", "incomparable"
VERDICTS = ((S, D, S, X), (D, S, D, X), (S, D, S, X), (X, X, X, S))
STEPS = ((None, 12, None, None), (12, None, None, None), (None, None, None, None), (None, None, None, None))


def test_a_matrix_says_in_every_cell_who_equals_whom() -> None:
    url = "http://localhost:5000/#/runs/1"
    page = check_page(comparison_matrix_html(NAMES, VERDICTS, STEPS, {"run-b": url, SCRIPT: "javascript:x"}), (url,))
    assert page.row("1:") == ["1: run-a", "–", "step 12", "equal", "unknown"]
    assert page.row("2:") == ["2: run-b", "step 12", "–", "differ", "unknown"]
    assert page.row("4:") == [f"4: {SCRIPT}", "unknown", "unknown", "unknown", "–"]
    sentences = [
        "Runs 1 and 3 are equal.",
        "Run 2 equals no other run.",
        "Run 4 cannot be compared with any other run.",
    ]
    assert " ".join(sentences) in page.words
    lines = comparison_matrix_text(NAMES, VERDICTS, STEPS).splitlines()
    assert lines[:3] == sentences
    assert ["1", "run-a", "–", "step", "12", "equal", "unknown"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("equal", "sentences"),
    [
        ({(0, 1), (0, 2), (1, 2)}, ["All runs are equal."]),
        (set(), ["Runs 1, 2 and 3 equal no other run."]),
        ({(0, 1), (1, 2)}, ["Runs 1 and 2 are equal.", "Equal to each other, though not to all of a group: 2 and 3."]),
    ],
)
def test_groups_hold_only_runs_that_all_equal_each_other(equal: set[tuple[int, int]], sentences: list[str]) -> None:
    verdicts = [[S if i == j or {(i, j), (j, i)} & equal else D for j in range(3)] for i in range(3)]
    text = comparison_matrix_text("abc", verdicts, [[None] * 3] * 3)
    assert text.splitlines()[: len(sentences) + 1] == [*sentences, ""]


def test_a_wide_matrix_stays_within_the_terminal() -> None:
    count = 30
    names = ["猫" * 50 + str(number) for number in range(count)]
    text = comparison_matrix_text(names, [[D] * count] * count, [[123_456] * count] * count)
    assert max(map(columns, text.splitlines())) <= 100
    assert text.count("step 123,456") == count * (count - 1)


@pytest.mark.parametrize(
    ("verdicts", "steps", "message"),
    [
        (VERDICTS[:3], STEPS, "verdicts has 3 entries, but there are 4 names"),
        (VERDICTS, [row[:3] for row in STEPS], "a row of first_steps has 3 entries, but there are 4 names"),
        (((S, S, S, X), *VERDICTS[1:]), STEPS, r"the entries \[1\]\[0\] and \[0\]\[1\] must be the same"),
        (VERDICTS, (*STEPS[:3], (3, None, None, None)), r"the entries \[3\]\[0\] and \[0\]\[3\] must be the same"),
        ((*VERDICTS[:3], ("same", X, X, S)), STEPS, r"verdicts\[3\]\[0\] is 'same'; allowed: identical, different"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(verdicts: Any, steps: Any, message: str) -> None:
    for make in (comparison_matrix_html, comparison_matrix_text):
        with pytest.raises(ValueError, match=message):
            make(NAMES, verdicts, steps)
