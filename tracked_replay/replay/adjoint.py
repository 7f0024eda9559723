"""The adjoint of one training step, and of the measurement that the replay starts from.

Notation as in docs/how-it-works.md: λ are cotangents (the derivative of the measurement φ with respect to a state's
tensors), θ parameters, v momentum, b running statistics, w example weights, q = ∂φ/∂g for the step's gradient g.
Sources: reverse accumulation through the training, "replay", is Engstrom et al., "Optimizing ML Training with
Metagradient Descent" (2025), section 2; its use for data attribution, MAGIC, is Ilyas and Engstrom, "MAGIC:
Near-Optimal Data Attribution for Deep Learning" (2025).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from tracked_replay.config import ReplayConfig
from tracked_replay.errors import NumericalError, ReplayError, TaskError, TrackedReplayError
from tracked_replay.replay.differentiable import DifferentiableModel
from tracked_replay.replay.targets import Target
from tracked_replay.tasks import Task, TaskData
from tracked_replay.training.groups import ParameterGroup
from tracked_replay.training.loop import measured
from tracked_replay.training.state import State, Tensors
from tracked_replay.training.step import TrainingStep, gradient, seed_step, weighted_loss

logger = logging.getLogger(__name__)

MEASUREMENT_BATCH = 500
TARGETS_AT_ONCE = 8  # where the config leaves it open and the activations are small
SMALL_ACTIVATION = 2_000_000  # bytes; the calls of larger ones keep the cores busy without others beside them
NO_RULE = "There is a performance drop"  # how torch's warning begins: one at a time would be as fast


@dataclass(frozen=True)
class Cotangent:
    """∂φ/∂state, tensor by tensor.

    Attributes:
        parameters: λθ.
        statistics: λb of the running statistics; counters and constants have none.
        momentum: λv; empty where the state has no momentum yet.
    """

    parameters: Tensors
    statistics: Tensors
    momentum: Tensors

    @classmethod
    def stacked(cls, cotangents: Sequence[Cotangent]) -> Cotangent:
        """Those of several targets as one, with one more dimension in front of every tensor."""
        return cls(*(_stacked([getattr(one, kind.name) for one in cotangents]) for kind in fields(cls)))

    def unstacked(self, count: int) -> list[Cotangent]:
        """The other way."""
        kinds = [getattr(self, kind.name) for kind in fields(self)]
        return [
            Cotangent(*({name: tensor[place] for name, tensor in kind.items()} for kind in kinds))
            for place in range(count)
        ]


def _stacked(parts: Sequence[Tensors]) -> Tensors:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


@dataclass
class ClipCounts:
    """How often the clipping options changed the replay: numbers of steps."""

    gradient_clipped: int = 0
    parameters_clipped: int = 0
    parameter_warnings: int = 0
    changed: int = 0


class Linearisation(Protocol):
    """A step as a linear function of small changes to what it starts from; its adjoint can be taken."""

    @property
    def updated(self) -> Collection[str]:
        """Names of the running statistics that the step changes."""

    @property
    def loss(self) -> Tensor:
        """Of the batch, a scalar; may be known only after the first pull."""

    def pull(self, tangents: Sequence[Tensor], count: int, retain: bool) -> Sequence[Tensor]:
        """What reaches parameters, running statistics and example weights.

        Args:
            tangents: cotangents of the gradients and of the updated statistics; of several targets with one more
                dimension in front.
            count: of targets.
            retain: whether more will be pulled.
        """


@dataclass
class GradientGraph:
    """The gradient graph of a step, built by autograd.

    Attributes:
        loss: of the batch, a scalar.
        gradients: of the parameters, differentiable.
        updated: the running statistics that the step changes, as they are after it, differentiable.
        sources: parameters, all running statistics, and example weights.
    """

    loss: Tensor
    gradients: Tensors
    updated: Tensors
    sources: Sequence[Tensor]

    def pull(self, tangents: Sequence[Tensor], count: int, retain: bool) -> Sequence[Tensor]:
        """As in :class:`Linearisation`; raises what a layer without a rule for several targets raises."""
        outputs = [*self.gradients.values(), *self.updated.values()]

        def pull(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                outputs, self.sources, given, retain_graph=retain, allow_unused=True, materialize_grads=True
            )

        return pull(tangents) if count == 1 else torch.vmap(pull)(tangents)


@dataclass
class StepAdjoint:
    """Pulls cotangents of the state after a step back to the state before it, and gives the example scores.

    Attributes:
        step: the training step it is the adjoint of.
        model: the differentiable copy of its model.
        config: clipping options; all off by default, and then the adjoint is exact.
        clips: what clipping did so far.
        together: how many targets go through the gradient graph at once; ``None`` before the first step.
    """

    step: TrainingStep
    config: ReplayConfig = field(default_factory=ReplayConfig)
    clips: ClipCounts = field(default_factory=ClipCounts)
    together: int | None = None

    def __post_init__(self) -> None:
        self._tried = False  # whether several at once have worked
        # Only clipping reads the gradient itself; all else needs what it depends on.
        self.model = DifferentiableModel(self.step.model, gradient_is_read=self.config.clip_gradient)

    def pull_back(
        self,
        before: State,
        after: State,
        inputs: Tensor,
        labels: Tensor,
        learning_rates: Sequence[float],
        cotangents: Sequence[Cotangent],
        recorded_loss: float | None = None,
    ) -> tuple[list[Cotangent], Tensor]:
        """The adjoint of step ``before.step``, for any number of targets on one retained gradient graph.

        Args:
            before: the state the step started from; the point of linearisation.
            after: the state it led to.
            inputs: model inputs of the batch, (B, ...).
            labels: (B,).
            learning_rates: one a parameter group.
            cotangents: ∂φ/∂after, one a target.
            recorded_loss: the loss of the step as it was trained, which the differentiated function must give too.

        Returns:
            ∂φ/∂before, one a target, and ∂φ/∂w at w = 1 as a (targets, B) tensor.

        Raises:
            ReplayError: a layer changes a buffer and has no adjoint, or the differentiated function is another.
            NumericalError: NaN or Inf in a cotangent.
        """
        self._require_known_buffers(before, after)
        graph = self.graph(before.parameters, before.buffers, inputs, labels, lambda: self._seed(before.step))
        gradient_scale = self._gradient_scale(graph.gradients)
        return self._pull_through(graph, before, after, learning_rates, cotangents, recorded_loss, gradient_scale)

    def graph(
        self,
        parameters: Tensors,
        buffers: Tensors,
        inputs: Tensor,
        labels: Tensor,
        seed: Callable[[], None] | None,
    ) -> GradientGraph:
        """Linearise a step.

        Args:
            parameters: before the step.
            buffers: before the step.
            inputs: model inputs of the batch, (B, ...).
            labels: (B,).
            seed: see :meth:`DifferentiableModel.training_outputs`.
        """
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        statistics = {name: buffers[name].detach().requires_grad_() for name in self.model.statistics}
        weights = torch.ones(len(labels), dtype=inputs.dtype, device=inputs.device, requires_grad=True)
        outputs = self.model.training_outputs({**buffers, **parameters, **statistics}, inputs, seed)
        loss = weighted_loss(self.step.per_example_loss(outputs, labels), len(labels), weights)
        updated = self.model.updated_statistics()
        gradients = gradient(loss, parameters, create_graph=True)
        return GradientGraph(loss, gradients, updated, [*parameters.values(), *statistics.values(), weights])

    def _seed(self, step: int) -> None:
        seed_step(self.step.seed, step)

    def _pull_through(
        self,
        graph: Linearisation,
        before: State,
        after: State,
        learning_rates: Sequence[float],
        cotangents: Sequence[Cotangent],
        recorded_loss: float | None,
        gradient_scale: float = 1.0,
    ) -> tuple[list[Cotangent], Tensor]:
        """As :meth:`pull_back`, through a linearisation of the step's gradient."""
        statistics = self.model.statistics
        _require_carried(before, after, [name for name in statistics if name not in graph.updated])
        parameter_scales = self._parameter_scales(after)
        self.clips.changed += gradient_scale < 1 or bool(parameter_scales)
        results: list[Cotangent] = []
        scores: list[Tensor] = []
        while len(results) < len(cotangents):
            chosen = cotangents[len(results) :][: self._at_once()]
            given = chosen[0] if len(chosen) == 1 else Cotangent.stacked(chosen)
            passed, momentum, q = self._through_optimizer(before, learning_rates, given, parameter_scales)
            tangents = [q[name] * gradient_scale if gradient_scale < 1 else q[name] for name in before.parameters]
            tangents += [given.statistics[name] for name in graph.updated]
            more = len(results) + len(chosen) < len(cotangents)
            pulled = self._pull(graph, tangents, len(chosen), more)
            if pulled is None:
                continue
            # Contiguous, whatever layout the kernels left: a cotangent that was saved and read again is so too.
            products = {name: product.contiguous() for name, product in zip(before.parameters, pulled, strict=False)}
            # What a layer that stands still in this step leaves as it was passes its cotangent on.
            carried = {name: given.statistics[name] for name in statistics if name not in graph.updated}
            reaching = zip(statistics, pulled[len(products) :], strict=False)
            result = Cotangent(
                parameters={name: passed[name] + product for name, product in products.items()},
                statistics={name: pull + carried[name] if name in carried else pull for name, pull in reaching},
                momentum=momentum,
            )
            results += [result] if len(chosen) == 1 else result.unstacked(len(chosen))
            scores += [pulled[-1]] if len(chosen) == 1 else pulled[-1].unbind()
        if recorded_loss is not None:
            _require_same_loss(before.step, graph.loss, recorded_loss)
        stacked = torch.stack(scores)
        _require_finite(before.step, stacked, results)
        return results, stacked

    def _at_once(self) -> int:
        """How many targets go through the gradient graph together, chosen once from the config and from shapes."""
        if self.together is None:
            small = self.model.largest_activation <= SMALL_ACTIVATION
            self.together = self.config.targets_at_once or (TARGETS_AT_ONCE if small else 1)
        return self.together

    def _pull(
        self, graph: Linearisation, tangents: Sequence[Tensor], count: int, retain: bool
    ) -> Sequence[Tensor] | None:
        """What ``graph`` pulls back; ``None`` where several at once cannot be had."""
        if count == 1 or self._tried:
            return graph.pull(tangents, count, retain)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=NO_RULE)
                found = graph.pull(tangents, count, retain=True)
        except TrackedReplayError:
            raise
        except Exception as error:  # of whatever kind: one that is not about several comes again with one
            self._one_at_a_time(error)
            return None
        self._tried = True
        return found

    def _one_at_a_time(self, error: Exception) -> None:
        """Settle for it; a layer has no rule for several. Raises ReplayError where the config asks for several."""
        words = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if self.config.targets_at_once:
            raise ReplayError(
                f"replay.targets_at_once: found {self.config.targets_at_once}, but a layer of the model cannot be "
                f"differentiated for several targets at once ({words}); allowed: 1, or 0 to leave the choice open"
            ) from None
        logger.info("one target at a time: a layer cannot be differentiated for several at once (%s)", words)
        self.together = 1

    def _through_optimizer(
        self, before: State, learning_rates: Sequence[float], cotangent: Cotangent, scales: dict[str, float]
    ) -> tuple[Tensors, Tensors, Tensors]:
        """The elementwise adjoint of SGD: what passes to θ directly (weight decay included), λv, and q = ∂φ/∂g."""
        passed: Tensors = {}
        momentum: Tensors = {}
        q: Tensors = {}
        for group, lr in zip(self.step.groups, learning_rates, strict=True):
            for name in group.parameters:
                incoming = cotangent.parameters[name]
                if name in scales:
                    incoming = incoming * scales[name]
                q[name], carried = _sgd_adjoint(
                    group, lr, incoming, cotangent.momentum.get(name), first=name not in before.momentum
                )
                if carried is not None:
                    momentum[name] = carried
                passed[name] = incoming + group.weight_decay * q[name] if group.weight_decay else incoming
        return passed, momentum, q

    def _gradient_scale(self, gradients: Tensors) -> float:
        if not self.config.clip_gradient:
            return 1.0
        norm = float(torch.nn.utils.get_total_norm([tensor.detach() for tensor in gradients.values()]))
        if norm <= self.config.clip_gradient_norm:
            return 1.0
        self.clips.gradient_clipped += 1
        return self.config.clip_gradient_norm / norm

    def _parameter_scales(self, after: State) -> dict[str, float]:
        if not self.config.clip_parameters:
            return {}
        norms = {name: float(tensor.norm()) for name, tensor in after.parameters.items()}
        limit = self.config.clip_parameter_norm
        self.clips.parameter_warnings += any(norm > self.config.clip_parameter_norm_warning for norm in norms.values())
        scales = {name: limit / norm for name, norm in norms.items() if norm > limit}
        self.clips.parameters_clipped += bool(scales)
        return scales

    def _require_known_buffers(self, before: State, after: State) -> None:
        known = {*self.model.statistics, *self.model.counters}
        for name, tensor in before.buffers.items():
            if name not in known and not torch.equal(tensor, after.buffers[name]):
                raise ReplayError(
                    f"step {before.step} changes the buffer {name!r}, which has no adjoint here, so scores would be "
                    f"wrong; buffers that may change: running statistics of nn.BatchNorm1d, 2d and 3d"
                )


