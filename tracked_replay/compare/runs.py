"""Compares two recorded runs: where they first part, in what, and why.

What was recorded as digests is compared first. Where all of them agree, the runs are identical and no checkpoint is
read; where they part, the states around that step are read and compared tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from tracked_replay.compare.causes import likely_causes
from tracked_replay.compare.divergence import Divergence, find_divergence
from tracked_replay.compare.facts import compare_facts, read_json
from tracked_replay.compare.pair import ASPECTS, Pair, StatePair, naming
from tracked_replay.compare.result import ULP, Comparison, Drift, TensorComparison, Tolerance, TraceDifference
from tracked_replay.compare.states import (
    StateSource,
    Unavailable,
    checkpoint_states,
    recorded_digests,
    retrained_states,
)
from tracked_replay.errors import ConfigError, RecordingError
from tracked_replay.recording import Recording, recorder
from tracked_replay.training.state import MOMENTUM, PARAMETERS

__all__ = [
    "ASPECTS",
    "StateSource",
    "Unavailable",
    "checkpoint_states",
    "compare_recordings",
    "retrained_states",
    "tolerance_text",
]

EXACT = Tolerance()
DRIFT_STEPS = 24
LISTED = 6  # states named one by one in a summary


def compare_recordings(
    a: Recording,
    b: Recording,
    names: tuple[str, str],
    tolerance: Tolerance = EXACT,
    states: tuple[StateSource | None, StateSource | None] = (None, None),
    *,
    check_files: bool = False,
) -> Comparison:
    """Compare two runs step by step.

    Step t parts the runs when its data, learning rates or loss differ, in this order, or when the state after it
    does; runs whose initial states differ part at step 0. Floats are compared by their bits. Under a tolerance that
    concerns tensors, a digest that differs decides nothing: the states that both runs kept are compared, and those
    between them where the sources can give them.

    Args:
        a, b: the runs.
        names: what they are called in the result: run IDs.
        tolerance: what does not count.
        states: where the states of each run come from; its checkpoints where it is ``None``.
        check_files: whether every recorded file of both runs is read and checked first.

    Raises:
        ConfigError: an entry of ``tolerance.ignore`` is neither an aspect nor matches a tensor.
        RecordingError: a recorded file is missing or damaged; names the run and the file.
    """
    for recording, name in zip((a, b), names, strict=True):
        with naming(name):
            require_whole(recording, check_files=check_files)
    _require_known(tolerance, (a, b), names)
    sources = (states[0] or checkpoint_states(a), states[1] or checkpoint_states(b))
    order = {name: place for place, name in enumerate(_group_parameters(a))}
    return _compare(Pair(a, b, names, tolerance, StatePair(names, sources, tolerance, order)))


def tolerance_text(tolerance: Tolerance, *, beyond: bool = False) -> str:
    """A tolerance in words: ``bit for bit``, ``within 2 ULP (…), momentum/* left out``, or ``beyond 2 ULP (…)``."""
    near = "bit for bit"
    if tolerance.max_ulp:
        near = f"{'beyond' if beyond else 'within'} {tolerance.max_ulp} ULP ({ULP})"
    return f"{near}, {_and(tolerance.ignore)} left out" if tolerance.ignore else near


def require_whole(recording: Recording, *, check_files: bool = True, figures: bool = True) -> None:
    """Read what every comparison needs, so that damage is found before anything is concluded. Raises RecordingError."""
    if check_files:
        recording.require_undamaged(figures=figures)
    digests = recorded_digests(recording)
    if recording.final.step != recording.trace.steps:
        raise RecordingError(
            f"the trace has {recording.trace.steps} steps, but the last checkpoint is of state {recording.final.step}"
        )
    _ = recording.config
    for checkpoint in recording.checkpoints if check_files else ():
        recording.state(checkpoint)
        if checkpoint.digest != digests[checkpoint.step]:
            raise RecordingError(
                f"{checkpoint.file}: its state has the digest {checkpoint.digest}, the trace says "
                f"{digests[checkpoint.step]}"
            )


def _group_parameters(recording: Recording, *, momentum: bool = False) -> list[str]:
    """Names of the trained parameters, group by group; of those with momentum only where asked."""
    groups = read_json(recording, recorder.GROUPS) or []
    return [name for group in groups for name in group["parameters"] if group["momentum"] or not momentum]


def _require_known(tolerance: Tolerance, recordings: tuple[Recording, Recording], names: tuple[str, str]) -> None:
    if tolerance.max_ulp < 0:
        raise ConfigError(f"max_ulp: found {tolerance.max_ulp}; allowed: integer >= 0")
    tensors: set[str] = set()
    for recording in recordings:
        tensors |= {f"{PARAMETERS}/{name}" for name in _group_parameters(recording)}
        tensors |= {f"{MOMENTUM}/{name}" for name in _group_parameters(recording, momentum=True)}
    unknown = [entry for entry in tolerance.ignore if entry not in ASPECTS and not _matches_any(tensors, entry)]
    if not unknown:
        return
    for recording, name in zip(recordings, names, strict=True):  # only a checkpoint has the names of the buffers
        with naming(name):
            tensors |= recording.state(recording.final).flat().keys()
    for entry in unknown:
        if not _matches_any(tensors, entry):
            examples = ", ".join(sorted(tensors)[:3])
            raise ConfigError(
                f"ignore: found {entry!r}; allowed: {', '.join(ASPECTS)}, or a pattern of tensor names such as "
                f"{MOMENTUM}/* (tensors here: {examples}, …)"
            )


def _matches_any(names: set[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _compare(pair: Pair) -> Comparison:
    divergence = find_divergence(pair)
    facts = compare_facts(pair.a, pair.b)
    tensors_step, tensors = _last_common(pair)
    comparison = Comparison(
        a=pair.names[0],
        b=pair.names[1],
        verdict="identical" if divergence is None else "different",
        summary="",
        tolerance=pair.tolerance,
        steps_a=pair.a.trace.steps,
        steps_b=pair.b.trace.steps,
        tensors=tensors,
        tensors_step=tensors_step,
        trace=_trace_differences(pair),
        generators=pair.generators,
        seeds=facts.seeds,
        config=facts.config,
        environment=facts.environment,
        other=facts.other,
        drift=_drift(pair),
    )
    if divergence is None:
        return replace(comparison, summary=_identical_text(pair))
    first = _first_tensors(pair, divergence.state)
    comparison = replace(
        comparison,
        summary=_different_text(pair, divergence, first),
        first_divergent_step=divergence.step,
        first_difference=divergence.kind,
        first_tensor=first[0].name if first else None,
        first_tensors=first,
    )
    trains = (pair.a.config.train, pair.b.config.train)
    causes = likely_causes(
        comparison,
        gpu=any(train.device != "cpu" for train in trains),
        deterministic=all(train.reproducibility != "seeds" for train in trains),
    )
    return replace(comparison, causes=causes)


def _first_tensors(pair: Pair, state: int) -> tuple[TensorComparison, ...]:
    if not pair.digests_differ(state):
        return ()
    return tuple(row for row in pair.states.compare(state) or () if not row.equal)


def _last_common(pair: Pair) -> tuple[int | None, tuple[TensorComparison, ...]]:
    """Number and tensors of the last state that both runs have; nothing where its digests agree."""
    for state in (pair.steps, *(kept for kept in reversed(pair.kept_states) if kept < pair.steps)):
        if not pair.digests_differ(state):
            return None, ()
        tensors = pair.states.compare(state)
        if tensors is not None:
            return state, tensors
    return None, ()


def _trace_differences(pair: Pair) -> tuple[TraceDifference, ...]:
    found = []
    for name, column in pair.columns.items():
        rows = np.flatnonzero(column.differs)
        if len(rows):
            step = int(rows[0])
            found.append(TraceDifference(name, step, len(rows), *_shown(column.a[step], column.b[step])))
    if pair.differing_states:
        state = pair.differing_states[0]
        digests = (pair.digests[0][state], pair.digests[1][state])
        found.append(TraceDifference("state_digest", state, len(pair.differing_states), *digests))
    return tuple(found)


def _shown(a: Any, b: Any) -> tuple[str, str]:
    """Two differing values; of two lists the first entry that differs."""
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    if a.shape != b.shape:
        return f"{len(a)} values", f"{len(b)} values"
    place = int(np.flatnonzero(a.view(np.uint64) != b.view(np.uint64))[0])
    where = f" at position {place}" if len(a) > 1 else ""
    return f"{a[place].item()!r}{where}", f"{b[place].item()!r}{where}"


def _drift(pair: Pair) -> Drift:
    if not pair.differing_states:
        return Drift()
    first = pair.differing_states[0]
    steps = _spread([state for state in pair.kept_states if state >= first])
    rows: dict[str, dict[int, float | None]] = {}
    compared = []
    for step in steps:
        tensors = pair.states.compare(step) if pair.digests_differ(step) else ()
        if tensors is not None:
            compared.append(step)
            for row in tensors:
                rows.setdefault(row.name, {})[step] = _distance(row)
    return Drift(
        steps=tuple(compared),
        tensors=tuple(rows),
        largest_absolute=tuple(tuple(row.get(step, 0.0) for step in compared) for row in rows.values()),
    )


def _distance(row: TensorComparison) -> float | None:
    return 0.0 if row.difference == "none" else row.largest_absolute


def _spread(steps: Sequence[int]) -> list[int]:
    """At most ``DRIFT_STEPS`` of rising numbers, first and last included, their distance from the first growing."""
    if len(steps) <= DRIFT_STEPS:
        return list(steps)
    distances = np.asarray(steps) - steps[0] + 1
    wanted = np.round(np.geomspace(1, distances[-1], DRIFT_STEPS))
    return [steps[place] for place in np.unique(np.searchsorted(distances, wanted))]


def _identical_text(pair: Pair) -> str:
    text = f"Identical {tolerance_text(pair.tolerance)}: {_count(pair.steps, 'step')}"
    return f"{text}{_compared_text(pair)}."


def _different_text(pair: Pair, divergence: Divergence, first: Sequence[TensorComparison]) -> str:
    in_force = f" {tolerance_text(pair.tolerance, beyond=True)}" if pair.tolerance != EXACT else ""
    where = f", first in {first[0].name}" if first and divergence.kind == "state" else ""
    text = f"Different{in_force}: the runs part at step {divergence.step}, where {divergence.text}{where}"
    if pair.differing_states and not pair.digests_differ(pair.steps):
        text += f"; state {pair.steps} agrees again"
    reason = pair.states.reasons.get(divergence.state)
    missing = f" The tensors of state {divergence.state} could not be compared ({reason})." if reason else ""
    return f"{text}{_compared_text(pair)}.{missing}"


def _compared_text(pair: Pair) -> str:
    """Under a tolerance of tensors: the states that decided."""
    if not (pair.tensors_decide and pair.differing_states):
        return ""
    digests = f"the digests of {_count(len(pair.differing_states), 'state')} differ"
    compared = pair.states.compared
    if not compared:
        listed = "no state was there on both sides to be compared"
    elif len(compared) > LISTED:
        listed = f"{len(compared)} states from {compared[0]} to {compared[-1]} were compared"
    else:
        listed = (
            f"state{'s' * (len(compared) != 1)} {_and(compared)} {'was' if len(compared) == 1 else 'were'} compared"
        )
    return f"; {digests}, {listed}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _and(items: Sequence[object]) -> str:
    """``1, 2 and 3``."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last
