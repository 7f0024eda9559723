"""Recordings of the tiny task for tests that compare runs, with what is to differ put in by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_setup

from tracked_replay.recording import Recorder, Recording, folder_source
from tracked_replay.training import State, TrainingSetup, train
from tracked_replay.training.loop import StepRecord

NAMES = ("run-a", "run-b")


def record(
    root: Path,
    setup: TrainingSetup | None = None,
    *,
    change_state: Callable[[State], State] = lambda state: state,
    change_record: Callable[[StepRecord], StepRecord] = lambda record: record,
    steps: int | None = None,
    **changes: object,
) -> Recording:
    """Train the tiny task and record it under a folder.

    Args:
        root: the folder.
        setup: of the training; made of ``changes`` where it is ``None``.
        change_state: called with the state after every step; the training goes on from what it returns.
        change_record: called with every step before it is recorded.
        steps: steps taken; all of the plan where it is ``None``.
        changes: of the config.
    """
    setup = setup or tiny_setup(**changes)
    state = setup.initial
    with Recorder(root, setup) as recorder:
        for step in range(setup.plan.steps if steps is None else steps):
            (taken,) = train(setup, start=state, stop=step + 1)
            state = change_state(taken.after)
            recorder.add(change_record(taken._replace(after=state)))
        identity = recorder.finish(state)
    return Recording(folder_source(root), identity)


def nudged(tensor: torch.Tensor, ulp: int = 1) -> torch.Tensor:
    """A copy whose last element is the ``ulp``-th next larger number."""
    copy = tensor.clone()
    for _ in range(ulp):
        copy.view(-1)[-1] = torch.nextafter(copy.view(-1)[-1], copy.new_tensor(torch.inf))
    return copy


def nudge_at(step: int, name: str, ulp: int = 1) -> Callable[[State], State]:
    """Changes one tensor (``parameters/0.weight``) of one state, as a memory error might."""

    def change(state: State) -> State:
        if state.step != step:
            return state
        flat = state.flat()
        return State.from_flat(step, flat | {name: nudged(flat[name], ulp)})

    return change


def with_rates(setup: TrainingSetup, rates: np.ndarray) -> TrainingSetup:
    """The setup with learning rates, (steps, groups), of its own."""
    return dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, learning_rates=rates))
