"""Several retrainings as one: each step takes all of them, with the model as a further dimension of every tensor.

They see the same batches in the same order and augmentation and differ in their weights alone. A sum over a batch is
made by other kernels then, so the result equals that of a retraining done alone to rounding and not bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from tracked_replay.errors import ConfigError, TrackedReplayError
from tracked_replay.lds.retraining import Retrained, RetrainingJob, retrained, weight_tensor
from tracked_replay.training import BatchedStep, State, TrainingSetup
from tracked_replay.training.state import Tensors

# Largest difference from a retraining done alone, as a share of the spread between retrainings. Noise of a hundredth of
# the spread lowers a correlation by the factor 1/√(1 + 0.01²), which is 0.99995.
BOUND = 0.01

FIRST_STEP = 0.01  # largest difference of the first step's change of the state, as a share of it
FIELD = "lds.models_at_once"


def batched(setup: TrainingSetup, models: int) -> TrainingSetup:
    """A setup whose step takes ``models`` models from the same initial state; weights are (models, examples)."""
    step = BatchedStep(setup.step.model, setup.step.per_example_loss, setup.step.groups, setup.step.seed)

    def stack(tensors: Tensors) -> Tensors:
        return {name: tensor.expand(models, *tensor.shape).clone() for name, tensor in tensors.items()}

    first = setup.initial
    initial = State(first.step, stack(first.parameters), stack(first.buffers), stack(first.momentum))
    return dataclasses.replace(setup, step=step, initial=initial)


def model_state(state: State, place: int) -> State:
    """The state of one of the models in a batched state."""
    return State.from_flat(state.step, {name: tensor[place].clone() for name, tensor in state.flat().items()})


def retrain_together(setup: TrainingSetup, jobs: Sequence[RetrainingJob], *, models: int) -> list[Retrained]:
    """Train once for each job, all in the same steps.

    Args:
        setup: of a training alone.
        jobs: at least one and at most ``models``.
        models: models in a step. Where jobs are fewer, copies of the last one fill the places, because kernels are
            chosen by shape, and with them the bits.

    Returns:
        One result a job, in their order; ``seconds`` is each one's share.

    Raises:
        NumericalError: NaN or Inf in one of them.
    """
    started = time.perf_counter()
    together = batched(setup, models)
    rows = [weight_tensor(setup, job.indices, job.weights) for job in jobs]
    weights = torch.stack(rows + rows[-1:] * (models - len(rows)))
    state = together.initial
    while state.step < setup.plan.steps:
        state = together.take(state, weights)[0].state
    share = (time.perf_counter() - started) / len(jobs)
    results = []
    for place, job in enumerate(jobs):
        found = retrained(setup, job, model_state(state, place), time.perf_counter() - share)
        results.append(dataclasses.replace(found, models_at_once=models))
    return results


def require_batchable(setup: TrainingSetup, models: int) -> None:
    """Take the first step with several models and with the last of them alone.

    Args:
        setup: of a training alone.
        models: models in a step.

    Raises:
        ConfigError: the model cannot be batched, does not fit into memory so often, or takes another step then.
        NumericalError: the step alone has NaN or Inf in it.
    """
    weights = torch.ones(models, setup.data.num_train, dtype=setup.data.dtype, device=setup.device)
    for model, example in enumerate(np.resize(setup.plan.indices[0], models)):
        weights[model, example] = 0
    alone = setup.take(setup.initial, weights[-1])[0].state
    together = batched(setup, models)
    try:
        state = together.take(together.initial, weights)[0].state
    except TrackedReplayError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{FIELD}: found {models}, but so many models do not fit into the memory of {setup.device}; "
            f"allowed: fewer, for example {max(1, models // 2)}"
        ) from error
    except Exception as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0][:200]  # torch's first sentence says what it is
        raise ConfigError(
            f"{FIELD}: found {models}, but torch.vmap cannot take the model or the loss of the task "
            f"{setup.task.name} ({type(error).__name__}: {why}); allowed: 1 for this task"
        ) from error
    difference = _step_difference(setup.initial, alone, model_state(state, -1))
    if not difference <= FIRST_STEP:
        raise ConfigError(
            f"{FIELD}: found {models}, but in its first step the model of the task {setup.task.name} changes otherwise "
            f"than alone, by {difference:.2g} of the change (limit {FIRST_STEP:g}); allowed: 1 for this task"
        )


def _step_difference(before: State, alone: State, together: State) -> float:
    """Norm of the difference of two states over that of the change, rounding of the state itself left out."""
    largest = 0.0
    for name in ("parameters", "buffers", "momentum"):
        old, one, other = (_flat(getattr(state, name)) for state in (before, alone, together))
        if not len(one):
            continue
        change = torch.linalg.vector_norm(one - old if len(old) else one)
        rounding = 4 * torch.finfo(next(iter(alone.parameters.values())).dtype).eps * torch.linalg.vector_norm(one)
        difference = torch.linalg.vector_norm(one - other) - rounding
        if difference > 0:
            largest = max(largest, float(difference / change))
    return largest


def _flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()] or [torch.empty(0)])


def difference_over_spread(one: np.ndarray, other: np.ndarray, shares: Iterable[Sequence[np.ndarray]]) -> float:
    """How far two results of the same retraining lie apart, compared with how far different retrainings do.

    Args:
        one: (evaluation examples,) measurements.
        other: the same of the other.
        shares: measurements of the retrainings of each drop share, two or more each.

    Returns:
        The root mean square of their difference over evaluation examples, divided by that of the standard deviation
        between retrainings, for the share in which retrainings differ least.
    """
    spread = min(float(np.sqrt(np.var(np.stack(list(share)), axis=0, ddof=1).mean())) for share in shares)
    difference = float(np.sqrt(np.mean((one - other) ** 2)))
    if difference == 0:
        return 0.0
    return difference / spread if spread > 0 else float("inf")
