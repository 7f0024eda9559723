"""Where two recorded runs first part."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
import torch

from tracked_replay.compare.pair import Pair, state_number
from tracked_replay.compare.result import FirstDifference
from tracked_replay.compare.tensors import compare_tensor

# In the order in which a step uses them, which decides what differs first.
COLUMNS: dict[str, tuple[FirstDifference, str]] = {
    "epoch": ("data", "the epoch differs"),
    "indices": ("data", "the examples of the batch differ"),
    "labels": ("data", "the labels of the batch differ"),
    "lr": ("lr", "the learning rate differs"),
    "loss": ("loss", "the loss differs"),
}


class Divergence(NamedTuple):
    """Where two runs part.

    Attributes:
        step: the step.
        kind: what differs first.
        text: the same for people.
        state: number of the state whose tensors show it.
    """

    step: int
    kind: FirstDifference
    text: str
    state: int


def find_divergence(pair: Pair) -> Divergence | None:
    """Where the runs part: a step decides before the generators, these before the number of steps."""
    return _divergent_step(pair) or _divergent_generators(pair) or _end_of_one(pair)


def _divergent_step(pair: Pair) -> Divergence | None:
    state = _first_state(pair)
    if state == 0:
        return Divergence(0, "state", "the initial states differ", 0)
    found = []
    for name, (kind, text) in COLUMNS.items():
        rows = _counted(pair, name)
        if kind not in pair.tolerance.ignore and len(rows):
            found.append(Divergence(int(rows[0]), kind, text, int(rows[0]) + 1))
    if state is not None:
        found.append(Divergence(state - 1, "state", f"the state after it differs{_gap_text(pair, state)}", state))
    return min(found, key=lambda divergence: divergence.step, default=None)  # the first of equal steps


def _counted(pair: Pair, name: str) -> np.ndarray:
    """Steps at which a column differs, from the first on where it does by more than the tolerance lets pass."""
    column = pair.columns[name]
    rows = np.flatnonzero(column.differs)
    if name != "loss" or not pair.tolerance.max_ulp:
        return rows
    # The loss of a float32 training is recorded as float64: its neighbours are those of float32.
    single = all(recording.config.train.dtype == "float32" for recording in (pair.a, pair.b))
    a, b = (torch.from_numpy(losses[rows]).to(torch.float32 if single else torch.float64) for losses in column[:2])

    def beyond(count: int) -> bool:
        return not compare_tensor("loss", a[:count], b[:count], pair.tolerance.max_ulp).equal

    return rows[bisect.bisect_left(range(1, len(rows) + 1), True, key=beyond) :]


def _first_state(pair: Pair) -> int | None:
    """Number of the first common state that differs by more than the tolerance lets pass."""
    if not pair.tensors_decide:
        return pair.differing_states[0] if pair.differing_states else None
    equal = -1
    for state in pair.kept_states:
        if pair.state_differs(state):
            return next(between for between in range(equal + 1, state + 1) if pair.state_differs(between))
        equal = state
    return None


def _gap_text(pair: Pair, state: int) -> str:
    """Under a tolerance of tensors: the states before ``state`` of which nothing is known."""
    gap: list[int] = []
    while state - len(gap) - 1 in pair.states.reasons:
        gap.append(state - len(gap) - 1)
    if not gap:
        return ""
    named = f"states {gap[-1]} to {gap[0]}" if len(gap) > 1 else f"state {gap[0]}"
    return f" ({named} before it cannot be compared)"


def _divergent_generators(pair: Pair) -> Divergence | None:
    if "generators" in pair.tolerance.ignore or not pair.generators:
        return None
    state = state_number(pair.generators[0].name)
    return Divergence(max(state - 1, 0), "state", f"only the generator states before step {state} differ", state)


def _end_of_one(pair: Pair) -> Divergence | None:
    if pair.a.trace.steps == pair.b.trace.steps:
        return None
    lengths = sorted(zip((pair.a.trace.steps, pair.b.trace.steps), pair.names, strict=True), key=lambda item: item[0])
    (steps, shorter), (more, longer) = lengths
    return Divergence(steps, "data", f"{shorter} ends there and {longer} goes on to step {more}", steps)
