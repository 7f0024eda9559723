"""Is what the replay pulls back the derivative of what was trained? Held against finite differences, in float64.

Reverse accumulation trusts the backward pass of every operation. One that is not the derivative of its forward pass (a
gradient reversal, a ``detach`` in the model, a ``torch.no_grad`` block) trains as written, and a replay would give
scores of another training. A finite difference of the step itself knows nothing of backward passes' derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call

from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import NumericalError, ReplayError, TrackedReplayError
from tracked_replay.replay.adjoint import Cotangent, StepAdjoint, measurement_cotangent
from tracked_replay.replay.targets import Target
from tracked_replay.tasks import TaskData
from tracked_replay.training import TrainingSetup
from tracked_replay.training.loop import measured
from tracked_replay.training.state import State, Tensors

EXAMPLES = 16  # of the batch, and of a target: operations are checked, not their sizes
COTANGENTS = 4
# Of the points of a difference, in units of a tensor's root mean square, try after try. A kink (ReLU, maximum pooling)
# between two points spoils a try; where the gradient hardly changes, rounding spoils it the nearer they are.
DISTANCES = (1e-7, 1e-6, 1e-8)
RATE = 1e6  # learning rate of the checked step: what it adds to the parameters must not drown in them
TOLERANCE = 1e-5  # relative; differences are good to some 1e-7
STEADY = 2e-6  # relative difference of two differences, below which they say something


class DerivativeCheck(NamedTuple):
    """What finite differences said.

    Attributes:
        deviation: largest relative deviation of the replay's derivatives; ``None`` where they say nothing.
        why: then, the reason.
    """

    deviation: float | None
    why: str = ""


def check_derivatives(setup: TrainingSetup, before: State, final: State, targets: Sequence[Target]) -> DerivativeCheck:
    """Hold the adjoint of a step, and the derivative of a measurement, against finite differences.

    Args:
        setup: of the recorded run; its config is one without clipping.
        before: a state that a step starts from.
        final: the state after the last step.
        targets: the first is taken, or the first examples of a mean.

    Raises:
        ReplayError: a derivative is another one.
    """
    try:
        setup64, adjoint = _in_float64(setup)
        before64, final64 = _double(before), _double(final)
        attempts = {
            f"step {before.step}": partial(_step, setup64, adjoint, before64, of_statistics=False),
            f"measurement of target {targets[0].name}": partial(_measurement, setup64, adjoint, final64, targets[0]),
        }
        if adjoint.model.statistics:
            what = f"running statistics after step {before.step}"
            attempts[what] = partial(_step, setup64, adjoint, before64, of_statistics=True)
        deviations = [_compared(attempt, what) for what, attempt in attempts.items()]
    except NumericalError as error:
        return DerivativeCheck(None, str(error))
    except TrackedReplayError:
        raise
    except RuntimeError as error:  # a model that makes float32 tensors of its own
        return DerivativeCheck(None, f"the model does not run in float64: {' '.join(str(error).split())[:200]}")
    known = [deviation for deviation in deviations if deviation is not None]
    if len(known) < len(deviations):
        return DerivativeCheck(None, "two differences of one derivative differ")
    return DerivativeCheck(max(known))


def _in_float64(setup: TrainingSetup) -> tuple[TrainingSetup, StepAdjoint]:
    data: TaskData = copy.copy(setup.data)
    data.dtype = torch.float64
    step = replace(setup.step, model=copy.deepcopy(setup.step.model).double())
    return replace(setup, data=data, step=step), StepAdjoint(step, setup.config.replay)


def _double(state: State) -> State:
    def convert(tensors: Tensors) -> Tensors:
        # By name: a file gives its tensors in any order, and random numbers are drawn for one after the other.
        return {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in sorted(tensors.items())
        }

    return replace(
        state,
        parameters=convert(state.parameters),
        buffers=convert(state.buffers),
        momentum=convert(state.momentum),
    )


class _Attempt(NamedTuple):
    """Two finite differences and the derivative along one direction: each (cotangents,)."""

    near: np.ndarray
    far: np.ndarray
    derivative: np.ndarray


def _compared(attempt: Callable[[float], _Attempt], what: str) -> float | None:
    """The relative deviation in the first try whose two differences agree; ``None`` if there is none.

    Raises:
        ReplayError: the derivative is another one than such a try's difference.
    """
    for distance in DISTANCES:
        near, far, derivative = attempt(distance)
        size, other = float(np.linalg.norm(near)), float(np.linalg.norm(derivative))
        if not size and not other:
            return 0.0
        # Nothing but zeros: the points are nearer than the model's own rounding.
        if not size or float(np.linalg.norm(near - far)) > STEADY * size:
            continue
        deviation = float(np.linalg.norm(derivative - near)) / size
        if deviation > TOLERANCE:
            raise ReplayError(
                f"{what}: its derivative and a finite difference of it are {deviation:.2g} of themselves apart, so "
                f"scores would be wrong; known to do so: detach, torch.no_grad, or an autograd function whose backward "
                f"is not the derivative of its forward; allowed: operations that autograd differentiates as they are"
            )
        return deviation
    return None


def _step(
    setup: TrainingSetup, adjoint: StepAdjoint, before: State, distance: float, *, of_statistics: bool
) -> _Attempt:
    """Of the parameters, or the running statistics, after a step."""
    t = before.step
    batch = setup.data.batch(torch.from_numpy(setup.plan.indices[t][:EXAMPLES]), int(setup.plan.epochs[t]))
    rates = [RATE] * len(setup.step.groups)
    generator = _generator(setup, distance)
    ones = torch.ones(len(batch.labels), dtype=torch.float64, device=setup.device)
    statistics = {name: before.buffers[name] for name in adjoint.model.statistics}
    cotangents = [
        Cotangent(
            _zeros(before.parameters) if of_statistics else _random(before.parameters, generator),
            _random(statistics, generator) if of_statistics else _zeros(statistics),
            {},
        )
        for _ in range(COTANGENTS)
    ]
    along = _scaled(before.parameters, generator)
    shift = _scaled(statistics, generator)
    if not of_statistics:
        along = _across(along, [one.parameters for one in cotangents])
    weighting = _random({"weights": ones}, generator)["weights"]

    def after(place: float) -> State:
        buffers = {**before.buffers, **_moved(statistics, shift, place)}
        moved = replace(before, parameters=_moved(before.parameters, along, place), buffers=buffers)
        return setup.step(moved, batch.inputs, batch.labels, rates, ones + place * weighting).state

    def difference(place: float) -> np.ndarray:
        one, other = after(place), after(-place)
        parameters = _less(one.parameters, other.parameters)
        updated = {name: one.buffers[name] - other.buffers[name] for name in statistics}
        changes = [_dot(given.parameters, parameters) + _dot(given.statistics, updated) for given in cotangents]
        return np.array(changes) / (2 * place)

    found, scores = adjoint.pull_back(before, after(0.0), batch.inputs, batch.labels, rates, cotangents)
    derivative = [
        _dot(one.parameters, along) + _dot(one.statistics, shift) + float(score @ weighting)
        for one, score in zip(found, scores, strict=True)
    ]
    return _Attempt(difference(distance), difference(2 * distance), np.array(derivative))


def _measurement(setup: TrainingSetup, adjoint: StepAdjoint, final: State, target: Target, distance: float) -> _Attempt:
    """Of a target's measurement, or of that of its first examples."""
    target = Target.mean(list(target.indices[:EXAMPLES]), target.name)
    along = _scaled(final.parameters, _generator(setup, distance))
    batch = setup.data.evaluation_batch(torch.tensor(target.indices))

    @torch.no_grad()
    def value(place: float) -> float:
        tensors = {**final.buffers, **_moved(final.parameters, along, place)}
        outputs = functional_call(setup.step.model.eval(), tensors, (batch.inputs,))
        return float(measured(setup.task, outputs, batch.labels).mean())

    def difference(place: float) -> np.ndarray:
        return np.array([(value(place) - value(-place)) / (2 * place)])

    cotangent = measurement_cotangent(adjoint, setup.task, setup.data, final, target)
    derivative = np.array([_dot(cotangent.parameters, along)])
    return _Attempt(difference(distance), difference(2 * distance), derivative)


