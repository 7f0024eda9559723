"""Cheaper scores from the same recorded run, for the same table and picture.

They answer the same question as the replay (∂measurement/∂weight), each leaving something out:

- ``tracin``: Σ over checkpoints of −1/B ⟨∇measurement, lr · ∇ℓᵢ⟩, with the learning rate of each parameter group
  (Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", 2020, equation 2, with one
  checkpoint an epoch): no momentum, no curvature.
- ``last_gradient``: the same with the last checkpoint alone.
- ``random``: numbers without meaning; what a correlation looks like by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.func import functional_call

from tracked_replay.determinism import derive_component_seed
from tracked_replay.recording import Checkpoint, Recording
from tracked_replay.replay import StepAdjoint, Target, measurement_cotangent
from tracked_replay.training import State, TrainingSetup, gradient

BATCH = 500
BASELINES = ("tracin", "last_gradient", "random")


def tracin_checkpoints(recording: Recording) -> list[Checkpoint]:
    """The last recorded state in each epoch."""
    epochs = recording.trace.epochs
    last: dict[int, Checkpoint] = {}
    for checkpoint in recording.checkpoints[:-1]:
        last[int(epochs[checkpoint.step])] = checkpoint
    return list(last.values())


def gradient_products(
    setup: TrainingSetup, state: State, targets: Sequence[Target], rates: Sequence[float] | None = None
) -> np.ndarray:
    """⟨∇ℓᵢ, ∇φ⟩ of every training example and target at one state, in eval mode.

    Per-example gradients are never formed: the derivative of ``⟨∇ Σ wᵢ ℓᵢ, ∇φ⟩`` with respect to w gives all products.
    Augmented examples are seen as in epoch 0.

    Args:
        setup: of the recorded run.
        state: where both gradients are taken.
        targets: each gives a direction ∇φ.
        rates: learning rate of each parameter group, which scales its part of the product; ``None`` means 1.

    Returns:
        (targets, training examples) float64.
    """
    adjoint = StepAdjoint(setup.step)
    cotangents = [measurement_cotangent(adjoint, setup.task, setup.data, state, target) for target in targets]
    scales = {
        name: rate
        for group, rate in zip(setup.step.groups, rates or [1.0] * len(setup.step.groups), strict=True)
        for name in group.parameters
    }
    directions = [[scales[name] * tensor for name, tensor in found.parameters.items()] for found in cotangents]
    module = adjoint.model.module.eval()
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
    products = np.empty((len(targets), setup.data.num_train))
    for indices in torch.arange(setup.data.num_train).split(BATCH):
        batch = setup.data.batch(indices, 0)
        weights = torch.ones(len(indices), dtype=batch.inputs.dtype, device=batch.inputs.device, requires_grad=True)
        outputs = functional_call(module, {**state.buffers, **parameters}, (batch.inputs,))
        loss = (setup.task.per_example_loss(outputs, batch.labels) * weights).sum()
        gradients = list(gradient(loss, parameters, create_graph=True).values())
        for row, direction in enumerate(directions):
            keep = row + 1 < len(directions)
            (found,) = torch.autograd.grad(gradients, weights, direction, retain_graph=keep)
            products[row, indices.numpy()] = found.double().cpu().numpy()
    return products


def baseline_scores(setup: TrainingSetup, recording: Recording, targets: Sequence[Target]) -> dict[str, np.ndarray]:
    """Scores of every baseline, (targets, training examples) each."""
    trace, batch = recording.trace, setup.config.train.batch_size
    tracin = np.zeros((len(targets), setup.data.num_train))
    checkpoints = tracin_checkpoints(recording)
    with recording.ahead([*checkpoints, recording.final]) as source:
        for checkpoint in checkpoints:
            state = source.state(checkpoint).to(setup.device)
            tracin -= gradient_products(setup, state, targets, trace.learning_rates[checkpoint.step].tolist()) / batch
        final = source.state(recording.final).to(setup.device)
    generator = np.random.default_rng(derive_component_seed(setup.config.seed, "baseline", "random"))
    return {
        "tracin": tracin,
        "last_gradient": -gradient_products(setup, final, targets) / batch,
        "random": generator.standard_normal(tracin.shape),
    }
