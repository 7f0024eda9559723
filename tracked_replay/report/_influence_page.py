"""The report of influence scores: one page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from markupsafe import Markup

from ._charts import histogram, scatter, share_chart, sparkline
from ._compare import _templates, rendered, shown
from ._influence import (
    Agreement,
    ClassInfluence,
    InfluencePage,
    InfluenceTarget,
    InfluentialExample,
    RetrainedTarget,
)
from ._lds import EMPHASISED, _hundredths, _percent
from ._numbers import decimal, signed_decimal
from ._pictures import Picture
from ._text import _INVISIBLE, _visible
from ._thumbnails import picture_rules

_PICTURE_BUDGET = 6_000_000  # characters of data URIs
_MAX_LABEL = 24
_MAX_CLASSES = 16
_MARKS = {"help": "▼", "harm": "▲"}
_METHODS = {
    EMPHASISED: "these scores",
    "tracin": "TracIn (gradients at checkpoints)",
    "last_gradient": "gradients of the final model",
    "random": "random numbers",
}


class _Card(NamedTuple):
    """A training example as it is shown."""

    kind: str
    words: str
    picture: str
    label: Markup
    number: int
    exact_score: str
    score: str
    acting: str
    spark: Markup | None


class _Side(NamedTuple):
    """The examples that pull a target's measurement in one direction."""

    kind: str
    heading: str
    sentences: Sequence[Markup]
    cards: Sequence[_Card]


class _Chart(NamedTuple):
    """A drawing, what it says in words, and what its axes are."""

    heading: str
    words: str
    drawing: Markup
    axes: str = ""


class _Panel(NamedTuple):
    """A target as it is shown."""

    target: InfluenceTarget
    heading: Markup
    tab: str
    mark: str
    pictures: Sequence[tuple[str, str, Markup]]
    sentences: Sequence[Markup]
    sides: Sequence[_Side]
    charts: Sequence[_Chart]


class _Trust(NamedTuple):
    """One reason for or against believing the scores: `mark` is ✓, ! or ?."""

    mark: str
    name: str
    text: str


def _words(text: str, limit: int = _MAX_LABEL) -> str:
    """Text from outside as it may stand in an attribute: no invisible character, cut with its length said."""
    cut = "".join(
        _visible(character) if unicodedata.category(character) in _INVISIBLE else character
        for character in text[:limit]
    )
    return cut if len(text) <= limit else f"{cut}… ({len(text):,} characters in all)"


def _label(text: str) -> Markup:
    return shown(text, _MAX_LABEL)


class _Pictures:
    """The pictures of a page by CSS class, each once."""

    def __init__(self) -> None:
        self.by_class: dict[str, np.ndarray] = {}

    def add(self, kind: str, picture: Picture) -> str:
        """The class of a picture of the training (``t``) or the evaluation set (``e``)."""
        name = f"{kind}{picture.index}"
        self.by_class[name] = picture.pixels
        return name


class _Wording(NamedTuple):
    """How a page calls what was measured, and the two directions."""

    measure: str
    helps: str
    harms: str
    better: str

    def verb(self, kind: str) -> str:
        return self.helps if kind == "help" else self.harms


_LOSS = _Wording("loss", "helps", "harms", "good")
_OTHER = _Wording("measurement", "lowers it", "raises it", "low")


def _example_words(example: InfluentialExample, kind: str, wording: _Wording) -> str:
    picture = example.picture
    return (
        f"training example {picture.index}, label {_words(picture.label)}, "
        f"score {signed_decimal(example.score)}: {wording.verb(kind)}"
    )


def _card(
    example: InfluentialExample, kind: str, scale: tuple[float, float], pictures: _Pictures, wording: _Wording
) -> _Card:
    acting = example.acting
    return _Card(
        kind,
        _example_words(example, kind, wording),
        pictures.add("t", example.picture),
        _label(example.picture.label),
        example.picture.index,
        repr(example.score),
        signed_decimal(example.score),
        "" if acting is None else f"steps {acting[0]:,} to {acting[1]:,}",
        None if example.along is None else sparkline(example.along, *scale, kind),
    )


def _side(
    target: InfluenceTarget, kind: str, scale: tuple[float, float], pictures: _Pictures, wording: _Wording
) -> _Side:
    examples = target.helpful if kind == "help" else target.harmful
    direction = ("lower", "higher") if kind == "help" else ("raise", "lower")
    if wording is _LOSS:
        heading = "These helped most" if kind == "help" else "These harmed most"
    else:
        heading = "These lower it most" if kind == "help" else "These raise it most"
    sentences = [
        Markup("They {} the {}: without them it would be {}.").format(direction[0], wording.measure, direction[1])
    ]
    if not examples:
        sentences = [Markup("No training example did.")]
    else:
        first = examples[0]
        sentences.append(
            Markup("Leaving out example {} would change the {} by about <strong>{}</strong>.").format(
                first.picture.index, wording.measure, signed_decimal(-first.score)
            )
        )
        sentences += _same_label(target, examples, kind)
    cards = [_card(example, kind, scale, pictures, wording) for example in examples]
    return _Side(kind, heading, sentences, cards)


