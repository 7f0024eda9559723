"""Progress where there is no terminal: log lines now and then, never a bar."""

from __future__ import annotations

import logging

import pytest

from tracked_replay import progress as module
from tracked_replay.progress import progress


def test_items_pass_through_and_lines_come_at_intervals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 20))  # every look at the clock is 20 s later
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, "tracked_replay"):
        assert list(progress(range(6), 6, "replay")) == [0, 1, 2, 3, 4, 5]
    assert caplog.messages == ["replay: 2 of 6 steps, about 80 s left", "replay: 4 of 6 steps, about 40 s left"]
    assert capsys.readouterr().err == ""


def test_short_loops_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tracked_replay"):
        assert list(progress(iter("abc"), 3, "train")) == ["a", "b", "c"]
    assert not caplog.messages
