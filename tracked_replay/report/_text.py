"""Text from outside (labels, names of targets) as it may stand in a figure: literal, short, every character visible."""

import re
import unicodedata
from functools import cache

from matplotlib import font_manager, textpath

# Ships inside matplotlib: the same glyphs and widths on every machine.
FONT = "DejaVu Sans"
_ELLIPSIS = "…"
_MINUS = "−"
_HINTING = 1.1  # glyphs on whole pixels come out up to this much wider than their outlines
# Controls, formats (bidi marks, zero-width characters), lone surrogates, private use, unassigned, line and paragraph
# separators, and marks that stack on the character before them.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Mn", "Me"}
_SHORT_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


@cache
def _drawable() -> frozenset[int]:
    """Code points for which both weights of the figures' font have a glyph."""
    fonts = [
        font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=FONT, weight=weight)))
        for weight in ("normal", "bold")
    ]
    return frozenset(fonts[0].get_charmap()) & frozenset(fonts[1].get_charmap())


def _visible(character: str) -> str:
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    code = ord(character)
    # A character without a glyph would be drawn as an empty box, the same box for all of them.
    if unicodedata.category(character) not in _INVISIBLE and code in _drawable():
        return character
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def plain_text(text: str, limit: int = 24) -> str:
    r"""Return `text` as one line that can be drawn literally.

    Control, bidi and zero-width characters, stacked marks, and characters for which the figures' font has no glyph,
    become escapes such as ``\n`` or ``\u202e``. A text longer than `limit` characters (at least 1) is cut, never
    inside an escape, and ends in an ellipsis. `$` and `<` stay as they are: the figures parse no mathematics.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; a text needs room for at least 1 character")
    pieces: list[str] = []
    length = 0
    # What lies beyond the limit is not looked at: a label may be megabytes long. Composing makes "é" of e + mark.
    for character in unicodedata.normalize("NFC", str(text)[: 4 * limit + 4]):
        piece = _visible(character)
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            break
    if length <= limit:
        return "".join(pieces)
    while pieces and length > limit - 1:
        length -= len(pieces.pop())
    return "".join(pieces) + _ELLIPSIS


def _width(text: str, size: float, weight: str) -> float:
    """Width of a one-line text in points."""
    font = font_manager.FontProperties(family=FONT, size=size, weight=weight)
    return _HINTING * float(textpath.text_to_path.get_text_width_height_descent(text, font, False)[0])


def fitted_text(text: str, inches: float, size: float, weight: str = "normal", limit: int = 24) -> str:
    """Return `plain_text(text, limit)`, cut further until it is at most `inches` wide at `size` points."""
    shown = plain_text(text, limit)
    while limit > 1 and _width(shown, size, weight) > 72 * inches:
        limit = min(limit, len(shown)) - 1
        shown = plain_text(text, limit)
    return shown


def signed(value: float) -> str:
    """Return a score with its sign and two digits: ``+3.4e-02``, ``−1.2e-03``; zero is ``0``."""
    return "0" if value == 0 else f"{value:+.1e}".replace("-", _MINUS, 1 if value < 0 else 0)


def compact(value: float, _position: int | None = None) -> str:
    """Return a number for an axis, three digits, with a real minus sign; usable as a tick formatter."""
    text = f"{value + 0.0:.3g}"  # + 0.0 makes 0 of −0
    return text.replace("-", _MINUS, 1) if value < 0 else text


def markdown_text(text: str) -> str:
    """Return ``text`` so that Markdown shows it literally."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", text)