def _same_label(target: InfluenceTarget, examples: Sequence[InfluentialExample], kind: str) -> list[Markup]:
    """How many of the examples have the label of the target; nothing for targets of several labels."""
    if len(target.pictures) != 1 or target.size != 1:
        return []
    own = target.pictures[0].label
    count = sum(example.picture.label == own for example in examples)
    sentence = Markup("{} of these {} have the label of the target, {}.").format(count, len(examples), _label(own))
    if kind == "harm" and count:
        sentence += " Look at those first: a wrong or unusual label is a common reason."
    return [sentence]


def _panel(target: InfluenceTarget, pictures: _Pictures, wording: _Wording) -> _Panel:
    curves = [example.along for example in (*target.helpful, *target.harmful) if example.along is not None]
    scale = (
        min((float(curve.min(initial=0.0)) for curve in curves), default=0.0),
        max((float(curve.max(initial=0.0)) for curve in curves), default=0.0),
    )
    shown_pictures = [
        (
            pictures.add("e", picture),
            f"evaluation example {picture.index}, label {_words(picture.label)}",
            _label(picture.label),
        )
        for picture in target.pictures
    ]
    return _Panel(
        target,
        _heading(target),
        _tab(target),
        _mark(target),
        shown_pictures,
        _target_sentences(target, wording),
        [_side(target, kind, scale, pictures, wording) for kind in ("help", "harm")],
        list(_charts(target, wording)),
    )


def _charts(target: InfluenceTarget, wording: _Wording) -> Iterator[_Chart]:
    if target.retrained is not None:
        words = _outcome_words(target.retrained, wording)
        drawing = scatter(target.retrained.predicted, target.retrained.actual, words)
        yield _Chart("Predicted, and what came", words, drawing)
    words = _spread_words(target, wording)
    axes = "Across: score. Up: number of examples, on a logarithmic scale."
    yield _Chart("All scores", words, histogram(target.scores, words), axes)
    if target.absolute is not None:
        words = _when_words(target.absolute)
        axes = "Across: training step, counted from 0. Up: share of the influence."
        yield _Chart("When in training", words, share_chart(target.absolute, words), axes)


def _heading(target: InfluenceTarget) -> Markup:
    if target.size == 1 and len(target.pictures) == 1:
        picture = target.pictures[0]
        return Markup("Evaluation example {}: {}").format(picture.index, _label(picture.label))
    return Markup("Mean over {} evaluation examples: {}").format(f"{target.size:,}", shown(target.name, 60))


def _tab(target: InfluenceTarget) -> str:
    """What the picker calls it; the name of a mean can be of any length."""
    return target.name if len(target.name) <= _MAX_LABEL else f"{target.key}: mean of {target.size:,}"


def _mark(target: InfluenceTarget) -> str:
    """Whether the model was right, in a word for the picker."""
    return "" if target.prediction is None else "right" if target.prediction.right else "wrong"


def _target_sentences(target: InfluenceTarget, wording: _Wording) -> list[Markup]:
    sentences: list[Markup] = []
    said = target.prediction
    if said is not None:
        sure = "" if said.probability is None else f" (probability {_percent_of(said.probability)})"
        sentences.append(
            Markup("The model says <strong>{}</strong>{}, and is <strong>{}</strong>.").format(
                _label(said.label), sure, "right" if said.right else "wrong"
            )
        )
    what = "Its" if target.size == 1 else "The mean"
    sentences.append(
        Markup("{} {} is <strong>{}</strong>.").format(what, wording.measure, decimal(target.measurement, 3))
    )
    return sentences


def _percent_of(probability: float) -> str:
    """A probability, never rounded to certainty."""
    if 0.999 <= probability < 1:
        return "> 99.9 %"
    return f"{100 * probability:.1f} %"


def _spread_words(target: InfluenceTarget, wording: _Wording) -> str:
    scores = target.scores
    below, above = int(np.count_nonzero(scores < 0)), int(np.count_nonzero(scores > 0))
    zero = len(scores) - below - above
    help_word, harm_word = ("help", "harm") if wording is _LOSS else ("lower it", "raise it")
    words = f"Of {len(scores):,} training examples {below:,} {help_word} and {above:,} {harm_word}"
    words += f"; {zero:,} have no influence." if zero else "."
    half = _half(np.sort(np.abs(scores))[::-1])
    if half:
        words += f" {'One has' if half == 1 else f'The strongest {half:,} have'} half of all influence."
    return words


