"""The replay: all steps of a recorded training, last to first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np

from tracked_replay.errors import ReplayError
from tracked_replay.recording import Recording
from tracked_replay.replay.adjoint import Cotangent, StepAdjoint, measurement_cotangent
from tracked_replay.replay.allocation import keep_freed_memory
from tracked_replay.replay.plan import Plan
from tracked_replay.replay.states import states_backward
from tracked_replay.replay.targets import Target
from tracked_replay.training.loop import TrainingSetup
from tracked_replay.training.state import State


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


class Replay:
    """Goes through a recorded training backwards: iterate to get one :class:`StepScores` a step, the last step first.

    Args:
        setup: made from the recorded config; its plan must be the recorded one.
        recording: trace and checkpoints.
        targets: what is measured at the end.
        adjoint: of the setup's step; it counts what clipping did.
        mode: ``memory``, ``stream`` or ``auto``, or the plan made by :func:`choose_plan`; the scores are the same bits.
        position: state number and cotangents to go on from, one a target; the end of the training where it is ``None``.

    Attributes:
        step: number of the state that the traversal has come to.
        cotangents: ∂φ/∂ that state, one a target; empty before the first step.

    Raises:
        ReplayError: the plan made from the config is not the recorded one.
        ConfigError, ReplayError, RecordingError, NumericalError: while iterating; see :func:`states_backward` and
            :class:`StepAdjoint`.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        recording: Recording,
        targets: Sequence[Target],
        adjoint: StepAdjoint,
        mode: str | Plan = "memory",
        position: tuple[int, Sequence[Cotangent]] | None = None,
    ) -> None:
        require_recorded_plan(setup, recording)
        self._setup, self._recording, self._targets, self._adjoint = setup, recording, targets, adjoint
        self._mode = mode
        self.step, self.cotangents = (recording.trace.steps, []) if position is None else (position[0], [*position[1]])

    def __iter__(self) -> Iterator[StepScores]:
        keep_freed_memory()
        with closing(states_backward(self._setup, self._recording, self._mode, self.step, cached=True)) as states:
            yield from self._steps(states)

    def _steps(self, states: Iterator[State]) -> Iterator[StepScores]:
        setup, adjoint = self._setup, self._adjoint
        after = next(states)
        if not self.cotangents:
            self.cotangents = [
                measurement_cotangent(adjoint, setup.task, setup.data, after, target) for target in self._targets
            ]
        for before in states:
            t = before.step
            batch = setup.batch(t)
            rates = setup.plan.learning_rates[t].tolist()
            loss = float(self._recording.trace.losses[t])
            self.cotangents, scores = adjoint.pull_back(
                before, after, batch.inputs, batch.labels, rates, self.cotangents, loss
            )
            self.step = t
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