def _generator(setup: TrainingSetup, distance: float) -> torch.Generator:
    return torch.Generator().manual_seed(derive_component_seed(setup.config.seed, "derivative check", f"{distance:g}"))


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _random(tensors: Tensors, generator: torch.Generator) -> Tensors:
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        for name, tensor in tensors.items()
    }


def _scaled(tensors: Tensors, generator: torch.Generator) -> Tensors:
    """Random directions as large as the tensors; along one that is 0, of size 0.01."""
    sizes = {name: float(tensor.square().mean().sqrt()) or 0.01 for name, tensor in tensors.items()}
    return {name: sizes[name] * tensor for name, tensor in _random(tensors, generator).items()}


def _across(direction: Tensors, others: Sequence[Tensors]) -> Tensors:
    """What of a direction is at right angles to others, tensor by tensor: a step passes the parameters on as they are,
    and that would hide the rest."""
    found = {}
    for name, tensor in direction.items():
        basis, _ = torch.linalg.qr(torch.stack([other[name].flatten() for other in others], dim=1))
        flat = tensor.flatten()
        found[name] = (flat - basis @ (basis.mT @ flat)).view_as(tensor)
    return found


def _moved(tensors: Tensors, direction: Tensors, distance: float) -> Tensors:
    return {name: tensor + distance * direction[name] for name, tensor in tensors.items()}


def _less(one: Tensors, other: Tensors) -> Tensors:
    return {name: tensor - other[name] for name, tensor in one.items()}


def _dot(one: Tensors, other: Tensors) -> float:
    return sum(float((tensor * other[name]).sum()) for name, tensor in one.items())