def _when_words(absolute: np.ndarray) -> str:
    half = _half(absolute)
    return f"Half of the influence arose in the first {half:,} of {len(absolute):,} steps." if half else ""


def _half(values: np.ndarray) -> int:
    """How many of the values, from the first, have half of their sum; 0 where they have none."""
    peak = float(values.max())
    if not peak:
        return 0
    total = np.cumsum(values / peak)
    return int(np.searchsorted(total, total[-1] / 2)) + 1


def _outcome_words(retrained: RetrainedTarget, wording: _Wording) -> str:
    rank = _hundredths(retrained.spearman) if math.isfinite(retrained.spearman) else "undefined"
    return (
        f"{len(retrained.actual):,} retrainings without a random {_percent(retrained.drop)} of the training examples, "
        f"a point each: the {wording.measure} that the scores predicted, and the one that came. "
        f"Rank correlation {rank}."
    )


def _agreement_in_words(agreement: Agreement, confidence: float) -> str:
    """What a linear datamodeling score says, in a sentence or two."""
    share = _percent(agreement.drop)
    times = f"{agreement.retrainings:,} times"
    if not math.isfinite(agreement.lds):
        return f"Retraining without a random {share} of the examples {times} changed nothing that could be ranked."
    return (
        f"Retraining without a random {share} of the examples {times}, the scores ranked the outcomes with correlation "
        f"{_hundredths(agreement.lds)} ({_hundredths(agreement.low)} to {_hundredths(agreement.high)}, "
        f"{_percent(confidence)} interval). 1 would be perfect, 0 no better than guessing."
    )


FEW_RETRAININGS = 16  # below them the ranks can agree by luck, and the bootstrap of perfect ranks is a point


def _agreement_verdict(agreement: Agreement) -> tuple[str, str]:
    if not math.isfinite(agreement.lds):
        return "?", "Validated without a result"
    if agreement.retrainings < FEW_RETRAININGS:
        return "?", f"Only {agreement.retrainings} retrainings: too few to say how well the scores predict"
    degrees = ((0.9, "✓", "very well"), (0.7, "✓", "well"), (0.4, "!", "roughly"), (-2.0, "!", "poorly"))
    mark, how = next((mark, how) for least, mark, how in degrees if agreement.lds >= least)
    return mark, f"Validated: the scores predict retraining {how}"


def _trust(page: InfluencePage) -> list[_Trust]:
    if page.exact:
        exact = _Trust(
            "✓",
            "Exact",
            f"The training was replayed backwards through all {page.steps:,} recorded steps, and every state on the "
            f"way had the digest that was recorded: bit for bit the training that happened. A score is the derivative "
            f"of that training, not an estimate of it.",
        )
    else:
        exact = _Trust(
            "!",
            "Not exact",
            "Clipping was on in the replay, so the scores belong to a training that is not quite the recorded one.",
        )
    found = [exact]
    if page.validation is None:
        found.append(
            _Trust(
                "?",
                "Not validated when this was written",
                "A validation since then has a report of its own; the run's description in MLflow links to it. The "
                "derivative says what happens when an example counts a little less. How well that predicts what "
                "happens without it shows only by retraining.",
            )
        )
        return found
    first = page.validation.agreements[0]
    mark, name = _agreement_verdict(first)
    found.append(_Trust(mark, name, _agreement_in_words(first, page.validation.confidence)))
    if page.validation.smoothness:
        found.append(_Trust("·", "Smoothness", page.validation.smoothness))
    return found


class _Cell(NamedTuple):
    """A mean score in the table of classes; `strength` in percent of the largest."""

    kind: str
    strength: int
    text: str
    words: str


def _class_table(classes: ClassInfluence, wording: _Wording) -> Mapping[str, object]:
    """Rows and columns of the table of classes, the strongest of many, in their order."""
    sizes = np.nan_to_num(np.abs(classes.means))
    unit, unit_words = _unit(float(sizes.max(initial=0)))
    rows, columns = (_strongest(sizes.max(axis=axis, initial=0)) for axis in (1, 0))
    largest = float(sizes.max(initial=0)) or 1.0

    def cell(value: float) -> _Cell:
        if math.isnan(value):
            return _Cell("", 0, "–", "no training example of this class")
        text = _two_places(value / unit)
        if not value or text == "0.00":
            return _Cell("", 0, text, "next to none" if value else "no influence")
        kind = "help" if value < 0 else "harm"
        return _Cell(kind, round(40 * abs(value) / largest), text, wording.verb(kind))

    return {
        "unit": unit_words,
        "columns": [_label(classes.columns[column]) for column in columns],
        "rows": [
            (_label(classes.rows[row][0]), classes.rows[row][1], [cell(float(classes.means[row, c])) for c in columns])
            for row in rows
        ],
        "all_rows": len(classes.rows),
        "all_columns": len(classes.columns),
    }


