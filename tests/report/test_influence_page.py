from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import influence_pages as made
import matplotlib.image
import numpy as np
import pytest

from tracked_replay.report import (
    Agreement,
    Fact,
    InfluentialExample,
    Picture,
    Prediction,
    class_influence,
    influence_page,
)
from tracked_replay.report._numbers import decimal, signed_decimal
from tracked_replay.report._thumbnails import picture_rules, shrunk

VOID = {"meta", "img", "br", "link", "input", "hr"}
SVG_PARTS = {"path", "text", "rect", "circle"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style><b>",
    "a\u202eevil\u2066\u2028\x1b\ud800",
    "y" * 10_000,
    "{{ 7 * 7 }}",
)


class Document(HTMLParser):
    """A page taken apart; refuses tags that do not close and attributes given twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.of: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._part(tag)
        assert len(given) == len(attrs), (tag, attrs)
        self.tags.append((tag, given))
        self.of.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_PARTS, tag
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag
        self._part(tag)

    def _part(self, tag: str) -> None:
        if tag not in ("strong", "bdi"):
            self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        for tag, _ in self.open:
            self.of[tag][-1] += data
        if not {"style", "script"} & {tag for tag, _ in self.open}:
            self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str, **having: str) -> list[dict[str, str]]:
        return [given for name, given in self.tags if name == tag and having.items() <= given.items()]


def document(**changes: object) -> Document:
    return Document(influence_page(made.page(**changes)))


def test_a_page_has_a_language_one_title_headings_in_order_and_names_for_all_pictures() -> None:
    found = document(validation=made.validation())
    assert found.all("html") == [{"lang": "en"}]
    assert [len(found.of[tag]) for tag in ("h1", "title", "main")] == [1, 1, 1]
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for _, given in found.tags:
        if given.get("role") == "img":
            assert given["aria-label"].strip()
    for given in found.all("th"):
        assert given["scope"] in ("row", "col")
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(ids) == len(set(ids))
    for _, given in found.tags:
        for reference in (given.get("aria-labelledby"), given.get("aria-controls")):
            assert reference is None or reference in ids
        if given.get("href", "").startswith("#"):
            assert given["href"][1:] in ids


def test_every_example_stands_with_label_index_score_direction_and_steps() -> None:
    one = made.target(21)
    found = document(targets=[one])
    shown = [(int(given["data-index"]), float(given["value"])) for given in found.all("data")]
    assert shown == [(e.picture.index, e.score) for e in (*one.helpful, *one.harmful)]
    labels = [given["aria-label"] for given in found.all("span", role="img")]
    strongest = one.helpful[0]
    expected = (
        f"training example {strongest.picture.index}, label {strongest.picture.label}, "
        f"score {signed_decimal(strongest.score)}: helps"
    )
    assert labels[1] == expected
    assert sum(label.endswith(": harms") for label in labels) == 4
    assert found.words.count("steps 2 to 27") == 8
    assert f"Leaving out example {strongest.picture.index} would change the loss by about +" in found.words
    assert "The model says dog (probability 63.0 %), and is wrong." in found.words


def test_the_steps_of_an_example_are_the_first_and_last_that_changed_its_score() -> None:
    along = np.array([0.0, 0.0, 0.5, 0.5, -1.0, -1.0])
    picture = Picture(made.pixels(1), "cat", 1, -1.0)
    assert InfluentialExample(picture, along).acting == (2, 4)
    assert InfluentialExample(picture, along[2:]).acting == (0, 2)
    assert InfluentialExample(picture).acting is None


def test_steps_count_from_0_all_over_the_page_as_they_do_in_the_trace() -> None:
    steps = 30
    always = InfluentialExample(Picture(made.pixels(5), "cat", 5, -3.0), np.linspace(-0.1, -3.0, steps))
    found = document(targets=[made.target(21, helpful=[always], harmful=[], absolute=np.ones(steps))])
    named = {int(number) for text in found.texts for number in re.findall(r"\bstep (\d+)", text)}
    ranges = re.findall(r"steps (\d+) to (\d+)", found.words)
    assert named == {0, steps - 1}
    assert ("0", str(steps - 1)) in ranges
    assert "steps count from 0" in found.words


def test_without_a_script_every_target_is_there_to_be_read() -> None:
    found = document()
    assert not any("hidden" in given for _, given in found.tags)
    assert [given["id"] for given in found.all("section", **{"class": "target"})] == [
        "target-21",
        "target-3",
        "target-combination-1",
    ]
    assert [given["href"] for given in found.all("a") if given.get("id", "").startswith("tab-")] == [
        "#target-21",
        "#target-3",
        "#target-combination-1",
    ]
    assert "Mean over 10 evaluation examples: mean:0-9" in found.words
    assert "and 4 more" in found.words
    assert len(found.all("data")) == 3 * 8


def test_one_target_needs_no_picker() -> None:
    found = document(targets=[made.target(21)])
    assert not found.all("nav")
    assert "the prediction below" in found.words


def test_nothing_comes_from_outside_and_only_our_script_may_run() -> None:
    page = influence_page(made.page())
    found = Document(page)
    assert not {"link", "img", "iframe", "object", "form", "base"} & {tag for tag, _ in found.tags}
    for tag, given in found.tags:
        assert not any(name == "src" or name.startswith("on") for name in given), (tag, given)
    outside = [given for given in found.all("a") if not given["href"].startswith("#")]
    assert [given["href"] for given in outside] == [f"http://127.0.0.1:5000/#/experiments/0/runs/{made.RUN}"]
    assert {given["rel"] for given in outside} == {"noopener noreferrer"}
    assert set(re.findall(r"url\(([^)]{0,22})", found.of["style"][0])) == {"data:image/png;base64,"}
    (script,) = found.of["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (given["content"] for given in found.all("meta") if "http-equiv" in given)
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")


@pytest.mark.parametrize("url", ["javascript:alert(1)", "#/experiments/0/runs/x", "data:text/html,x", "/x"])
def test_a_link_that_leads_nowhere_or_runs_something_is_text(url: str) -> None:
    found = document(links={made.RUN: url})
    assert all(given["href"].startswith("#") and "/" not in given["href"] for given in found.all("a"))
    assert made.RUN in found.words


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_text_from_outside_is_shown_as_text_everywhere(text: str) -> None:
    plain = document()
    one = made.target(21, label=text, shown=2, prediction=Prediction(text, False, 0.5))
    helpful = [replace(e, picture=replace(e.picture, label=text)) for e in one.helpful]
    page = influence_page(
        made.page(
            task=text,
            targets=[replace(one, helpful=helpful), made.mean_target(name=text)],
            classes=class_influence(np.ones((2, 3)), np.array([0, 1, 2]), [0, text], [text, "b", "c"]),
            facts=[Fact("Influence run", made.RUN), Fact("Data", text, text)],
            validate_command=text,
            validation=None,
        )
    )
    found = Document(page)
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in plain.tags}
    assert len(found.of["script"]) == 1
    assert not any(name.startswith("on") for _, given in found.tags for name in given)
    assert "\u202e" not in page
    assert "\u2028" not in page
    assert "\x1b" not in page
    assert page.encode("utf-8")
    if len(text) == 10_000:
        assert "y" * 400 not in page
        assert found.words.count("(10,000 characters in all)") > 8
        assert any("(10,000 characters in all)" in given["aria-label"] for given in found.all("span", role="img"))
    else:
        start = text.split("\u202e")[0][:20]
        for place in ("Evaluation example 21: ", "The model says ", "A model learned "):
            assert place + start in found.words, place
        assert any(f"label {start}" in given["aria-label"] for given in found.all("span", role="img"))


def test_a_page_of_32_targets_and_50000_examples_stays_small_and_holds_each_picture_once() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(32, 50_000))
    noise = {index: made.pixels(index, 32) for index in range(2_000)}
    targets = []
    for place in range(32):
        order = np.argsort(scores[place, :2_000])

        def strongest(indices: np.ndarray, values: np.ndarray) -> list[InfluentialExample]:
            along = np.linspace(0.0, 1.0, 2_000)
            return [
                InfluentialExample(Picture(noise[int(i)], "automobile", int(i), float(values[i])), along * values[i])
                for i in indices
            ]

        targets.append(
            made.target(
                place,
                helpful=strongest(order[:50], scores[place]),
                harmful=strongest(order[::-1][:50], scores[place]),
                scores=scores[place],
                absolute=rng.random(2_000),
            )
        )
    page = influence_page(made.page(targets=targets, classes=None, training_examples=50_000))
    assert len(page.encode()) < 10_000_000
    rules = re.findall(r"^\.(t\d+)\{background", page, re.MULTILINE)
    used = {example.picture.index for one in targets for example in (*one.helpful, *one.harmful)}
    assert sorted(rules) == sorted(f"t{index}" for index in used)
    assert len(re.findall(r"data:image/png", page)) == len(used) + 32


def test_the_embedded_pictures_are_the_pixels() -> None:
    one = made.target(21, shown=1)
    style = document(targets=[one]).of["style"][0]
    for name, picture in ((f"t{one.helpful[0].picture.index}", one.helpful[0].picture), ("e21", one.pictures[0])):
        (data,) = re.findall(rf"^\.{name}\{{background-image:url\(data:image/png;base64,([^)]*)\)", style, re.MULTILINE)
        read = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")
        np.testing.assert_array_equal(np.round(255 * read[:, :, :3]), picture.pixels)


def test_large_pictures_are_means_of_blocks_and_shrink_until_they_fit() -> None:
    image = made.pixels(1, 96, channels=1)
    small = shrunk(image, 48)
    np.testing.assert_allclose(small, image.reshape(48, 2, 48, 2).mean(axis=(1, 3)), atol=0.5)
    assert shrunk(made.pixels(1, 50), 24).shape == (17, 17, 3)
    assert shrunk(image, 96) is image
    noise = {f"t{index}": made.pixels(index, 64) for index in range(20)}
    assert len(picture_rules(noise, 10**9)) > 100_000 > 60_000 > len(picture_rules(noise, 50_000))


def test_a_validation_is_said_in_words_and_in_a_table() -> None:
    found = document(validation=made.validation(), targets=[made.target(21, retrained=made.retrained())])
    assert (
        "Retraining without a random 1 % of the examples 64 times, the scores ranked the outcomes with correlation "
        "0.996 (0.993 to 0.997, 95 % interval)."
    ) in found.words
    assert "Validated: the scores predict retraining very well" in found.words
    assert "Metasmoothness 0.95" in found.words
    assert "these scores 1 % 0.996 0.993 to 0.997 64" in found.words
    assert "random numbers 1 % −0.05 −0.14 to 0.04 64" in found.words
    assert "20 retrainings without a random 1 % of the training examples" in found.words
    assert len(found.all("circle")) == 20
    assert "Not validated" not in found.words
    assert found.of["h2"][0] == "Can this be believed?"


@pytest.mark.parametrize(
    ("lds", "words"),
    [(0.95, "very well"), (0.75, "predict retraining well"), (0.5, "roughly"), (0.1, "poorly"), (-0.5, "poorly")],
)
def test_a_poor_validation_is_not_praised(lds: float, words: str) -> None:
    assert words in document(validation=made.validation(lds)).words


@pytest.mark.parametrize(("count", "enough"), [(8, False), (15, False), (16, True)])
def test_a_few_retrainings_validate_nothing(count: int, enough: bool) -> None:
    found = document(validation=made.validation(agreements=[Agreement(0.01, "magic", 1.0, 1.0, 1.0, count)]))
    assert ("Validated: the scores predict retraining very well" in found.words) == enough
    assert (f"Only {count} retrainings: too few to say" in found.words) != enough


def test_an_undefined_correlation_is_no_validation() -> None:
    nothing = Agreement(0.01, "magic", math.nan, math.nan, math.nan, 3)
    found = document(
        validation=made.validation(agreements=[nothing]),
        targets=[made.target(21, retrained=replace(made.retrained(), spearman=math.nan, actual=np.ones(20)))],
    )
    assert "Validated without a result" in found.words
    assert "these scores 1 % undefined – 3" in found.words
    assert "Rank correlation undefined" in found.words
    assert "nan" not in found.words.lower()


def test_what_was_not_validated_says_how_to_do_it() -> None:
    found = document()
    assert "Not validated when this was written" in found.words
    assert found.of["code"] == [f"tracked-replay lds --magic-run-id {made.RUN}"]


def test_inexact_scores_are_not_called_exact() -> None:
    found = document(exact=False)
    assert "Not exact. Clipping was on" in found.words
    assert "bit for bit" not in found.words
    assert "bit for bit" in document().words


def test_a_measurement_that_is_no_loss_neither_helps_nor_harms() -> None:
    words = document(is_loss=False, task="Own").words
    assert "loss" not in words
    assert "These lower it most" in words
    assert not re.search(r"\bhelp|\bharm", words.split("A model learned")[1])


def test_a_target_without_influence_says_so() -> None:
    found = document(
        targets=[made.target(21, helpful=[], harmful=[], scores=np.zeros(300), absolute=np.zeros(30))], classes=None
    )
    assert found.words.count("No training example did.") == 2
    assert "0 help and 0 harm; 300 have no influence." in found.words


def test_half_of_the_influence_is_counted() -> None:
    scores = np.array([-4.0, 3.0, 2.0, 1.0, -1.0, 1.0])
    found = document(targets=[made.target(21, scores=scores, absolute=np.array([1.0, 1.0, 4.0, 2.0]))], classes=None)
    assert "Of 6 training examples 2 help and 4 harm. The strongest 2 have half of all influence." in found.words
    assert "Half of the influence arose in the first 3 of 4 steps." in found.words


def test_the_bars_of_the_histogram_hold_every_score_on_its_side() -> None:
    one = made.target(21, count=4_000)
    page = influence_page(made.page(targets=[one], classes=None))
    drawn = dict(re.findall(r'<path class="(help|harm)" d="([^"]*)"', page))
    tops = {
        kind: np.array([104 - float(top) for top in re.findall(r"V([\d.]+)H", path)]) for kind, path in drawn.items()
    }
    tallest = max(top.max() for top in tops.values())
    most = max(_most_in_a_bar(one.scores[one.scores < 0], 60), 1)
    for kind, side in (("help", one.scores < 0), ("harm", one.scores > 0)):
        counts = np.expm1(tops[kind] / tallest * np.log1p(most))
        assert counts.sum() == pytest.approx(np.count_nonzero(side), rel=0.05), kind


def _most_in_a_bar(values: np.ndarray, bins: int) -> int:
    """The highest bar of the helping side, which is the highest of all for the scores of that test."""
    return int(np.histogram(values, np.linspace(values.min(), 0, max(1, round(bins * _part(values))) + 1))[0].max())


def _part(values: np.ndarray) -> float:
    every = made.target(21, count=4_000).scores
    return float(-values.min() / (every.max() - every.min()))


def test_means_by_class_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    scores, labels, own = rng.normal(size=(5, 40)), rng.integers(0, 3, 40), [1, 0, "mean:all", 1, 0]
    found = class_influence(scores, labels, own, ("a", "b", "c", "d"))
    assert found.rows == [("a", 2), ("b", 2), ("mean:all", 0)]
    for row, chosen in enumerate(([1, 4], [0, 3], [2])):
        for column in range(3):
            values = [scores[t, i] for t in chosen for i in range(40) if labels[i] == column]
            assert found.means[row, column] == pytest.approx(np.mean(values))
    assert np.isnan(found.means[:, 3]).all()


def test_the_table_of_classes_says_its_unit_and_the_sign_in_words() -> None:
    classes = class_influence(np.array([[-2e-3, 4e-4, 0.0]]), np.arange(3), [0], ("a", "b", "c", "d"))
    words = document(classes=classes).words
    assert "in thousandths: ▼ helps, ▲ harms." in words
    row = "▼ −2.00 : helps ▲ +0.40 : harms 0.00 : no influence – : no training example of this class"
    assert f"a 1 prediction {row}" in words


def test_a_mean_in_the_table_of_classes_is_not_called_one_prediction() -> None:
    classes = class_influence(np.full((2, 3), -1e-3), np.arange(3), [0, "mean:all"], ("a", "b", "c"))
    words = document(classes=classes).words
    assert "a 1 prediction" in words
    assert "mean:all mean over predictions" in words


def test_of_many_classes_the_strongest_are_shown() -> None:
    names = [f"class {number}" for number in range(100)]
    scores = np.where(np.arange(100) % 10 == 3, -1.0, 1e-3)[None]
    words = document(classes=class_influence(scores, np.arange(100), [0], names)).words
    assert "the strongest 1 of 1 rows and 16 of 100 classes" in words
    assert all(f"class {number}" in words for number in range(3, 100, 10))


def test_text_and_signs_have_contrast_in_light_and_dark() -> None:
    style = document().of["style"][0]
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part))
        for part in (style.split("@media")[0], style.split("@media")[1])
    )
    for scheme in (light, dark):
        scheme |= {"help": scheme["identical"], "harm": scheme["different"]}
        for ink in ("ink", "note", "help", "harm", "link"):
            for ground in ("page", "box"):
                assert contrast(rgb(scheme[ink]), rgb(scheme[ground])) >= 4.5, (ink, ground, scheme)
        for side in ("help", "harm"):
            mixed = 0.4 * rgb(scheme[side]) + 0.6 * rgb(scheme["page"])
            assert contrast(rgb(scheme["ink"]), mixed) >= 4.5


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)], dtype=float)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: np.ndarray) -> float:
        part = colour / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.01234, "0.012"),
        (-0.5, "−0.50"),
        (9.96, "10"),
        (12.3, "12"),
        (-1234.5, "−1,234"),
        (0.0999999, "0.10"),
        (1.24e-5, "0.000012"),
        (-3.44e-7, "−3.4 × 10⁻⁷"),
        (1e12, "1.0 × 10¹²"),
        (5e-324, "4.9 × 10⁻³²⁴"),
    ],
)
def test_numbers_are_decimals_where_they_are_short(value: float, text: str) -> None:
    assert decimal(value) == text
    assert signed_decimal(value) == ("+" if value > 0 else "") + text


@pytest.mark.parametrize("scale", [1e-320, 1e-12, 1.0, 1e300])
def test_scores_of_any_size_can_be_drawn(scale: float) -> None:
    one = made.target(21)
    scaled = replace(
        one,
        scores=one.scores * scale,
        helpful=[made.example(1, -scale)],
        harmful=[made.example(2, scale)],
        retrained=replace(made.retrained(), predicted=made.retrained().predicted * scale),
    )
    page = influence_page(made.page(targets=[scaled]))
    assert "nan" not in page.split("</style>")[1]
    assert "inf" not in re.sub(r"[Ii]nfluence", "", "".join(re.findall(r'd="([^"]*)"', page)))


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="targets is empty"):
        replace(made.page(), targets=[])
    with pytest.raises(ValueError, match="same key"):
        made.page(targets=[made.target(1), made.target(1)])
    with pytest.raises(ValueError, match=r"helpful holds training example 4 with score 0.5; allowed: scores below 0"):
        made.target(helpful=[made.example(4, 0.5)])
    with pytest.raises(ValueError, match=r"harmful holds training example 4 with score 0.0; allowed: scores above 0"):
        made.target(harmful=[made.example(4, 0.0)])
    with pytest.raises(ValueError, match="scores of target 21 holds 1 values that are NaN or Inf"):
        made.target(scores=np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="target 21: its measurement is nan"):
        made.target(measurement=math.nan)