def _require_carried(before: State, after: State, names: Sequence[str]) -> None:
    """Statistics that the differentiated step leaves alone must be those that the training left alone."""
    for name in names:
        if not torch.equal(before.buffers[name], after.buffers[name]):
            raise ReplayError(
                f"step {before.step}: the training changed the running statistics {name!r}, and the function that is "
                f"differentiated does not; allowed: layers that are in train mode in both or in neither"
            )


def _sgd_adjoint(
    group: ParameterGroup, lr: float, incoming: Tensor, momentum_cotangent: Tensor | None, *, first: bool
) -> tuple[Tensor, Tensor | None]:
    """Adjoint of torch.optim.SGD's update of one tensor.

    Forward, with g the gradient plus weight decay: ``v' = μ v + (1 − damp) g`` (``v' = g`` on the first step),
    ``d = g + μ v'`` with Nesterov, else ``v'``, and ``θ' = θ − lr · d``.

    Args:
        group: the parameter's group.
        lr: learning rate of the step.
        incoming: λθ' of the updated parameter.
        momentum_cotangent: λv' of the updated momentum; ``None`` means 0.
        first: whether the step made the momentum buffer.

    Returns:
        q = ∂φ/∂g, and λv of the momentum before the step (``None`` where there was none).
    """
    direction = incoming * -lr
    if not group.momentum:
        return direction, None
    reaching = group.momentum * direction if group.nesterov else direction
    if momentum_cotangent is not None:
        reaching = reaching + momentum_cotangent
    q = reaching if first else (1 - group.dampening) * reaching
    if group.nesterov:
        q = direction + q
    return q, None if first else group.momentum * reaching


