"""Is a recorded run the one that is expected, and the random generators as they were in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tracked_replay.determinism import restore_generator_states
from tracked_replay.errors import RecordingError
from tracked_replay.recording.reader import Recording
from tracked_replay.recording.recorder import CONFIG, ENVIRONMENT, SEEDS


def require_expected(
    recording: Recording,
    *,
    seed: int | None = None,
    flags: Mapping[str, object] | None = None,
    step: int | None = None,
) -> None:
    """Check that a recorded run has the master seed, the determinism flags and the checkpoint that are expected.

    Args:
        recording: the run.
        seed: master seed; it is looked up in the config and in the seed derivations.
        flags: some of what :func:`~tracked_replay.determinism.deterministic_flags` returned in the run, by name, for
            example ``{"mode": "full", "threads": 2}``. All of them, taken from this process, ask whether the run was
            made under the flags that are in force here.
        step: a checkpoint and generator states before this step (after the last, for the number of steps) are there.

    Raises:
        RecordingError: the first that differs, with what was found and expected; or a file is missing or damaged.
    """
    if seed is not None:
        _require("seed", recording.config.seed, seed, CONFIG)
        _require("seed", _read(recording, SEEDS, "master_seed"), seed, SEEDS)
    if flags is not None:
        recorded = _read(recording, ENVIRONMENT, "determinism")
        for name, expected in flags.items():
            if name not in recorded:
                raise RecordingError(
                    f"{name}: found no such flag in {ENVIRONMENT}; expected: {expected!r}; recorded are "
                    f"{', '.join(recorded)}"
                )
            _require(name, recorded[name], expected, ENVIRONMENT)
    if step is not None:
        _require_step(step, sorted(checkpoint.step for checkpoint in recording.checkpoints), "checkpoint")
        _require_step(step, recording.generator_steps, "generator states")


def restore_generators(recording: Recording, step: int | None = None) -> int:
    """Put Python's, NumPy's and Torch's generators back to where they were in a recorded run.

    Args:
        recording: the run.
        step: the states before this step, or the latest recorded before it; ``None`` takes the last, those after the
            last step.

    Returns:
        The step that the restored states were recorded at.

    Raises:
        RecordingError: nothing was recorded at or before ``step``, or the file is missing or damaged.
        ReplayError: the states are of another number of CUDA devices than there are here.
    """
    recorded = recording.generator_steps
    if not recorded:
        raise RecordingError("the recording has no generator states")
    allowed = [one for one in recorded if step is None or one <= step]
    if not allowed:
        raise RecordingError(
            f"step: found {step}; allowed: a step at or after one with recorded generator states, which are "
            f"{_listed(recorded)}"
        )
    found = max(allowed)
    restore_generator_states(recording.generator_states(found))
    return found


def _read(recording: Recording, name: str, key: str) -> Any:
    with recording.open(name) as path:
        content = json.loads(path.read_text(encoding="utf-8"))
    if key not in content:
        raise RecordingError(f"{name}: found no {key!r}, so the run cannot be compared with what is expected")
    return content[key]


def _require(name: str, found: object, expected: object, where: str) -> None:
    if found != expected:
        raise RecordingError(f"{name}: found {found!r} in {where}; expected: {expected!r}")


def _require_step(step: int, recorded: list[int], what: str) -> None:
    if step not in recorded:
        raise RecordingError(f"step: found no {what} of step {step}; recorded are those of {_listed(recorded)}")


def _listed(steps: list[int]) -> str:
    """Steps in words, few of them: a run may have thousands."""
    if len(steps) > 8:
        return f"{', '.join(map(str, steps[:4]))}, …, {steps[-1]}"
    return ", ".join(map(str, steps)) or "none"
