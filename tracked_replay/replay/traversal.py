"""The replay: all steps of a recorded training, last to first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tracked_replay.errors import ReplayError
from tracked_replay.recording import Recording
from tracked_replay.replay.adjoint import StepAdjoint, measurement_cotangent
from tracked_replay.replay.states import states_backward
from tracked_replay.replay.targets import Target
from tracked_replay.training.loop import TrainingSetup


class StepScores(NamedTuple):
    """What one step adds to the scores.

    Attributes:
        step: the step.
        indices: (B,) int64, its training examples.
        scores: (targets, B) float64, ∂φ/∂w of each example through this step.
    """

    step: int
    indices: np.ndarray
    scores: np.ndarray


def replay(
    setup: TrainingSetup, recording: Recording, targets: Sequence[Target], adjoint: StepAdjoint, mode: str = "memory"
) -> Iterator[StepScores]:
    """Go through a recorded training backwards.

    Args:
        setup: made from the recorded config; its plan must be the recorded one.
        recording: trace and checkpoints.
        targets: what is measured at the end.
        adjoint: of the setup's step; it counts what clipping did.
        mode: ``memory`` or ``stream``; the scores are the same bits.

    Yields:
        One :class:`StepScores` a step, from the last step to the first.

    Raises:
        ReplayError, RecordingError, NumericalError: see :func:`states_backward` and :class:`StepAdjoint`.
    """
    require_recorded_plan(setup, recording)
    states = states_backward(setup, recording, mode)
    after = next(states)
    cotangents = [measurement_cotangent(adjoint, setup.task, setup.data, after, target) for target in targets]
    for before in states:
        t = before.step
        batch = setup.data.batch(torch.from_numpy(setup.plan.indices[t]), int(setup.plan.epochs[t]))
        rates = setup.plan.learning_rates[t].tolist()
        cotangents, scores = adjoint.pull_back(
            before, after, batch.inputs, batch.labels, rates, cotangents, float(recording.trace.losses[t])
        )
        yield StepScores(t, setup.plan.indices[t], scores.double().cpu().numpy())
        after = before


def require_recorded_plan(setup: TrainingSetup, recording: Recording) -> None:
    """Check that the order, the labels and the learning rates made from the config are the recorded ones.

    Raises:
        ReplayError: naming the first step that differs, and in what.
    """
    plan, trace = setup.plan, recording.trace
    if plan.steps != trace.steps:
        raise ReplayError(f"the config gives {plan.steps} steps, the trace holds {trace.steps}")
    labels = setup.data.train.labels.cpu().numpy()[plan.indices]
    for name, made, recorded in (
        ("epoch", plan.epochs[:, None], trace.epochs[:, None]),
        ("order of examples", plan.indices, trace.indices),
        ("labels", labels, trace.labels),
        ("learning rates", plan.learning_rates, trace.learning_rates),
    ):
        if made.shape != recorded.shape:
            raise ReplayError(f"the {name} of a step have shape {made.shape[1:]}, recorded were {recorded.shape[1:]}")
        differing = np.flatnonzero((made != recorded).any(axis=1))
        if len(differing):
            step = int(differing[0])
            raise ReplayError(
                f"step {step}: the {name} made from the config and the data differ from the trace; "
                f"found {made[step][:4].tolist()}…, recorded {recorded[step][:4].tolist()}…"
            )
