"""A comparison of two trainings in words: the page, and the short table for the terminal."""

from __future__ import annotations

import base64
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ._text import _INVISIBLE, _visible, compact, plain_text

if TYPE_CHECKING:
    # For its types alone: the package around it needs torch, and makes reports itself.
    from tracked_replay.compare.result import Cause, Comparison, Difference, TensorComparison, Tolerance

COLUMNS = 100  # of the terminal
_MAX_CHARACTERS = 300
_MAX_SUMMARY = 600
_MAX_ROWS = 500
_MAX_UNFOLDED = 8
_MAX_TEXT_TENSORS = 8
_NAMED = 3
_PACKAGE = "packages.installed."
_ULP = "units in the last place: steps between neighbouring floating-point numbers"
_BEFORE_DIFFERENCE = 60
_SYMBOLS = {"identical": "=", "different": "≠", "incomparable": "?"}
_FIRST = {
    "data": "the batch's examples or labels",
    "lr": "the learning rate",
    "loss": "the loss",
    "state": "the state (parameters, buffers, momentum)",
}
_CLASSES = (
    ("nan_on_one_side", "NaN on one side"),
    ("nan_payloads", "NaN with different bits"),
    ("signed_zeros", "zero with different signs"),
    ("subnormals", "with a subnormal side"),
    ("infinities", "with an infinite side"),
)


class _Section(NamedTuple):
    """Named values that differ, under a heading of their own.

    Attributes:
        id: of the heading.
        heading: of the section.
        first_column: what the names are.
        values: what differs.
    """

    id: str
    heading: str
    first_column: str
    values: Sequence[Difference]


def _is_exact(tolerance: Tolerance) -> bool:
    return not tolerance.max_ulp and not tolerance.ignore


def comparison_headline(comparison: Comparison) -> str:
    """The verdict as one plain sentence."""
    if comparison.verdict == "incomparable":
        return "A and B cannot be compared."
    if comparison.verdict == "identical":
        return (
            f"A and B are identical{', bit for bit' if _is_exact(comparison.tolerance) else ' within the tolerance'}."
        )
    first = _first_step(comparison)
    return f"A and B are different, first at {first}." if first else "A and B are different."


def _first_step(comparison: Comparison) -> str | None:
    """Where two sides part: at a step, or, for files, in the state of that number."""
    if comparison.first_divergent_step is None:
        return None
    return f"{'state' if comparison.steps_a is None else 'step'} {comparison.first_divergent_step:,}"


def tolerance_sentence(tolerance: Tolerance) -> str:
    """What does not count as a difference, in one sentence."""
    parts: list[str] = []
    if tolerance.max_ulp:
        parts.append(
            f"losses and floating-point tensor elements at most {tolerance.max_ulp:,} ULP apart count as equal"
        )
    if tolerance.ignore:
        parts.append(f"left out of the verdict: {', '.join(tolerance.ignore)}")
    return f"Tolerance: {'; '.join(parts)}." if parts else "Tolerance: none, every bit counts."


def shown(text: str, limit: int = _MAX_CHARACTERS, start: int = 0) -> Markup:
    r"""Return text from outside as HTML that shows it literally.

    Markup becomes text; invisible characters become escapes such as ``\u202e``, set apart from the rest; more than
    `limit` characters from `start` on are cut, and the full length is said.
    """
    cut = text[start : start + limit]
    pieces = ((unicodedata.category(character) in _INVISIBLE, character) for character in cut)
    body = Markup("").join(
        Markup('<span class="escape">{}</span>').format("".join(_visible(character) for _hidden, character in run))
        if hidden
        else Markup("{}").format("".join(character for _hidden, character in run))
        for hidden, run in groupby(pieces, key=lambda piece: piece[0])
    )
    if len(cut) < len(text):
        where = f"from character {start + 1:,}, " if start else ""
        before, after = "…" if start else "", "…" if start + limit < len(text) else ""
        length = f"{where}{len(text):,} characters in all"
        body = Markup('{}{}{} <span class="note">({})</span>').format(before, body, after, length)
    # Isolated: letters that run from right to left would otherwise turn round the text beside them.
    return Markup("<bdi>{}</bdi>").format(body)


def _side(value: str | None, start: int) -> Markup:
    return Markup('<span class="note">not there</span>') if value is None else shown(value, start=start)


def _pair(a: str | None, b: str | None) -> tuple[Markup, Markup]:
    """Both values of a difference; of long ones, the part in which they first differ."""
    start = 0
    if a is not None and b is not None:
        length = min(len(a), len(b))
        common = next((place for place in range(length) if a[place] != b[place]), length)
        if common > _MAX_CHARACTERS - _BEFORE_DIFFERENCE:
            start = common - _BEFORE_DIFFERENCE
    return _side(a, start), _side(b, start)


def _number(value: float | None) -> str:
    return "–" if value is None else compact(value)


