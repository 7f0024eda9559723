"""Two recorded runs side by side: what they have in common, and their states, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tracked_replay.compare.result import Difference, TensorComparison, Tolerance
from tracked_replay.compare.states import StateSource, Unavailable, recorded_digests
from tracked_replay.compare.tensors import compare_states
from tracked_replay.errors import RecordingError
from tracked_replay.recording import Recording
from tracked_replay.training.state import BUFFERS, MOMENTUM, PARAMETERS

ASPECTS = ("data", "lr", "loss", "generators")  # what a tolerance can leave out besides tensors


class Columns(NamedTuple):
    """One column of both traces over the common steps, and where its bits differ, (steps,) bool."""

    a: np.ndarray
    b: np.ndarray
    differs: np.ndarray


def _rows_differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows differ in their bits, (rows,) bool."""
    if a.shape != b.shape:
        return np.ones(len(a), dtype=bool)
    differs = np.ascontiguousarray(a).view(np.uint64) != np.ascontiguousarray(b).view(np.uint64)
    return differs if differs.ndim == 1 else differs.any(axis=1)


@dataclass
class StatePair:
    """The states of two runs, compared when asked for, each once.

    Attributes:
        names: of the runs.
        sources: of their states.
        tolerance: what does not count.
        order: place of every parameter in the model.
        reasons: by state, why it could not be compared.
    """

    names: tuple[str, str]
    sources: tuple[StateSource, StateSource]
    tolerance: Tolerance
    order: dict[str, int]
    reasons: dict[int, str] = field(default_factory=dict)
    _found: dict[int, tuple[TensorComparison, ...] | None] = field(default_factory=dict)

    def compare(self, step: int) -> tuple[TensorComparison, ...] | None:
        """All tensors of a state, in the model's order; ``None``, with a reason, where one side has no such state."""
        if step not in self._found:
            self._found[step] = self._read(step)
        return self._found[step]

    @property
    def compared(self) -> list[int]:
        """Numbers of the states that were compared so far."""
        return sorted(step for step, found in self._found.items() if found is not None)

    def _read(self, step: int) -> tuple[TensorComparison, ...] | None:
        tensors = []
        for source, name in zip(self.sources, self.names, strict=True):
            with naming(name):
                state = source(step)
            if isinstance(state, Unavailable):
                self.reasons[step] = f"{name}: {state.reason}"
                return None
            tensors.append(state.flat())
        return self._sorted(compare_states(tensors[0], tensors[1], self.tolerance), [*tensors[0], *tensors[1]])

    def _sorted(self, found: Sequence[TensorComparison], names: Sequence[str]) -> tuple[TensorComparison, ...]:
        """Parameters in the order of their groups, buffers as they stand in the checkpoint, momentum as parameters."""
        kinds = (PARAMETERS, BUFFERS, MOMENTUM)
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}

        def place(row: TensorComparison) -> tuple[int, int, int]:
            kind, _, name = row.name.partition("/")
            return kinds.index(kind), self.order.get(name, len(self.order)), places[row.name]

        return tuple(sorted(found, key=place))


@dataclass(frozen=True)
class Pair:
    """Two runs: what is compared of them.

    Attributes:
        a, b: the recordings.
        names: what they are called.
        tolerance: what does not count.
        states: their states.
    """

    a: Recording
    b: Recording
    names: tuple[str, str]
    tolerance: Tolerance
    states: StatePair

    @cached_property
    def steps(self) -> int:
        """Number of common steps."""
        return min(self.a.trace.steps, self.b.trace.steps)

    @cached_property
    def digests(self) -> tuple[Sequence[str], Sequence[str]]:
        """Digests of the common states, (steps + 1,) each."""
        return recorded_digests(self.a)[: self.steps + 1], recorded_digests(self.b)[: self.steps + 1]

    @cached_property
    def differing_states(self) -> list[int]:
        """Numbers of the common states whose digests differ."""
        return [state for state, (one, other) in enumerate(zip(*self.digests, strict=True)) if one != other]

    @cached_property
    def _differing(self) -> frozenset[int]:
        return frozenset(self.differing_states)

    def digests_differ(self, state: int) -> bool:
        """Whether a common state has another digest on each side."""
        return state in self._differing

    def state_differs(self, state: int) -> bool:
        """Whether a common state, where it can be read, differs by more than the tolerance lets pass."""
        return self.digests_differ(state) and any(not row.equal for row in self.states.compare(state) or ())

    @cached_property
    def kept_states(self) -> list[int]:
        """Numbers of the common states that both runs kept."""
        kept = {checkpoint.step for checkpoint in self.a.checkpoints}
        return [checkpoint.step for checkpoint in self.b.checkpoints if checkpoint.step in kept]

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """The columns of the traces but for the digests."""
        a, b = self.a.trace, self.b.trace
        pairs = {
            "epoch": (a.epochs, b.epochs),
            "indices": (a.indices, b.indices),
            "labels": (a.labels, b.labels),
            "lr": (a.learning_rates, b.learning_rates),
            "loss": (a.losses, b.losses),
        }
        cut = {name: (one[: self.steps], other[: self.steps]) for name, (one, other) in pairs.items()}
        return {name: Columns(one, other, _rows_differ(one, other)) for name, (one, other) in cut.items()}

    @cached_property
    def generators(self) -> tuple[Difference, ...]:
        """Generator states that both runs kept and that differ, by the step that they stand before."""
        b = {checkpoint.step: checkpoint.generators for checkpoint in self.b.checkpoints}
        pairs = ((row.step, row.generators, b.get(row.step)) for row in self.a.checkpoints)
        return tuple(
            Difference(f"step {step}", one, other) for step, one, other in pairs if one and other and one != other
        )

    @property
    def tensors_decide(self) -> bool:
        """Whether the tolerance lets states with different digests count as equal."""
        return self.tolerance.max_ulp > 0 or any(entry not in ASPECTS for entry in self.tolerance.ignore)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say which of the two runs a damaged file belongs to."""
    try:
        yield
    except RecordingError as error:
        raise RecordingError(f"{name}: {error}") from error


def state_number(name: str) -> int:
    """4 of ``step 4``, a name among :attr:`Pair.generators`."""
    return int(name.rpartition(" ")[2])
