import sys
import unicodedata

import pytest

from tracked_replay.report import plain_text
from tracked_replay.report._text import _width, compact, fitted_text, signed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("airplane", "airplane"),
        ("$5 \\frac{1}{2}$", "$5 \\frac{1}{2}$"),
        ("<script>alert(1)", "<script>alert(1)"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x00\x1b[31m", r"\x00\x1b[31m"),
        ("\u202eevil", r"\u202eevil"),
        ("a\u2066b\u200bc", r"a\u2066b\u200bc"),
        ("line\u2028end", r"line\u2028end"),
        ("\ud800", r"\ud800"),
        ("cafe\u0301", "café"),
        ("x\u0335\u0336", r"x\u0335\u0336"),
        ("猫", r"\u732b"),
        ("\U0001fae0", r"\U0001fae0"),
        ("", ""),
    ],
)
def test_text_is_literal_with_the_invisible_escaped(text: str, shown: str) -> None:
    assert plain_text(text) == shown


def test_long_text_ends_in_an_ellipsis_at_the_limit() -> None:
    assert plain_text("x" * 24) == "x" * 24
    assert plain_text("x" * 25) == "x" * 23 + "…"
    assert plain_text("x" * 10**7, limit=5) == "xxxx…"
    assert plain_text("ab", limit=1) == "…"


@pytest.mark.parametrize("limit", range(1, 20))
def test_no_escape_is_cut_in_two(limit: int) -> None:
    shown = plain_text("ab\u202e\u202e\u202e", limit)
    assert len(shown) <= limit
    assert shown.removesuffix("…").replace(r"\u202e", "") in ("", "a", "ab")


def test_a_limit_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        plain_text("a", limit=0)


def test_every_code_point_comes_out_visible_and_drawable() -> None:
    shown = "".join(plain_text(chr(code)) for code in range(0, sys.maxunicode + 1, 7))
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize("text", ["W" * 40, "i" * 40, "\u202e" * 9, "automobile"])
def test_fitted_text_is_no_wider_than_its_room(text: str) -> None:
    assert _width(fitted_text(text, 0.7, 8), 8, "normal") <= 72 * 0.7


def test_fitted_text_uses_the_room_it_has() -> None:
    assert fitted_text("automobile", 2.0, 8) == "automobile"
    assert len(fitted_text("i" * 40, 0.7, 8)) > len(fitted_text("W" * 40, 0.7, 8)) > 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-1.2345e-3, "−1.2e-03"),
        (0.034, "+3.4e-02"),
        (0.0, "0"),
        (-0.0, "0"),
        (-12.0, "−1.2e+01"),
    ],
)
def test_scores_carry_their_sign(value: float, shown: str) -> None:
    assert signed(value) == shown


def test_axis_numbers_have_a_real_minus_and_no_negative_zero() -> None:
    assert [compact(value) for value in (-0.0, -0.002, 1e-5, -1e-5)] == ["0", "−0.002", "1e-05", "−1e-05"]
