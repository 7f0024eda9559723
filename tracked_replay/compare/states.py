"""Where a comparison takes the states of a run from: its checkpoints, or the steps taken again from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tracked_replay.compare.facts import environment
from tracked_replay.config import Config
from tracked_replay.determinism import set_global_deterministic_state
from tracked_replay.recording import Checkpoint, Recording, state_digest
from tracked_replay.training.loop import TrainingSetup
from tracked_replay.training.state import State


class Unavailable(NamedTuple):
    """A state that cannot be given.

    Attributes:
        reason: why, as a part of a sentence.
    """

    reason: str


StateSource = Callable[[int], State | Unavailable]


def recorded_digests(recording: Recording) -> tuple[str, ...]:
    """Digest of every state, the final one included: (steps + 1,)."""
    return (*recording.trace.state_digests, recording.final.digest)


def checkpoint_states(recording: Recording) -> StateSource:
    """The states that a run kept, on the CPU.

    The source raises RecordingError where a checkpoint is missing or damaged.
    """

    def state(step: int) -> State | Unavailable:
        kept = {checkpoint.step: checkpoint for checkpoint in recording.checkpoints}
        if step not in kept:
            return Unavailable(f"no checkpoint of state {step} was kept")
        return recording.state(kept[step])

    return state


def retrained_states(recording: Recording, setup: TrainingSetup) -> StateSource:
    """Every state of a run, on the CPU: the steps after the last checkpoint before it are taken again.

    A state is given only where it and all states on the way to it have the recorded digests. The last state is kept,
    so that states asked for in rising order cost one step each. While steps are taken the process is pinned as the
    run's was, and afterwards its number of threads is put back.

    Args:
        recording: the run.
        setup: made from the run's recorded config.

    The source raises RecordingError where a checkpoint is missing or damaged.
    """
    return _RetrainedStates(recording, setup)


class _RetrainedStates:
    def __init__(self, recording: Recording, setup: TrainingSetup) -> None:
        self._recording = recording
        self._setup = setup
        self._last: State | None = None
        threads = environment(recording).get("threads.intra_op")
        # Only in full reproducibility the config's number of threads is the one that was in force.
        self._threads = int(threads) if isinstance(threads, str) else setup.config.train.threads

    def __call__(self, step: int) -> State | Unavailable:
        digests, planned = recorded_digests(self._recording), self._setup.plan.steps
        if not 0 <= step < len(digests):
            return Unavailable(f"there is no state {step}, the run has {len(digests) - 1} steps")
        if step > planned:
            return Unavailable(f"state {step} cannot be retrained, the training here has only {planned} steps")
        state = self._start(step)
        with _pinned(self._setup.config, self._threads):
            while state.step < step:
                (state, _), _ = self._setup.take(state)
                found = state_digest(state)
                if found != digests[state.step]:
                    return Unavailable(
                        f"state {state.step} has the digest {found} when it is retrained here, recorded was "
                        f"{digests[state.step]} (other libraries, processor, data or code?)"
                    )
        self._last = state
        return state.to("cpu")

    def _start(self, step: int) -> State:
        nearest: Checkpoint = max(
            (kept for kept in self._recording.checkpoints if kept.step <= step), key=lambda kept: kept.step
        )
        if self._last is not None and nearest.step <= self._last.step <= step:
            return self._last
        return self._recording.state(nearest).to(self._setup.device)


@contextmanager
def _pinned(config: Config, threads: int) -> Iterator[None]:
    """Flags and threads of a run within a block: another run's setup may have changed them since."""
    before = torch.get_num_threads()
    set_global_deterministic_state(config.seed, mode=config.train.reproducibility)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
