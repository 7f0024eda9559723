"""The recorded states, last to first, each checked against the digest that was recorded for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import psutil
import torch

from tracked_replay.errors import ConfigError, ReplayError
from tracked_replay.recording import Checkpoint, Recording, state_digest
from tracked_replay.recording.checkpoints import checkpoint_bytes
from tracked_replay.recording.recorder import checkpoint_steps, later_state
from tracked_replay.replay.plan import ADVANCE, GIVE, KEEP, Plan, least_states, make_plan, plan_segment
from tracked_replay.training.loop import TrainingSetup
from tracked_replay.training.state import State

MEMORY_SHARE = 0.5  # of the free memory that states may take where no budget says how much


def choose_plan(mode: str, setup: TrainingSetup, recording: Recording, last: int | None = None) -> Plan:
    """Which states a replay keeps, from ``replay.budget`` and what is on disk.

    Args:
        mode: ``stream`` goes a segment between two checkpoints at a time; ``memory`` keeps all states where they fit
            into the budget, and without a budget in any case; ``auto`` keeps all where they fit.
        setup: the recorded run's setup; its config holds the budget.
        recording: where the checkpoints are.
        last: number of the state to begin with; the final one where it is ``None``.

    Raises:
        ConfigError: the budget is too small to replay at all.
    """
    checkpoints = [checkpoint.step for checkpoint in recording.checkpoints]
    return _plan(mode, setup, checkpoints, recording.final.bytes, checkpoints[-1] if last is None else last)


def require_budget(setup: TrainingSetup) -> None:
    """Check before a training that its replay will have memory for enough states. Raises ConfigError."""
    bytes_of_state = checkpoint_bytes(later_state(setup))
    _plan(setup.config.replay.mode, setup, checkpoint_steps(setup), bytes_of_state, setup.plan.steps)


def _plan(mode: str, setup: TrainingSetup, checkpoints: Sequence[int], bytes_of_state: int, last: int) -> Plan:
    budget = setup.config.replay.budget
    if mode == "memory" and not budget:
        return make_plan(checkpoints, last, None)
    least = least_states(checkpoints, last)
    allowed = (budget or int(MEMORY_SHARE * _free_memory(setup.device))) // bytes_of_state
    if budget and allowed < least:
        raise ConfigError(
            f"replay.budget: found {budget} bytes; allowed: 0, or at least {least * bytes_of_state}, in which {least} "
            f"states of {bytes_of_state} bytes fit at once"
        )
    return make_plan(checkpoints, last, max(least, allowed), stream=mode == "stream")


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where states are held."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def states_backward(
    setup: TrainingSetup, recording: Recording, mode: str | Plan, last: int | None = None, *, cached: bool = False
) -> Generator[State, None, None]:
    """All states from the last to the first, on the setup's device.

    States between two checkpoints are recomputed with the training's own step. How many are held at once, and how often
    a step is taken for that, is the plan's choice; the states are the same bits. The plan counts on a caller who holds
    the state given last, and none before it, while it asks for the next.

    Checkpoints are read ahead on a background thread; where their files are not in place, other threads fetch a few
    more of them. An error there is raised here when its state's turn comes. The threads are gone when the iterator is
    exhausted, closed or has raised.

    Args:
        setup: the recorded run's setup.
        recording: where the checkpoints are.
        mode: ``memory``, ``stream`` or ``auto``, or a plan made by :func:`choose_plan` for the same ``last``.
        last: number of the state to begin with; the final one where it is ``None``.
        cached: whether copies of fetched checkpoints may be used that this machine kept, and new ones kept; else all
            are what the store has now.

    Raises:
        ConfigError: ``replay.budget`` is too small.
        RecordingError: a checkpoint is missing or damaged.
        ReplayError: a state differs from the recorded digest; names the step.
    """
    digests = (*recording.trace.state_digests, recording.final.digest)
    last = len(digests) - 1 if last is None else last
    plan = mode if isinstance(mode, Plan) else choose_plan(mode, setup, recording, last)
    starts = [checkpoint for checkpoint in recording.checkpoints if checkpoint.step <= last]
    stops = [*(checkpoint.step for checkpoint in starts[1:]), last + 1]

    def read(checkpoint: Checkpoint) -> State:
        state = source.state(checkpoint)
        _require_digest(state, digests[checkpoint.step])
        return state

    with (
        recording.ahead(starts[::-1], cached=cached) as source,
        closing(_read_ahead(read, reversed(starts), plan.read_ahead)) as first_states,
    ):
        given = (
            state
            for start, stop in zip(reversed(starts), reversed(stops), strict=True)
            for state in _segment(setup, plan, start, stop, digests, first_states, read)
        )
        if plan.keeps != "all":
            yield from given
            return
        held = deque(given)
    while held:
        yield held.popleft()


def _segment(
    setup: TrainingSetup,
    plan: Plan,
    start: Checkpoint,
    stop: int,
    digests: Sequence[str],
    first_states: Iterator[State],
    read: Callable[[Checkpoint], State],
) -> Iterator[State]:
    """States ``stop`` − 1 down to ``start.step``; the first of them comes from ``first_states``."""
    first, length = start.step, stop - start.step
    # One name for the current state and no helper that is given it: every further reference would be a state held.
    state = next(first_states).to(setup.device)
    kept = {first: state} if plan.keeps_start(length) else {}
    for kind, number in plan_segment(length, plan.slots(length)):
        wanted = first + number
        if kind == KEEP:
            kept[wanted] = state
        elif kind == GIVE:
            kept.pop(wanted, None)
            yield state
        elif kind == ADVANCE:
            while state.step < wanted:
                (state, _), _ = setup.take(state)
                _require_digest(state, digests[state.step])
        else:
            state = kept[wanted] if wanted in kept else read(start).to(setup.device)


def _read_ahead(
    read: Callable[[Checkpoint], State], checkpoints: Iterable[Checkpoint], ahead: int
) -> Generator[State, None, None]:
    """Read checkpoints in their order, up to ``ahead`` of them on a background thread before they are asked for."""
    if not ahead:
        yield from map(read, checkpoints)
        return
    waiting = iter(checkpoints)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        pending = deque(pool.submit(read, checkpoint) for checkpoint in islice(waiting, ahead))
        while pending:
            state = pending.popleft().result()
            pending.extend(pool.submit(read, checkpoint) for checkpoint in islice(waiting, 1))
            yield state
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _require_digest(state: State, recorded: str) -> None:
    found = state_digest(state)
    if found != recorded:
        raise ReplayError(
            f"step {state.step}: the replayed state has the digest {found}, recorded was {recorded}; the training "
            f"would not be the one that was recorded (another library version, processor or thread count, or "
            f"train.reproducibility other than full?)"
        )
