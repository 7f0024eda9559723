"""Retraining with other weights: all else as it was recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch

from tracked_replay.config import Config
from tracked_replay.errors import ReplayError
from tracked_replay.recording import state_digest
from tracked_replay.tasks import load_task
from tracked_replay.training import State, TrainingSetup, evaluate, set_up, train


@dataclass(frozen=True)
class RetrainingJob:
    """One retraining.

    Attributes:
        id: number of the job.
        indices: training examples whose weight is not 1, (changed,) int64.
        weights: their weights, (changed,) float64.
        keep_state: whether the final state comes back too.
    """

    id: int
    indices: np.ndarray
    weights: np.ndarray
    keep_state: bool = False


@dataclass(frozen=True)
class Retrained:
    """What a retraining gives.

    Attributes:
        id: number of the job.
        measurements: (evaluation examples,) float64.
        accuracy: share of evaluation examples predicted right, or ``None`` where the task has no classes.
        final_digest: digest of the final state.
        seconds: time it took.
        state: the final state as the bytes of a safetensors file, where asked.
        models_at_once: models in each step; 1 where it was done alone.
    """

    id: int
    measurements: np.ndarray
    accuracy: float | None
    final_digest: str
    seconds: float
    state: bytes | None = None
    models_at_once: int = 1


@dataclass(frozen=True)
class MakeSetup:
    """Builds the training's setup in a worker from its config alone: same seeds, threads, order and initial state."""

    config_toml: str

    def __call__(self) -> TrainingSetup:
        """The setup; its process is pinned by it."""
        config = Config.from_toml(self.config_toml)
        return set_up(config, load_task(config))


def retrain(setup: TrainingSetup, job: RetrainingJob) -> Retrained:
    """Train once with the job's weights; everything else is the plan of the setup."""
    started = time.perf_counter()
    final = final_state(setup, weight_tensor(setup, job.indices, job.weights))
    return retrained(setup, job, final, started)


def retrained(setup: TrainingSetup, job: RetrainingJob, final: State, started: float) -> Retrained:
    """What a retraining that ended in ``final`` gives; ``started`` is a reading of ``time.perf_counter``."""
    evaluation = evaluate(setup, final)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in final.flat().items()}
    return Retrained(
        id=job.id,
        measurements=evaluation.measurements,
        accuracy=evaluation.accuracy(setup.data.evaluation.labels),
        final_digest=state_digest(final),
        seconds=time.perf_counter() - started,
        state=safetensors.torch.save(tensors, metadata={"step": str(final.step)}) if job.keep_state else None,
    )


def weight_tensor(setup: TrainingSetup, indices: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """(training examples,) weights on the setup's device: 1 but for ``indices``."""
    all_weights = torch.ones(setup.data.num_train, dtype=torch.float64)
    all_weights[torch.from_numpy(np.asarray(indices, dtype=np.int64))] = torch.from_numpy(np.asarray(weights, float))
    return all_weights.to(device=setup.device, dtype=setup.data.dtype)


def final_state(setup: TrainingSetup, weights: torch.Tensor | None = None) -> State:
    """The state after the last step."""
    state = setup.initial
    for record in train(setup, weights=weights):
        state = record.after
    return state


def require_recorded_states(setup: TrainingSetup, digests: Sequence[str], losses: np.ndarray) -> None:
    """Retrain with all weights 1 and compare every state and loss with the recording, bit for bit.

    Args:
        setup: made from the recorded config.
        digests: recorded digest of every state, the final one included.
        losses: (T,) float64, recorded loss of every step.

    Raises:
        ReplayError: naming the first step whose state or loss differs.
    """
    ones = torch.ones(setup.data.num_train, dtype=setup.data.dtype, device=setup.device)
    state = setup.initial
    _require(state, digests)
    for record in train(setup, weights=ones):
        state = record.after
        _require(state, digests)
        step = record.before.step
        if np.float64(record.loss).tobytes() != np.float64(losses[step]).tobytes():
            raise ReplayError(f"step {step}: a retraining has the loss {record.loss!r}, recorded was {losses[step]!r}")


def _require(state: State, digests: Sequence[str]) -> None:
    found = state_digest(state)
    if found != digests[state.step]:
        raise ReplayError(
            f"step {state.step}: a retraining with all weights 1 has the state digest {found}, recorded was "
            f"{digests[state.step]}; retrainings here would differ from the recorded run in more than their weights"
        )