def _amount(value: float | None) -> str:
    """A number of ULP or elements; from a billion on with three digits."""
    if value is None:
        return "–"
    if abs(value) >= 10**9:
        return compact(float(value))
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _share(tensor: TensorComparison) -> str:
    """Share of elements that differ, never rounded to none or all."""
    percent = 100 * tensor.share
    if 0 < percent < 0.01:
        return "< 0.01 %"
    if tensor.differing < tensor.elements and percent > 99.9:
        return "> 99.9 %"
    return f"{percent:.3g} %"


def _classes(tensor: TensorComparison) -> list[str]:
    return [f"{words}: {getattr(tensor, name):,}" for name, words in _CLASSES if getattr(tensor, name)]


def _form(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    if dtype is None or shape is None:
        return "missing"
    return f"{dtype} {'×'.join(str(size) for size in shape)}" if shape else f"{dtype} scalar"


def _is_safe(url: str) -> bool:
    """Whether a link may hold this URL: it runs nothing."""
    return url.isprintable() and urlsplit(url).scheme in ("", "http", "https")


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("tracked_replay.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "number": _number,
        "amount": _amount,
        "share": _share,
        "classes": _classes,
    }
    environment.globals |= {"pair": _pair, "form": _form, "max_rows": _MAX_ROWS, "max_unfolded": _MAX_UNFOLDED}
    return environment


def rendered(template: str, links: Mapping[str, str], **values: object) -> str:
    """Return a page made of a template of this package; `links` are URLs by the name that they stand behind."""

    def linked(name: str) -> Markup:
        url = links.get(name)
        if url is None or not _is_safe(url):
            return shown(name)
        return Markup('<a href="{}" target="_blank" rel="noopener noreferrer">{}</a>').format(url, shown(name))

    return _templates().get_template(template).render(linked=linked, **values)


def _sections(comparison: Comparison) -> list[_Section]:
    return [
        _Section("config", "Config", "Field", comparison.config),
        _Section("seeds", "Seeds", "Seed", comparison.seeds),
        _Section("generators", "Generator states", "Before", comparison.generators),
        _Section("other", "Code, data and other", "Value", comparison.other),
        _Section("environment", "Environment", "Value", comparison.environment),
    ]


def environment_sentence(comparison: Comparison) -> str:
    """What of the environments differs, in short: ``12 packages differ: a, b, c and 9 more; 2 other values differ: …``.

    Empty where nothing does.
    """
    names = [value.name for value in comparison.environment]
    packages = [name.removeprefix(_PACKAGE) for name in names if name.startswith(_PACKAGE)]
    others = [name for name in names if not name.startswith(_PACKAGE)]
    kinds = (("package", packages), ("other value" if packages else "value", others))
    return "; ".join(_counted(noun, found) for noun, found in kinds if found)


def _counted(noun: str, names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    count = f"{len(names):,} {noun} differs" if len(names) == 1 else f"{len(names):,} {noun}s differ"
    listed = ", ".join(plain_text(name, 24) for name in names[:_NAMED])
    return f"{count}: {listed}{f' and {more:,} more' if more > 0 else ''}"


def _differing(tensors: Sequence[TensorComparison]) -> list[TensorComparison]:
    return [tensor for tensor in tensors if not tensor.equal]


def _figure_words(comparison: Comparison) -> str:
    """What the figure shows, for those who do not see it."""
    drift = comparison.drift
    if not drift.steps:
        return "No states along the training were at hand."
    known = [
        (value, step)
        for row in drift.largest_absolute
        for value, step in zip(row, drift.steps, strict=True)
        if value is not None
    ]
    over = f"{len(drift.tensors):,} tensors and {len(drift.steps):,} states"
    between = f"after {drift.steps[0]:,} to {drift.steps[-1]:,} steps"
    largest, step = max(known, default=(0.0, 0))
    if not largest:
        return f"No difference in numbers over {over} ({between})."
    return f"Largest absolute difference over {over} ({between}): {_number(largest)}, after {step:,} steps."


def comparison_html(comparison: Comparison, figure_png: bytes | None, links: Mapping[str, str] = {}) -> str:
    """Return a page on a comparison that needs nothing but itself.

    `figure_png`: the bytes of `comparison_figure`, shown in the page. `links`: URLs by run ID or path, as they stand in
    ``a`` and ``b`` of `comparison`; only http, https and relative ones become links. Everything in `comparison` is
    shown as text, long values cut with their length said.
    """
    tensors = comparison.tensors
    equal = [tensor for tensor in tensors if tensor.equal]
    # Equal for the verdict alone: a tolerance is in force.
    tolerated = [tensor for tensor in equal if tensor.difference != "none" or tensor.differing]
    first = _differing(comparison.first_tensors)
    return rendered(
        "compare.html.j2",
        links,
        comparison=comparison,
        headline=comparison_headline(comparison),
        symbol=_SYMBOLS[comparison.verdict],
        tolerance=tolerance_sentence(comparison.tolerance),
        summary=shown(comparison.summary, _MAX_SUMMARY),
        first_step=_first_step(comparison),
        first_difference=_FIRST.get(comparison.first_difference or ""),
        image=None if figure_png is None else base64.b64encode(figure_png).decode("ascii"),
        figure_words=_figure_words(comparison),
        differing=_differing(tensors),
        tolerated=tolerated,
        equal=[tensor for tensor in equal if tensor not in tolerated],
        first_tensors=[] if first == _differing(tensors) else first,
        ulp=_ULP,
        sections=_sections(comparison),
        environment_sentence=environment_sentence(comparison),
    )


def ending(text: str, limit: int) -> str:
    """Return `plain_text(text)`, cut at its start: the end of a tensor's name tells it from its neighbours."""
    literal = plain_text(text[-limit - 1 :], 12 * limit)
    return literal if len(text) <= limit and len(literal) <= limit else "…" + literal[1 - limit :]


def wrapped(text: str, lines: int, indent: str = "") -> list[str]:
    """Return text from outside in at most `lines` lines, those after the first indented."""
    literal = plain_text(text, lines * COLUMNS)
    return textwrap.wrap(literal, COLUMNS, subsequent_indent=indent, max_lines=lines, placeholder=" …")


def _text_row(tensor: TensorComparison) -> str:
    name = f"  {ending(tensor.name, 40):40s}"
    if tensor.difference != "values":
        forms = " and ".join(
            _form(dtype, shape)
            for dtype, shape in ((tensor.dtype_a, tensor.shape_a), (tensor.dtype_b, tensor.shape_b))
            if dtype is not None
        )
        return f"{name} {plain_text(f'{tensor.difference}: {forms}', COLUMNS - len(name) - 1)}"
    elements = f"{_amount(tensor.differing)} of {_amount(tensor.elements)}"
    return f"{name} {elements:>26s} {_amount(tensor.largest_ulp):>13s} {_number(tensor.largest_absolute):>15s}"


def _text_tensors(comparison: Comparison) -> list[str]:
    if not comparison.tensors:
        return []
    differing = _differing(comparison.tensors)
    equal = len(comparison.tensors) - len(differing)
    state = "" if comparison.tensors_step is None else f" after {comparison.tensors_step:,} steps"
    counts = f"tensors{state}: {len(differing):,} differ, {equal:,} equal"
    if not differing:
        return [counts]
    more = len(differing) - _MAX_TEXT_TENSORS
    return [
        f"{counts:42s} {'elements that differ':>26s} {'largest ULP':>13s} {'largest |a − b|':>15s}",
        *[_text_row(tensor) for tensor in differing[:_MAX_TEXT_TENSORS]],
        *([f"  and {more:,} more"] if more > 0 else []),
        *([] if comparison.tolerance.max_ulp else [f"  ULP, {_ULP}"]),
    ]


def _text_first(comparison: Comparison) -> list[str]:
    first = _first_step(comparison)
    parts = [first] if first else []
    if comparison.first_difference is not None:
        parts.append(_FIRST[comparison.first_difference])
    if comparison.first_tensor is not None:
        parts.append(f"tensor {ending(comparison.first_tensor, 36)}")
    return [f"first difference: {', '.join(parts)}"[:COLUMNS]] if parts else []


def _text_causes(causes: Sequence[Cause]) -> list[str]:
    """The likeliest cause, and the names of the others."""
    if not causes:
        return []
    others = wrapped(f"other causes: {', '.join(cause.name for cause in causes[1:])}", 1)
    return wrapped(f"likely cause: {causes[0].name}: {causes[0].text}", 1) + others * (len(causes) > 1)


def _text_names(label: str, names: Sequence[str]) -> list[str]:
    """How many values differ, and the first of their names, in one line."""
    if not names:
        return []
    line = f"{label}: {len(names):,} {'differs' if len(names) == 1 else 'differ'}:"
    for place, name in enumerate(names):
        following = f"{',' if place else ''} {plain_text(name, 40)}"
        if len(line) + len(following) > COLUMNS - 3:
            return [f"{line}, …"]
        line += following
    return [line]


def comparison_text(comparison: Comparison) -> str:
    """Return a comparison for the terminal: at most 26 lines of at most 100 characters, plain text."""
    trace = [f"{item.column} from step {item.step:,} on" for item in comparison.trace]
    tolerance = comparison.tolerance
    # Of max_ulp the summary says what ULP are, which else takes a line below the tensors.
    said = wrapped(tolerance_sentence(tolerance), 2 if tolerance.max_ulp else 1)
    lines = [
        comparison_headline(comparison),
        *(f"{side}: {plain_text(name, COLUMNS - 3)}" for side, name in (("A", comparison.a), ("B", comparison.b))),
        *wrapped(comparison.summary, 2),
        *([] if _is_exact(tolerance) else said),
        *_text_first(comparison),
        *_text_causes(comparison.causes),
        *_text_tensors(comparison),
        *_text_names("batch trace", trace),
    ]
    for section in _sections(comparison)[:-1]:
        lines += _text_names(section.heading.lower(), [value.name for value in section.values])
    if comparison.environment:
        lines += wrapped(f"environment: {environment_sentence(comparison)}", 1)
    return "\n".join(lines)
