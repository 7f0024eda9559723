"""Which states to keep while a training is gone through backwards, and how many steps that takes again.

States are numbered 0 to T; step t leads from state t to state t + 1. The replay needs them in the order T, …, 0. Some
lie on disk as checkpoints, which cost nothing but reading; a checkpoint and the states up to the next one are a
*segment*. The states of a segment that are not on disk are made by taking the training's steps again. With enough
memory for a segment each of its steps is taken once. With less, steps are taken several times, and the places of the
states that are kept on the way decide how often. The least number is known, and so are the places: Griewank and
Walther 2000, "Algorithm 799: revolve: an implementation of checkpointing for the reverse or adjoint mode of
computational differentiation", ACM Transactions on Mathematical Software 26, 19–45.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Final, Literal, NamedTuple

from pydantic import ByteSize

READ_AHEAD = 2  # starts of segments that are read before they are needed, where they fit

RESTORE: Final = "restore"
ADVANCE: Final = "advance"
KEEP: Final = "keep"
GIVE: Final = "give"


class Action(NamedTuple):
    """One action of a schedule. There is one current state; at the beginning it is state 0.

    Attributes:
        kind: ``restore``: a kept state, or state 0, becomes current. ``advance``: steps are taken until the current
            state is this one. ``keep``: the current state is kept. ``give``: the current state is given out, and not
            kept any longer if it was.
        state: number of the state inside its segment.
    """

    kind: Literal["restore", "advance", "keep", "give"]
    state: int


def plan_segment(length: int, slots: int) -> Iterator[Action]:
    """The schedule that gives the states ``length`` − 1, …, 0 and takes the fewest steps.

    Of the places that are equally good for a kept state the first is taken: state 0, which may have to be read from
    disk, is then restored least often.

    Args:
        length: number of states, at least 1.
        slots: number of states, at least 1, that can be restored at any one time. State 0 is one of them all the time,
            wherever it lies. The current state is none.

    Raises:
        ValueError: ``length`` or ``slots`` is below 1.
    """
    _require_positive(length, slots)
    return _schedule(length, slots)


def _schedule(length: int, slots: int) -> Iterator[Action]:
    current, end = 0, length
    kept = [0]
    while kept:
        if kept[-1] != current:
            yield Action(RESTORE, kept[-1])
        current = kept[-1]
        while current < end - 1:
            free = slots - len(kept)
            current = current + _split(end - current, free + 1) if free else end - 1
            yield Action(ADVANCE, current)
            if current < end - 1:
                yield Action(KEEP, current)
                kept.append(current)
        end -= 1
        yield Action(GIVE, end)
        if kept[-1] == end:
            kept.pop()


def _split(length: int, slots: int) -> int:
    """Where a sequence of states is parted: the first place that is as good as any; ``length`` and ``slots`` above 1.

    Places k with β(c, r − 2) ≤ k ≤ β(c, r − 1) and β(c − 1, r − 1) ≤ l − k ≤ β(c − 1, r) keep the least number.
    """
    r = repetitions(length, slots)
    return max(1, _reach(slots, r - 2), length - _reach(slots - 1, r))


def steps_taken(length: int, slots: int) -> int:
    """Least number of steps with which the states ``length`` − 1, …, 0 can be given, when only state 0 is there.

    t(l, c) = r l − β(c + 1, r − 1) with β(c, r) = (c + r)! / (c! r!) and r, the most often that a step is taken, from
    β(c, r − 1) < l ≤ β(c, r). It is the solution of t(1, c) = 0, t(l, 1) = l (l − 1) / 2 and
    t(l, c) = min over k of k + t(l − k, c − 1) + t(k, c). Griewank and Walther 2000.

    Args:
        length: l, as for :func:`plan_segment`.
        slots: c, likewise.

    Raises:
        ValueError: ``length`` or ``slots`` is below 1.
    """
    _require_positive(length, slots)
    r = repetitions(length, slots)
    return r * length - _reach(slots + 1, r - 1)


def recomputed_steps(length: int, slots: int) -> int:
    """How many of :func:`steps_taken` a larger memory would save: t(l, c) − (l − 1).

    What counts is one call of the training's step. l − 1 calls are needed with any memory, because only the first of
    the l states is there; ``slots`` ≥ l − 1 needs no other.
    """
    return steps_taken(length, slots) - (length - 1)


def repetitions(length: int, slots: int) -> int:
    """How often a step is taken at most: the least r with β(``slots``, r) ≥ ``length``."""
    r, reach = 0, 1
    while reach < length:
        r += 1
        reach = reach * (slots + r) // r
    return r


def _reach(slots: int, repeated: int) -> int:
    """β(c, r): states that can be given where no step is taken more than r times; 0 for a negative r."""
    return comb(slots + repeated, slots) if repeated >= 0 else 0


def _require_positive(length: int, slots: int) -> None:
    if length < 1 or slots < 1:
        raise ValueError(f"found {length} states and {slots} slots; allowed: 1 or more of each")


@dataclass(frozen=True)
class Plan:
    """How the states of a training are given backwards.

    A state counts as held from the moment when it is read or made until nobody uses it any longer: kept states, the
    current one, the one that a step is making from it, those that were read ahead, and the one that was given out last,
    which whoever goes backwards still needs beside the next.

    Attributes:
        keeps: ``all`` states, read and made before the first is given; one ``segment`` at a time; or ``some`` states
            of a segment, at the places of :func:`plan_segment`.
        allowed: states that may be held at once; ``None`` means any number.
        held: states that are held at once, at most.
        read_ahead: how many of them are read ahead.
        needed: steps that are taken once more with any memory, one for each state that is not on disk.
        recomputed: steps that are taken beyond those; see :func:`recomputed_steps`.
    """

    keeps: Literal["all", "segment", "some"]
    allowed: int | None
    held: int
    read_ahead: int
    needed: int
    recomputed: int

    @property
    def mode(self) -> Literal["memory", "stream"]:
        """What ``replay.mode`` calls it."""
        return "memory" if self.keeps == "all" else "stream"

    def slots(self, length: int) -> int:
        """States of a segment that can be gone on from at once, its first, which is on disk, included."""
        return _slots(length, self.allowed)

    def describe(self, bytes_of_state: int) -> str:
        """The plan in words, for states of a size."""
        what = {
            "all": f"all {self.held} states in memory",
            "segment": f"one segment between two checkpoints at a time, at most {self.held} states in memory",
            "some": f"some states of a segment between two checkpoints, at most {self.held} states in memory",
        }[self.keeps]
        size = ByteSize(self.held * bytes_of_state).human_readable(decimal=True, separator=" ")
        again = f"{self.needed} training steps are taken again"
        more = f", and {self.recomputed} more because a segment does not fit" if self.recomputed else ""
        return f"{what}, {size}; {again}{more}"

    def keeps_start(self, length: int) -> bool:
        """Whether a segment's first state stays in memory; if not, it is read again where it is needed again."""
        return self.allowed is None or length < self.allowed


