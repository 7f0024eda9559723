"""The planner against a dynamic programme, an exhaustive search, and a machine that does what schedules say."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tracked_replay.replay.plan import Plan, least_states, make_plan, plan_segment, recomputed_steps, steps_taken

LONGEST, MOST = 300, 20
UNREACHED = 10**9


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Least steps, and least restorations of state 0 among the schedules with these, by the first state kept.

    Row ``l`` and column ``c`` belong to l states and c slots: k steps lead to the first kept state, the states behind
    it are given with one slot fewer, and those before it with all slots again.
    """
    steps = np.full((LONGEST + 1, MOST + 1), UNREACHED)
    restored = np.full((LONGEST + 1, MOST + 1), UNREACHED)
    steps[1, 1:] = restored[1, 1:] = 0
    for length in range(2, LONGEST + 1):
        steps[length, 1] = sum(range(length))
        restored[length, 1] = length - 1
        k = np.arange(1, length)
        for slots in range(2, MOST + 1):
            costs = k + steps[length - k, slots - 1] + steps[k, slots]
            steps[length, slots] = costs.min()
            restored[length, slots] = (1 + restored[k, slots])[costs == costs.min()].min()
    return steps, restored


@pytest.fixture(scope="module")
def least() -> tuple[np.ndarray, np.ndarray]:
    return tables()


def done(length: int, slots: int) -> tuple[int, int]:
    """Steps taken and restorations of state 0 by a machine that can only do what a schedule may ask."""
    kept, current, given, steps, restored = {0}, 0, length, 0, 0
    for kind, state in plan_segment(length, slots):
        if kind == "restore":
            assert state in kept
            assert state != current
            restored += state == 0
            current = state
        elif kind == "advance":
            assert state > current
            steps += state - current
            current = state
        elif kind == "keep":
            assert state == current
            assert state not in kept
            kept.add(state)
            assert len(kept) <= slots
        else:
            assert kind == "give"
            assert state == current == given - 1
            given = state
            kept.discard(state)
    assert (given, kept) == (0, set())
    return steps, restored


def test_the_number_of_steps_is_that_of_a_dynamic_programme(least: tuple[np.ndarray, np.ndarray]) -> None:
    for length in range(1, LONGEST + 1):
        for slots in range(1, MOST + 1):
            assert steps_taken(length, slots) == least[0][length, slots], (length, slots)
            assert recomputed_steps(length, slots) == least[0][length, slots] - (length - 1)


def test_a_schedule_takes_that_many_steps_and_reads_the_first_state_least_often(
    least: tuple[np.ndarray, np.ndarray],
) -> None:
    for length in (*range(1, 41), 77, 128, 299, 300):
        for slots in range(1, MOST + 1):
            assert done(length, slots) == tuple(table[length, slots] for table in least), (length, slots)


def searched(length: int, slots: int) -> int:
    """Least steps of all schedules there are, whatever they keep and drop (Dijkstra)."""
    begin = (frozenset({0}), 0, length)
    queue, best, number = [(0, 0, begin)], {begin: 0}, 0
    while queue:
        steps, _, (kept, current, given) = heapq.heappop(queue)
        if given == 0:
            return steps
        after: list[tuple[int, tuple[frozenset[int], int, int]]] = []
        after += [(0, (kept, state, given)) for state in kept]
        after += [(0, (kept - {state}, current, given)) for state in kept - {0}]
        if current + 1 < length:
            after.append((1, (kept, current + 1, given)))
        if len(kept) < slots:
            after.append((0, (kept | {current}, current, given)))
        if current == given - 1:
            after.append((0, (kept, current, current)))
        for more, where in after:
            if steps + more < best.get(where, UNREACHED):
                best[where] = steps + more
                number += 1
                heapq.heappush(queue, (steps + more, number, where))
    raise AssertionError("no schedule gives all states")


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_no_schedule_at_all_takes_fewer_steps(slots: int) -> None:
    for length in range(1, 9):
        assert steps_taken(length, slots) == searched(length, slots)


def test_known_numbers_and_limits() -> None:
    # One slot: the state i costs i steps. As many slots as states, but for the last: each step once.
    assert [steps_taken(length, 1) for length in (1, 2, 3, 10)] == [0, 1, 3, 45]
    assert [recomputed_steps(length, length - 1) for length in (2, 3, 50, 2000)] == [0, 0, 0, 0]
    assert recomputed_steps(3, 1) == 1
    # A long segment is planned at once, and not by a recursion as deep as it is long.
    assert done(2000, 1999) == (1999, 1)
    assert done(2000, 44)[0] == steps_taken(2000, 44) < 3 * 2000
    for length, slots in ((0, 1), (1, 0), (-1, 3)):
        for function in (steps_taken, recomputed_steps, plan_segment):
            with pytest.raises(ValueError, match="allowed: 1 or more of each"):
                function(length, slots)