def measurement_cotangent(adjoint: StepAdjoint, task: Task, data: TaskData, final: State, target: Target) -> Cotangent:
    """∂φ/∂final for a target, in eval mode: the running statistics are differentiated too.

    Args:
        adjoint: gives the differentiable model.
        task: defines the measurement.
        data: evaluation examples.
        final: the state after the last step.
        target: φ = Σ cⱼ · measurement(j).
    """
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in final.parameters.items()}
    statistics = {name: final.buffers[name].detach().requires_grad_() for name in adjoint.model.statistics}
    sources = [*parameters.values(), *statistics.values()]
    total = [torch.zeros_like(tensor) for tensor in sources]
    module = adjoint.model.module.eval()
    indices = torch.tensor(target.indices)
    coefficients = torch.tensor(target.coefficients, dtype=torch.float64)
    for chosen, factors in zip(indices.split(MEASUREMENT_BATCH), coefficients.split(MEASUREMENT_BATCH), strict=True):
        batch = data.evaluation_batch(chosen)
        outputs = functional_call(module, {**final.buffers, **parameters, **statistics}, (batch.inputs,))
        values = measured(task, outputs, batch.labels)
        if not values.requires_grad or not values.is_floating_point():
            raise TaskError(f"{task.name}.measurement: found values that do not depend on the model's parameters")
        factors = factors.to(device=values.device, dtype=values.dtype)
        pulled = torch.autograd.grad((values * factors).sum(), sources, allow_unused=True, materialize_grads=True)
        total = [sum_ + part for sum_, part in zip(total, pulled, strict=True)]
    count = len(parameters)
    return Cotangent(
        parameters=dict(zip(parameters, total[:count], strict=True)),
        statistics=dict(zip(statistics, total[count:], strict=True)),
        momentum={},
    )


def _require_same_loss(step: int, loss: Tensor, recorded: float) -> None:
    # Equal to rounding, which the sums over a batch bring to some thousand units in the last place at most.
    tolerance = 1e4 * torch.finfo(loss.dtype).eps * max(1.0, abs(recorded))
    if abs(loss.item() - recorded) > tolerance:
        raise ReplayError(
            f"step {step}: the function that is differentiated gives the loss {loss.item():.9g}, the training had "
            f"{recorded:.9g}; a layer of the model computes something else in its replaced form"
        )


def _require_finite(step: int, scores: Tensor, cotangents: Sequence[Cotangent]) -> None:
    norms = [torch.nn.utils.get_total_norm([*c.parameters.values(), *c.momentum.values()]) for c in cotangents]
    if all(math.isfinite(float(norm)) for norm in norms) and bool(torch.isfinite(scores).all()):
        return
    raise NumericalError(
        f"the replay of step {step} gave NaN or Inf: the training amplifies small changes beyond what floating point "
        f"holds; a smoother training (lower train.lr, larger train.batch_size) or train.dtype=float64 helps"
    )
