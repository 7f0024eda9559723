"""Questions to a recorded run by its ID: is it the expected one, and where were its generators."""

from __future__ import annotations

from collections.abc import Mapping

from tracked_replay import recording
from tracked_replay.stages.train import open_recording


def require_expected(
    run_id: str,
    *,
    seed: int | None = None,
    flags: Mapping[str, object] | None = None,
    step: int | None = None,
) -> None:
    """Check that a finished ``train`` run has the master seed, determinism flags and checkpoint that are expected.

    Args:
        run_id: the run.
        seed: master seed.
        flags: some of :func:`~tracked_replay.determinism.deterministic_flags` by name, such as ``{"threads": 2}``.
        step: a checkpoint and generator states before this step must be there.

    Raises:
        RecordingError: the first that differs, with what was found and expected.
        RunError: no such finished run.
    """
    recording.require_expected(open_recording(run_id), seed=seed, flags=flags, step=step)


def restore_generators(run_id: str, step: int | None = None) -> int:
    """Put Python's, NumPy's and Torch's generators back to where they were in a finished ``train`` run.

    Args:
        run_id: the run.
        step: the states before this step, or the latest recorded before it; the last ones where it is ``None``.

    Returns:
        The step that the restored states were recorded at.

    Raises:
        RecordingError: nothing was recorded at or before ``step``, or the file is missing or damaged.
        ReplayError: the states are of another number of CUDA devices than there are here.
        RunError: no such finished run.
    """
    return recording.restore_generators(open_recording(run_id), step)
