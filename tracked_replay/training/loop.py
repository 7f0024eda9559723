"""From a config to a plan of steps, and the loop that takes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tracked_replay.config import Config
from tracked_replay.determinism import (
    DeterministicSampler,
    SeedDerivations,
    capture_generator_states,
    create_deterministic_model,
    restore_generator_states,
    set_global_deterministic_state,
)
from tracked_replay.errors import ConfigError, NumericalError, TaskError
from tracked_replay.tasks import Batch, Task, TaskData
from tracked_replay.training.groups import parameter_groups
from tracked_replay.training.schedule import SHARED_INSTANCE, learning_rates
from tracked_replay.training.state import State, Tensors, initial_state
from tracked_replay.training.step import StepResult, TrainingStep

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class TrainingPlan:
    """What every step uses, decided before the first.

    Attributes:
        indices: (steps, batch) int64, training examples of each step in their order.
        epochs: (steps,) int64.
        learning_rates: (steps, groups) float64.
    """

    indices: np.ndarray
    epochs: np.ndarray
    learning_rates: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.epochs)


@dataclass(frozen=True)
class TrainingSetup:
    """All that a training needs; made the same way for training, retraining, recomputation and replay."""

    config: Config
    task: Task
    data: TaskData
    step: TrainingStep
    plan: TrainingPlan
    initial: State
    seeds: SeedDerivations
    device: torch.device

    def batch(self, t: int) -> Batch:
        """The batch of step ``t``, as every taking of that step sees it."""
        return self.data.batch(torch.from_numpy(self.plan.indices[t]), int(self.plan.epochs[t]))

    def take(self, state: State, weights: Tensor | None = None) -> tuple[StepResult, Batch]:
        """Take step ``state.step`` of the plan.

        Args:
            state: on the setup's device.
            weights: weight of every training example, (training examples,), or (K, training examples) for a
                :class:`BatchedStep`; ``None`` means all 1.

        Returns:
            The next state with the loss, and the batch that the step saw.
        """
        t = state.step
        batch = self.batch(t)
        chosen = None if weights is None else weights[..., batch.indices.to(weights.device)]
        # A model may change its inputs in place, and what it saw is recorded afterwards.
        inputs = batch.inputs.clone() if self.config.record.pixels else batch.inputs
        return self.step(state, inputs, batch.labels, self.plan.learning_rates[t].tolist(), chosen), batch


class StepRecord(NamedTuple):
    """One step as it was taken.

    Attributes:
        before: the state it started from.
        after: the state it led to.
        epoch: epoch it belongs to.
        indices: (B,) int64.
        inputs: (B, ...) model inputs, on the setup's device.
        labels: (B,) int64.
        learning_rates: (groups,) float64.
        loss: weighted mean loss of the batch in ``before``.
    """

    before: State
    after: State
    epoch: int
    indices: np.ndarray
    inputs: Tensor
    labels: np.ndarray
    learning_rates: np.ndarray
    loss: float


def set_up(config: Config, task: Task, data: TaskData | None = None) -> TrainingSetup:
    """Pin the process as far as ``train.reproducibility`` says, make the initial state and the plan.

    Args:
        config: resolved config.
        task: the task that the config names.
        data: its data, where they are loaded already.

    Raises:
        ConfigError: the device is not there, or a batch is larger than the training set.
    """
    device = _device(config)
    set_global_deterministic_state(config.seed, config.train.threads, config.train.reproducibility)
    data = (data or TaskData(task, config)).to(device)
    seeds = SeedDerivations(config.seed)
    seeds.derive("model", SHARED_INSTANCE)
    model = create_deterministic_model(config.seed, task.model, SHARED_INSTANCE)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"data.task: the task's model() must return a torch.nn.Module; found {type(model).__name__}")
    model = model.to(device=device, dtype=getattr(torch, config.train.dtype))
    initial = initial_state(model)
    groups = parameter_groups(config, initial)
    plan = _plan(config, data.num_train, seeds, groups)
    step = TrainingStep(model, task.per_example_loss, groups, config.seed)
    return TrainingSetup(config, task, data, step, plan, initial, seeds, device)


def require_functional(setup: TrainingSetup) -> None:
    """Refuse a model that a step, which is given the tensors of the state, would not train as its author means.

    The task must make the same model twice. Hooks on the model's own parameters are looked for: a step has other
    tensors, and never calls them. The first step is taken without backward hooks of modules, which may look at
    gradients and not change them: the replay takes them for those of the loss. Then it is taken with NaN in the model's
    own tensors, which no step may read.

    Activation checkpointing does read them: it computes forward passes again in the backward pass, when the state's
    tensors are gone from the model. The generators are left as they were.

    Raises:
        TaskError: there is a hook on a parameter, or the step is not always the one that it was first.
        NumericalError: the first step is not finite at all.
    """
    model = setup.step.model
    _require_repeatable_model(setup)
    _require_no_parameter_hooks(model, setup.task)
    # Before the first call: torch leaves the state's tensors in a layer that stands under two names.
    states = {tensor.data_ptr() for tensor in setup.initial.flat().values()}
    own = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    own = [tensor for tensor in own if tensor.data_ptr() not in states]
    generators = capture_generator_states()
    before = {name: tensor.clone() for name, tensor in setup.initial.flat().items()}
    expected = setup.take(setup.initial)[0].state.flat()
    restore_generator_states(generators)
    for name, tensor in setup.initial.flat().items():
        if not _same_bits(tensor, before[name]):
            raise TaskError(
                f"the model of the task {setup.task.name} changes its tensor {name.partition('/')[2]!r} in place in a "
                f"step, so the step is no function of the state; allowed: changes by the optimizer, and buffers"
            )
    _require_unchanged_gradients(setup, expected)
    restore_generator_states(generators)
    kept = [tensor.detach().clone() for tensor in own]
    try:
        with torch.no_grad():
            for tensor in own:
                tensor.fill_(math.nan)
        found = _first_step(setup)
    finally:
        with torch.no_grad():
            for tensor, values in zip(own, kept, strict=True):
                tensor.copy_(values)
        restore_generator_states(generators)
    if not _same_tensors(found, expected):
        again = _first_step(setup)
        restore_generator_states(generators)
        if not _same_tensors(again, expected):
            raise TaskError(
                f"the model of the task {setup.task.name} keeps something between two steps that is not in its state "
                f"(a counter, an average, a generator of its own): a step taken twice gives two results; allowed: "
                f"parameters and buffers"
            )
        raise TaskError(
            f"the model of the task {setup.task.name} reads its own tensors in a step, and not those of the state, so "
            f"it would not be trained by SGD; known to do so: torch.utils.checkpoint; allowed: the model without it"
        )


def _require_repeatable_model(setup: TrainingSetup) -> None:
    """Retrainings start from a model that is made anew."""
    again = create_deterministic_model(setup.config.seed, setup.task.model, SHARED_INSTANCE)
    found, expected = initial_state(again.to(setup.device, setup.data.dtype)).flat(), setup.initial.flat()
    if not _same_tensors(found, expected):
        names = [name for name in expected if name not in found or not _same_bits(found[name], expected[name])]
        raise TaskError(
            f"{setup.task.name}.model: two calls gave two models (first difference: {names[0] if names else 'names'}), "
            f"so no retraining would start where the training did; allowed: random numbers of Python's, NumPy's and "
            f"torch's global generators, which are seeded before each call"
        )


def _require_no_parameter_hooks(model: nn.Module, task: Task) -> None:
    for name, parameter in model.named_parameters():
        # torch has no public way to ask a tensor for its hooks. A gradient is all that they are called with.
        hooks = {
            "register_hook": parameter._backward_hooks,
            "register_post_accumulate_grad_hook": parameter._post_accumulate_grad_hooks,
        }
        found = [kind for kind, registered in hooks.items() if registered]
        if found and parameter.requires_grad:
            raise TaskError(
                f"the model of the task {task.name}: found a hook ({found[0]}) at the parameter {name!r}, which no "
                f"step would call; allowed: hooks of modules, and none of parameters"
            )


def _require_unchanged_gradients(setup: TrainingSetup, expected: Tensors) -> None:
    modules = list(setup.step.model.modules())
    # torch has no public way to take off a hook without the handle that its author got.
    all_hooks = [hooks for module in modules for hooks in (module._backward_hooks, module._backward_pre_hooks) if hooks]
    if not all_hooks:
        return
    kept = [dict(hooks) for hooks in all_hooks]
    try:
        for hooks in all_hooks:
            hooks.clear()
        found = _first_step(setup)
    finally:
        for hooks, known in zip(all_hooks, kept, strict=True):
            hooks.update(known)
    if not _same_tensors(found, expected):
        raise TaskError(
            f"the model of the task {setup.task.name}: found a backward hook of a module that changes a gradient, so "
            f"it would not be trained by SGD on its loss; allowed: backward hooks that look at gradients only"
        )


def _same_tensors(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(_same_bits(found[name], expected[name]) for name in expected)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _first_step(setup: TrainingSetup) -> Tensors:
    """The state after it; nothing where it is not finite."""
    try:
        return setup.take(setup.initial)[0].state.flat()
    except NumericalError:
        return {}


def _device(config: Config) -> torch.device:
    device = torch.device(config.train.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device: found {config.train.device!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices here; allowed: cpu, or a device that is there"
        )
    return device


def _plan(config: Config, num_train: int, seeds: SeedDerivations, groups: tuple) -> TrainingPlan:
    batch = config.train.batch_size
    per_epoch = num_train // batch
    if per_epoch == 0:
        raise ConfigError(
            f"train.batch_size: found {batch}, which is more than the {num_train} training examples; "
            f"allowed: integer >= 1 and <= {num_train}"
        )
    sampler = DeterministicSampler(num_train, seeds.derive("dataloader", SHARED_INSTANCE))
    orders = [sampler.order(epoch)[: per_epoch * batch].numpy() for epoch in range(config.train.epochs)]
    for component in ("optimizer", "scheduler"):
        seeds.derive(component, SHARED_INSTANCE)
    if config.data.augmentation != "none":
        for epoch in range(config.train.epochs):
            seeds.derive("augmentation", epoch)
    for epoch in range(config.train.epochs):
        seeds.derive("evaluation", epoch)
    for step in range(config.train.epochs * per_epoch):
        seeds.derive("step", step)
    return TrainingPlan(
        indices=np.concatenate(orders).reshape(-1, batch),
        epochs=np.repeat(np.arange(config.train.epochs), per_epoch),
        learning_rates=learning_rates(config, groups, per_epoch),
    )


def train(
    setup: TrainingSetup, *, start: State | None = None, stop: int | None = None, weights: Tensor | None = None
) -> Iterator[StepRecord]:
    """Take the steps of the plan, one record a step.

    Args:
        setup: from :func:`set_up`.
        start: state to go on from; the initial state where it is ``None``.
        stop: step to stop before; the end of the plan where it is ``None``.
        weights: weight of every training example, (training examples,); ``None`` means all 1.

    Raises:
        NumericalError: NaN or Inf; names step and tensor.
    """
    state = start or setup.initial
    plan = setup.plan
    for t in range(state.step, plan.steps if stop is None else stop):
        (after, loss), batch = setup.take(state, weights)
        yield StepRecord(
            before=state,
            after=after,
            epoch=int(plan.epochs[t]),
            indices=plan.indices[t],
            inputs=batch.inputs,
            labels=batch.labels.cpu().numpy(),
            learning_rates=plan.learning_rates[t],
            loss=loss.item(),
        )
        state = after


class Evaluation(NamedTuple):
    """A state's values on the evaluation set.

    Attributes:
        measurements: (evaluation examples,) float64, the task's measurement of each.
        predictions: (evaluation examples,) int64 class with the largest output, or ``None`` where outputs are not
            one value a class.
    """

    measurements: np.ndarray
    predictions: np.ndarray | None

    def accuracy(self, labels: Tensor) -> float | None:
        """Share of predictions equal to the labels, (evaluation examples,)."""
        if self.predictions is None:
            return None
        return float((self.predictions == labels.cpu().numpy()).mean())


def measured(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The task's measurement of a batch, (B,). Raises TaskError for any other shape."""
    values = task.measurement(outputs, labels)
    if values.shape != labels.shape:
        raise TaskError(
            f"{task.name}.measurement: found shape {tuple(values.shape)}; allowed: {tuple(labels.shape)}, one value an "
            f"example"
        )
    return values


@torch.no_grad()
def evaluate(setup: TrainingSetup, state: State) -> Evaluation:
    """Measure every evaluation example in eval mode."""
    model = setup.step.model.eval()
    measurements, predictions = [], []
    for indices in torch.arange(setup.data.num_evaluation).split(EVALUATION_BATCH):
        batch = setup.data.evaluation_batch(indices)
        outputs = functional_call(model, state.model_tensors, (batch.inputs,))
        measurements.append(measured(setup.task, outputs, batch.labels).double().cpu().numpy())
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            predictions.append(outputs.argmax(1).cpu().numpy())
    return Evaluation(np.concatenate(measurements), np.concatenate(predictions) if predictions else None)
