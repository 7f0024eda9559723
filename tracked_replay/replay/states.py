"""The recorded states, last to first, each checked against the digest that was recorded for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil

from tracked_replay.errors import ReplayError
from tracked_replay.recording import Checkpoint, Recording, state_digest
from tracked_replay.training.loop import TrainingSetup
from tracked_replay.training.state import State

MEMORY_SHARE = 0.5  # of the free memory that `auto` lets the states take


def choose_mode(mode: str, setup: TrainingSetup, recording: Recording) -> str:
    """``memory`` or ``stream``; ``auto`` takes memory where all states fit into half of what is free."""
    if mode != "auto":
        return mode
    needed = recording.final.bytes * (recording.trace.steps + 1)
    return "memory" if needed <= MEMORY_SHARE * psutil.virtual_memory().available else "stream"


def states_backward(setup: TrainingSetup, recording: Recording, mode: str, last: int | None = None) -> Iterator[State]:
    """All states from the last to the first, on the setup's device.

    States between two checkpoints are recomputed with the training's own step. In ``memory`` mode everything is read
    (and recomputed) before the first state is given out, in ``stream`` mode one segment between two checkpoints at a
    time; the states are the same bits.

    Args:
        setup: the recorded run's setup.
        recording: where the checkpoints are.
        mode: ``memory`` or ``stream``.
        last: number of the state to begin with; the final one where it is ``None``.

    Raises:
        RecordingError: a checkpoint is missing or damaged.
        ReplayError: a state differs from the recorded digest; names the step.
    """
    digests = (*recording.trace.state_digests, recording.final.digest)
    last = len(digests) - 1 if last is None else last
    starts = [checkpoint for checkpoint in recording.checkpoints if checkpoint.step <= last]
    stops = [*(checkpoint.step for checkpoint in starts[1:]), last + 1]
    segments: Iterator[list[State]] = (
        _segment(setup, recording, start, stop, digests)
        for start, stop in zip(reversed(starts), reversed(stops), strict=True)
    )
    if mode == "memory":
        segments = iter(list(segments))
    for segment in segments:
        yield from reversed(segment)


def _segment(
    setup: TrainingSetup, recording: Recording, start: Checkpoint, stop: int, digests: Sequence[str]
) -> list[State]:
    """States ``start.step`` up to but not including ``stop``."""
    state = recording.state(start).to(setup.device)
    _require_digest(state, digests[state.step])
    states = [state]
    while state.step + 1 < stop:
        (state, _), _ = setup.take(state)
        _require_digest(state, digests[state.step])
        states.append(state)
    return states


def _require_digest(state: State, recorded: str) -> None:
    found = state_digest(state)
    if found != recorded:
        raise ReplayError(
            f"step {state.step}: the replayed state has the digest {found}, recorded was {recorded}; the training "
            f"would not be the one that was recorded (another library version, processor or thread count, or "
            f"train.reproducibility other than full?)"
        )