def run(plan: Plan, checkpoints: list[int], last: int) -> tuple[int, int]:
    """Steps taken and most states held at once by a machine that follows a plan with numbers for states."""
    starts = [step for step in checkpoints if step <= last]
    stops = [*starts[1:], last + 1]
    steps = most = 0
    given: int | None = None
    everything: set[int] = set()

    def hold(*states: int | None) -> None:
        nonlocal most
        most = max(most, len({*states, *everything} - {None}))

    for place in reversed(range(len(starts))):
        start, length = starts[place], stops[place] - starts[place]
        ahead = starts[max(0, place - plan.read_ahead) : place]
        current = start
        kept = {start} if plan.keeps_start(length) else set()
        for kind, number in plan_segment(length, plan.slots(length)):
            if kind == "advance":
                while current < start + number:
                    steps += 1
                    hold(*ahead, *kept, current, current + 1, given)
                    current += 1
            elif kind == "restore":
                current = start + number
                hold(*ahead, *kept, current, given)
            elif kind == "keep":
                kept.add(current)
            else:
                hold(*ahead, *kept, current, given)
                kept.discard(current)
                if plan.keeps == "all":
                    everything.add(current)
                else:
                    given = current
    return steps, most


def trainings() -> Iterator[tuple[list[int], int]]:
    """Checkpoints and the state to begin with."""
    for last in (1, 2, 5, 12, 31):
        for every in {1, 2, 3, 5, 8, 20, last}:
            checkpoints = [*range(0, last, every), last]
            yield checkpoints, last
            yield checkpoints, last - 1  # a replay that is gone on with
            yield checkpoints, last // 2


def test_a_plan_holds_and_takes_what_it_says() -> None:
    seen = set()
    for checkpoints, last in trainings():
        recorded = sum(step <= last for step in checkpoints)
        for stream in (False, True):
            before = None
            for allowed in (*range(least_states(checkpoints, last), last + 5), None):
                plan = make_plan(checkpoints, last, allowed, stream=stream)
                steps, most = run(plan, checkpoints, last)
                assert steps == plan.needed + plan.recomputed
                assert plan.needed == last + 1 - recorded
                assert most <= plan.held
                assert allowed is None or plan.held <= allowed, (checkpoints, last, allowed)
                assert before is None or steps <= before  # more memory never takes more steps
                before = steps
                seen.add((plan.keeps, plan.read_ahead))
                assert (plan.keeps == "all") == (plan.mode == "memory")
            assert (plan.keeps, plan.recomputed) == ("segment" if stream else "all", 0)
    assert {("all", 0), ("all", 2), ("segment", 0), ("segment", 1), ("segment", 2), ("some", 0)} <= seen


def test_all_states_are_kept_as_soon_as_they_fit_and_a_segment_likewise() -> None:
    checkpoints = [0, 10, 20, 25]
    assert make_plan(checkpoints, 25, 26).keeps == "all"
    assert make_plan(checkpoints, 25, 25) == Plan("segment", 25, 13, 2, 22, 0)
    assert make_plan(checkpoints, 25, 11) == Plan("segment", 11, 11, 0, 22, 0)
    fewer = make_plan(checkpoints, 25, 10)
    # All ten but the first, which is read again: no step more, and no state more than are allowed.
    assert (fewer.keeps, fewer.recomputed, fewer.keeps_start(10), fewer.keeps_start(5)) == ("some", 0, False, True)
    assert make_plan(checkpoints, 25, 9).recomputed == 2 * recomputed_steps(10, 7)
    assert make_plan(checkpoints, 25, 3).recomputed == 2 * (45 - 9) + (10 - 4)


@pytest.mark.parametrize(("checkpoints", "least"), [([0, 1, 2, 3], 2), ([0, 2, 3], 3), ([0, 100], 3)])
def test_too_few_states_are_refused(checkpoints: list[int], least: int) -> None:
    last = checkpoints[-1]
    assert least_states(checkpoints, last) == least
    make_plan(checkpoints, last, least)
    with pytest.raises(ValueError, match=f"found {least - 1} states in memory at once; allowed: {least} or more"):
        make_plan(checkpoints, last, least - 1)


def test_the_table_in_the_documentation_is_what_the_planner_says() -> None:
    page = (Path(__file__).parents[2] / "docs/how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [\d.]+ GB \| .+ \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for states, steps in rows:
        plan = make_plan([*range(0, 2001, 50)], 2000, int(states))
        assert (plan.held, plan.needed + plan.recomputed) == (int(states), int(steps))


def test_the_plan_in_words() -> None:
    checkpoints = [0, 10, 20, 25]
    words = [make_plan(checkpoints, 25, allowed).describe(1_000_000) for allowed in (None, 20, 5)]
    assert words == [
        "all 26 states in memory, 26.0 MB; 22 training steps are taken again",
        "one segment between two checkpoints at a time, at most 13 states in memory, 13.0 MB; "
        "22 training steps are taken again",
        "some states of a segment between two checkpoints, at most 5 states in memory, 5.0 MB; "
        "22 training steps are taken again, and 12 more because a segment does not fit",
    ]
