"""What lets an interrupted recording go on: a line a step, written as the step is recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tracked_replay.determinism import GeneratorStates, load_generator_states
from tracked_replay.errors import RecordingError
from tracked_replay.recording.checkpoints import Checkpoint, checkpoint_file, read_checkpoint
from tracked_replay.recording.files import state_digest
from tracked_replay.training.state import State

FOLDER = "resume"  # under the recording's root, only while it is unfinished
FILE = f"{FOLDER}/journal.jsonl"
GENERATORS = "rng"


class JournalRow(NamedTuple):
    """A step that was recorded.

    Attributes:
        step: the step.
        loss: its loss.
        digest: of the state before it.
        checkpoint: that state's file, where it is kept.
    """

    step: int
    loss: float
    digest: str
    checkpoint: Checkpoint | None


class Unfinished(NamedTuple):
    """An interrupted recording, as far as it is whole.

    Attributes:
        state: the last state that can be gone on from.
        rows: the steps before it.
        generators: the process's generators before its step.
    """

    state: State
    rows: tuple[JournalRow, ...]
    generators: GeneratorStates


class Journal:
    """Appends a line a step to ``resume/journal.jsonl`` under ``root``; begins with ``rows``.

    A line is handed to the operating system at once, so that a killed process loses none; it is not forced onto the
    disk, and after a power cut the lines that are whole count.
    """

    def __init__(self, root: Path, rows: Sequence[JournalRow] = ()) -> None:
        self._path = root / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name("journal.aside")
        aside.write_text("".join(map(_line, rows)), encoding="utf-8")
        os.replace(aside, self._path)
        self._stream = self._path.open("a", encoding="utf-8")

    def append(self, row: JournalRow) -> None:
        """Add a step whose files are in place."""
        self._stream.write(_line(row))
        self._stream.flush()

    def close(self) -> None:
        """Close the file and leave it."""
        self._stream.close()

    def remove(self) -> None:
        """Remove what :meth:`close` left: the recording is whole."""
        shutil.rmtree(self._path.parent)


def generators_file(step: int) -> str:
    """Where the generator states before a step are kept."""
    return f"{GENERATORS}/step-{step:06d}.safetensors"


def find_unfinished(root: Path, before: int | None = None) -> Unfinished | None:
    """The last state of an interrupted recording that is whole: checkpoint, generators and all rows before it.

    Args:
        root: the recording's folder.
        before: only states before this step.

    Returns:
        None where there is nothing to go on from.
    """
    rows = _read(root / FILE)[:before]
    for row in reversed(rows):
        if row.checkpoint is None or not _belongs(row.checkpoint, row.step):
            continue
        try:
            state = read_checkpoint(root / row.checkpoint.file, row.checkpoint)
            if state_digest(state) != row.digest:
                continue
            generators = load_generator_states(root / generators_file(row.step))
        except (RecordingError, OSError):
            continue  # written but cut short: an earlier one will do
        return Unfinished(state, tuple(rows[: row.step]), generators)
    return None


def _belongs(checkpoint: Checkpoint, step: int) -> bool:
    """Whether a checkpoint is that of a step; its file's name is taken from nowhere else."""
    return (checkpoint.step, checkpoint.file) == (step, checkpoint_file(step))


def _line(row: JournalRow) -> str:
    checkpoint = None if row.checkpoint is None else asdict(row.checkpoint)
    # The loss as hexadecimal digits, which give back the same bits.
    return json.dumps([row.step, row.loss.hex(), row.digest, checkpoint]) + "\n"


def _read(path: Path) -> list[JournalRow]:
    """The steps 0, 1, 2, … as far as their lines are whole."""
    rows: list[JournalRow] = []
    if not path.is_file():
        return rows
    for line in path.read_bytes().split(b"\n"):
        try:
            step, loss, digest, checkpoint = json.loads(line)
            row = JournalRow(step, float.fromhex(loss), digest, checkpoint and Checkpoint(**checkpoint))
        except (ValueError, TypeError, RecursionError):
            break
        if type(row.step) is not int or row.step != len(rows):
            break
        rows.append(row)
    return rows
