"""THE step: the only function of the package that advances a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.sgd import sgd

from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import NumericalError, TrackedReplayError
from tracked_replay.training.groups import ParameterGroup
from tracked_replay.training.state import State, Tensors

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]


class StepResult(NamedTuple):
    """The state after a step, and the batch's weighted mean loss before it (a scalar tensor)."""

    state: State
    loss: Tensor


@dataclass(frozen=True)
class TrainingStep:
    """``step(state, inputs, labels, learning_rates, weights)``: one step of SGD as a pure function.

    For weights w and per-example losses ℓ, the loss is ``(1/B) Σ wᵢ ℓᵢ`` with the fixed denominator B, the batch's
    size: weight 0 removes an example and changes nothing else. The update is torch's own functional SGD, so it is
    bitwise that of ``torch.optim.SGD`` on the same gradients.

    Before the forward pass torch's generators are seeded from ``(seed, "step", t)``, so a layer that draws random
    numbers (dropout) draws the same ones whenever step t is taken.

    Attributes:
        model: structure only; its own tensors are never read or changed.
        per_example_loss: ``(outputs, labels) -> (B,)``.
        groups: parameter groups, in the order of ``learning_rates``.
        seed: master seed.
    """

    model: nn.Module
    per_example_loss: PerExampleLoss
    groups: tuple[ParameterGroup, ...]
    seed: int

    def __call__(
        self,
        state: State,
        inputs: Tensor,
        labels: Tensor,
        learning_rates: Sequence[float],
        weights: Tensor | None = None,
    ) -> StepResult:
        """Take step ``state.step``.

        Args:
            state: where the step starts; it is not changed.
            inputs: model inputs, (B, ...).
            labels: (B,).
            learning_rates: one a parameter group.
            weights: (B,); ``None`` means all 1.

        Raises:
            NumericalError: NaN or Inf in loss, gradient or parameter; names step and tensor.
            TrackedReplayError: a parameter does not take part in the loss.
        """
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
        buffers = {name: tensor.clone() for name, tensor in state.buffers.items()}  # BatchNorm updates them in place
        seed_step(self.seed, state.step)
        self.model.train()
        loss = self._loss(parameters, buffers, inputs, labels, weights)
        gradients = gradient(loss.sum() if loss.ndim else loss, parameters)
        after = self._update(state, buffers, gradients, learning_rates)
        _require_finite(state.step, loss.detach(), gradients, after)
        return StepResult(after, loss.detach())

    def _loss(
        self, parameters: Tensors, buffers: Tensors, inputs: Tensor, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        outputs = functional_call(self.model, {**parameters, **buffers}, (inputs,))
        return weighted_loss(self.per_example_loss(outputs, labels), len(labels), weights)

    def _update(self, state: State, buffers: Tensors, gradients: Tensors, learning_rates: Sequence[float]) -> State:
        parameters = {name: tensor.clone() for name, tensor in state.parameters.items()}
        momentum: Tensors = {}
        for group, lr in zip(self.groups, learning_rates, strict=True):
            old = [state.momentum.get(name) for name in group.parameters]
            new = [None if buffer is None else buffer.clone() for buffer in old]
            sgd(
                [parameters[name] for name in group.parameters],
                [gradients[name] for name in group.parameters],
                new,
                lr=float(lr),
                maximize=False,
                **group.sgd_arguments,
            )
            if group.momentum:
                made = zip(group.parameters, new, strict=True)
                momentum |= {name: buffer for name, buffer in made if buffer is not None}
        return State(state.step + 1, parameters, buffers, momentum)


class BatchedStep(TrainingStep):
    """The same step of K models at once: all see one batch, each with weights of its own.

    Every tensor of the states has the model as its first dimension, (K, ...); weights are (K, B), the loss is (K,).
    Only the forward pass knows of it: the gradient of the summed losses is each model's own, and SGD goes by elements.
    Layers that draw random numbers draw those of a step alone, the same ones for every model.
    """

    def _loss(
        self, parameters: Tensors, buffers: Tensors, inputs: Tensor, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        dimensions = (0, 0, None, None, None if weights is None else 0)
        together = torch.vmap(super()._loss, in_dims=dimensions, randomness="same")
        return together(parameters, buffers, inputs, labels, weights)


def seed_step(master_seed: int, step: int) -> None:
    """Seed torch's generators for the forward pass of a step."""
    torch.manual_seed(derive_component_seed(master_seed, "step", step))


def weighted_loss(losses: Tensor, batch: int, weights: Tensor | None = None) -> Tensor:
    """``(1/B) Σ wᵢ ℓᵢ`` for losses and weights of shape (B,); multiplying by weight 1 is exact.

    Raises:
        TrackedReplayError: the losses are not one an example; broadcasting would train on another loss silently.
    """
    if losses.shape != (batch,):
        raise TrackedReplayError(
            f"the task's per_example_loss: found shape {tuple(losses.shape)}; allowed: ({batch},), one loss an example"
        )
    return (losses if weights is None else losses * weights).sum() / batch


def gradient(loss: Tensor, parameters: Tensors, *, create_graph: bool = False) -> Tensors:
    """Gradient of a scalar with respect to each named parameter.

    Raises:
        TrackedReplayError: a parameter does not take part in the loss (``torch.optim`` would skip it silently).
    """
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    unused = [name for name, tensor in zip(parameters, found, strict=True) if tensor is None]
    if unused:
        raise TrackedReplayError(
            f"the loss does not depend on the parameter {unused[0]!r}; freeze it with requires_grad_(False) or use it"
        )
    return dict(zip(parameters, found, strict=True))


def _require_finite(step: int, loss: Tensor, gradients: Tensors, after: State) -> None:
    # One norm over everything is cheap; only when it is not finite is the first bad tensor searched for. (A norm can
    # also overflow on finite values; then the search finds nothing and the step stands.)
    values = [loss, *gradients.values(), *after.parameters.values()]
    if torch.isfinite(torch.nn.utils.get_total_norm(values)):
        return
    bad = loss[~torch.isfinite(loss)]
    if len(bad):
        raise NumericalError(f"step {step}: the loss is {bad[0].item()}; lower train.lr or look at the batch's data")
    for kind, tensors in (("gradient", gradients), ("parameter", after.parameters)):
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"step {step}: the {kind} {name!r} holds NaN or Inf; lower train.lr")
