"""What lets an interrupted recording go on: a line a step, written as the step is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tracked_replay.determinism import GeneratorStates
from tracked_replay.errors import RecordingError
from tracked_replay.recording import generators
from tracked_replay.recording.checkpoints import Checkpoint, checkpoint_file, read_checkpoint
from tracked_replay.recording.files import content_digest, write_all, write_bytes
from tracked_replay.training.state import State

FOLDER = "resume"  # under the recording's root, only while it is unfinished
FILE = f"{FOLDER}/journal.jsonl"


class JournalRow(NamedTuple):
    """A step that was recorded.

    Attributes:
        step: the step.
        loss: its loss.
        digest: of the state before it.
        size: bytes of that state's checkpoint, where it is kept.
        generators: the process's generators before the step, where the state is kept.
    """

    step: int
    loss: float
    digest: str
    size: int | None = None
    generators: GeneratorStates | None = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The state's file."""
        if self.size is None:
            return None
        return Checkpoint(self.step, checkpoint_file(self.step), self.digest, self.size)


class Unfinished(NamedTuple):
    """An interrupted recording, as far as it is whole.

    Attributes:
        state: the last state that can be gone on from.
        rows: the steps before it.
        row: its own step.
        generators: the process's generators before its step.
    """

    state: State
    rows: tuple[JournalRow, ...]
    row: JournalRow
    generators: GeneratorStates


class Journal:
    """Appends a line a step to ``resume/journal.jsonl`` under ``root``; begins with ``rows``.

    A line is handed to the operating system at once, so that a killed process loses none; it is not forced onto the
    disk, and after a power cut the lines that are whole count. Each begins with a digest of itself and the line before.

    Args:
        root: the recording's folder.
        unfinished: what is gone on from. Its step has its line and its checkpoint already, which are left as they are:
            an interruption in the same step again loses nothing more.

    Attributes:
        known: that step; None where nothing is gone on from.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, root: Path, unfinished: Unfinished | None = None) -> None:
        self._path = root / FILE
        self._generators: GeneratorStates | None = None
        self._digest = ""
        rows = () if unfinished is None else (*unfinished.rows, unfinished.row)
        write_bytes(self._path, b"".join([self._next(row) for row in rows]))
        self.known = None if unfinished is None else unfinished.row.step
        self._stream = self._path.open("ab", buffering=0)

    def line(self, row: JournalRow) -> bytes:
        """The line of the step that comes after the one that this was called with before; empty for a known one."""
        return b"" if row.step == self.known else self._next(row)

    def _next(self, row: JournalRow) -> bytes:
        found = None
        if row.generators is not None:
            found = generators.changes(row.generators, self._generators)
            self._generators = row.generators
        # The loss as hexadecimal digits, which give back the same bits.
        content = json.dumps([row.step, row.loss.hex(), row.digest, row.size, found]).encode()
        self._digest = _chained(self._digest, content)
        return f"{self._digest} ".encode() + content + b"\n"

    def append(self, line: bytes) -> None:
        """Add the line of a step whose files are in place."""
        write_all(self._stream.fileno(), memoryview(line))

    def close(self) -> None:
        """Close the file and leave it."""
        self._stream.close()

    def remove(self) -> None:
        """Remove what :meth:`close` left: the recording is whole."""
        shutil.rmtree(self._path.parent)


def find_unfinished(root: Path, before: int | None = None) -> Unfinished | None:
    """The last state of an interrupted recording that is whole, with all rows before it.

    Args:
        root: the recording's folder.
        before: only states before this step.

    Returns:
        None where there is nothing to go on from.
    """
    rows = _read(root / FILE)[:before]
    for row in reversed(rows):
        if row.checkpoint is None or row.generators is None:
            continue
        try:
            state = read_checkpoint(root / row.checkpoint.file, row.checkpoint)
        except (RecordingError, OSError):
            continue  # written but cut short: an earlier one will do
        return Unfinished(state, tuple(rows[: row.step]), row, row.generators)
    return None


def _read(path: Path) -> list[JournalRow]:
    """The steps 0, 1, 2, … as far as their lines are whole."""
    rows: list[JournalRow] = []
    if not path.is_file():
        return rows
    last: GeneratorStates | None = None
    digest = ""
    for line in path.read_bytes().split(b"\n"):
        written, _, content = line.partition(b" ")
        digest = _chained(digest, content)
        if written != digest.encode():
            break
        try:
            step, loss, state_digest, size, found = json.loads(content)
            states = None if found is None else generators.changed(last, found)
            row = JournalRow(step, float.fromhex(loss), state_digest, size, states)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break
        if type(row.step) is not int or row.step != len(rows) or (size is None) != (states is None):
            break
        last = states or last
        rows.append(row)
    return rows


def _chained(before: str, content: bytes) -> str:
    """Digest of a line and, through the one before, of all before it."""
    return content_digest(before.encode() + content)