def _unit(largest: float) -> tuple[float, str]:
    """A power of a thousand in which the largest value has one to three digits before the point, and its name."""
    power = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    if not power or not -300 < power < 300:
        return 1.0, ""
    name = {-3: "thousandths", -6: "millionths"}.get(power) or f"units of {decimal(10.0**power)}"
    return 10.0**power, f", in {name}"


def _two_places(value: float) -> str:
    text = f"{abs(value):.2f}"
    sign = "" if not float(text) else "−" if value < 0 else "+"
    return sign + text


def _strongest(sizes: np.ndarray) -> Sequence[int]:
    return sorted(int(place) for place in np.argsort(-sizes, kind="stable")[:_MAX_CLASSES])


def _agreement_rows(agreements: Sequence[Agreement]) -> Iterator[tuple[str, str, str, str, int]]:
    for agreement in agreements:
        interval = f"{_hundredths(agreement.low)} to {_hundredths(agreement.high)}"
        known = math.isfinite(agreement.lds)
        yield (
            _METHODS.get(agreement.method, agreement.method),
            _percent(agreement.drop),
            _hundredths(agreement.lds) if known else "undefined",
            interval if known else "–",
            agreement.retrainings,
        )


def _absolute(links: Mapping[str, str]) -> dict[str, str]:
    """Links that lead somewhere wherever the page is opened."""
    return {name: url for name, url in links.items() if urlsplit(url).scheme in ("http", "https")}


def _script() -> tuple[Markup, str]:
    """The page's script, and its hash for the content security policy: no other script can run."""
    # Written by us alone, so it is no text to be escaped; what is shown is read from the document.
    source = Markup(_templates().get_template("influence.js.j2").render())  # noqa: S704
    digest = hashlib.sha256(source.encode()).digest()
    return source, base64.b64encode(digest).decode("ascii")


def influence_page(page: InfluencePage) -> str:
    """Return a page on influence scores that needs nothing but itself, for readers who know nothing about them.

    Every target can be read without the script, which only shows one at a time. All that comes from outside is shown
    as text, long labels cut with their length said. Pictures are embedded once each and made smaller where there are
    many, so that the page stays under 10 MB.
    """
    wording = _LOSS if page.is_loss else _OTHER
    pictures = _Pictures()
    panels = [_panel(target, pictures, wording) for target in page.targets]
    script, script_hash = _script()
    return rendered(
        "influence.html.j2",
        _absolute(page.links),
        title=f"Influence on {_words(page.task, 60)}",
        page=page,
        wording=wording,
        panels=panels,
        marks=_MARKS,
        trust=_trust(page),
        classes=None if page.classes is None else _class_table(page.classes, wording),
        agreements=[] if page.validation is None else list(_agreement_rows(page.validation.agreements)),
        picture_rules=Markup(picture_rules(pictures.by_class, _PICTURE_BUDGET)),  # noqa: S704
        script=script,
        script_hash=script_hash,
        accuracy="" if page.accuracy is None else f"{100 * page.accuracy:.3g} %",
        has_curves=any(card.spark is not None for panel in panels for side in panel.sides for card in side.cards),
    )


def class_influence(
    scores: np.ndarray, labels: np.ndarray, classes_of_targets: Sequence[int | str], label_names: Sequence[str]
) -> ClassInfluence:
    """Return the mean score of the training examples of each class on targets of each class.

    `scores`: (targets, training examples). `labels`: (training examples,) int. `classes_of_targets`: the label of each
    target, or a name for one that stands by itself. `label_names`: a name a label.
    """
    counts = np.bincount(labels, minlength=len(label_names))
    rows: dict[int | str, list[np.ndarray]] = {}
    for own, values in zip(classes_of_targets, scores, strict=True):
        rows.setdefault(own, []).append(np.bincount(labels, weights=values, minlength=len(label_names)))
    # Classes in the order of their labels, then what stands by itself.
    order = sorted(rows, key=lambda own: (1, 0) if isinstance(own, str) else (0, own))
    with np.errstate(invalid="ignore"):
        means = np.array([np.mean(rows[own], axis=0) / counts for own in order])
    names = [(own, 0) if isinstance(own, str) else (label_names[own], len(rows[own])) for own in order]
    return ClassInfluence(names, list(label_names), means)