def least_states(checkpoints: Sequence[int], last: int) -> int:
    """States that must be allowed at once: the one given last and the next, and a third where a step is taken.

    Args:
        checkpoints: numbers of the states on disk, ascending, the first of them 0.
        last: number of the state to begin with.
    """
    return 2 if max(_lengths(checkpoints, last)) == 1 else 3


def make_plan(checkpoints: Sequence[int], last: int, allowed: int | None, *, stream: bool = False) -> Plan:
    """The plan that takes the fewest steps again.

    All states are kept where they fit, else whole segments, else some of a segment's states. What is left over is used
    for reading ahead.

    Args:
        checkpoints: numbers of the states on disk, ascending, the first of them 0.
        last: number of the state to begin with.
        allowed: states that may be held at once; ``None`` means any number.
        stream: go a segment at a time even where all states fit.

    Raises:
        ValueError: fewer than :func:`least_states` are allowed.
    """
    lengths = _lengths(checkpoints, last)
    least = least_states(checkpoints, last)
    if allowed is not None and allowed < least:
        raise ValueError(f"found {allowed} states in memory at once; allowed: {least} or more")
    needed = sum(lengths) - len(lengths)
    more = len(lengths) - 1  # segments that there is to read ahead
    if not stream and (allowed is None or allowed > last):
        return Plan("all", allowed, last + 1, min(READ_AHEAD, more), needed, 0)
    longest = max(lengths)
    if allowed is None or allowed > longest:
        ahead = min(READ_AHEAD, more) if allowed is None else min(READ_AHEAD, more, allowed - longest - 1)
        return Plan("segment", allowed, longest + 1 + ahead, ahead, needed, 0)
    recomputed = sum(recomputed_steps(length, _slots(length, allowed)) for length in lengths)
    return Plan("some", allowed, allowed, 0, needed, recomputed)


def _slots(length: int, allowed: int | None) -> int:
    # Where all but the first state fit, each is made from the one before it, which is kept. Else three are held beside
    # the kept ones: the current state, the one that is made from it and the one given last. The first is on disk.
    if allowed is None or length <= allowed:
        return max(1, length - 1)
    return allowed - 2


def _lengths(checkpoints: Sequence[int], last: int) -> list[int]:
    """Number of states in each segment as far as ``last``."""
    return [stop - start for start, stop in pairwise([*(step for step in checkpoints if step <= last), last + 1])]
