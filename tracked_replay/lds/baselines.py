"""Cheaper scores from the same recorded run, for the same table and picture.

They answer the same question as the replay (∂measurement/∂weight), each leaving something out:

- ``tracin``: Σ over checkpoints of −lr/B ⟨∇measurement, ∇ℓᵢ⟩ (Pruthi et al., "Estimating Training Data Influence by
  Tracing Gradient Descent", 2020, equation 2, with one checkpoint an epoch): no momentum, no curvature.
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
from tracked_replay.replay import DifferentiableModel, Target
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


def gradient_products(setup: TrainingSetup, state: State, targets: Sequence[Target]) -> np.ndarray:
    """⟨∇ℓᵢ, ∇φ⟩ of every training example and target at one state, in eval mode.

    Per-example gradients are never formed: the derivative of ``⟨∇ Σ wᵢ ℓᵢ, ∇φ⟩`` with respect to w gives all products.

    Returns:
        (targets, training examples) float64.
    """
    module = DifferentiableModel(setup.step.model).module.eval()
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
    directions = [_measurement_gradient(setup, module, state, parameters, target) for target in targets]
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


def _measurement_gradient(
    setup: TrainingSetup, module: torch.nn.Module, state: State, parameters: dict, target: Target
) -> list[torch.Tensor]:
    total = [torch.zeros_like(tensor) for tensor in parameters.values()]
    indices, coefficients = torch.tensor(target.indices), torch.tensor(target.coefficients, dtype=torch.float64)
    for chosen, factors in zip(indices.split(BATCH), coefficients.split(BATCH), strict=True):
        batch = setup.data.evaluation_batch(chosen)
        outputs = functional_call(module, {**state.buffers, **parameters}, (batch.inputs,))
        values = setup.task.measurement(outputs, batch.labels)
        factors = factors.to(device=values.device, dtype=values.dtype)
        found = torch.autograd.grad((values * factors).sum(), list(parameters.values()))
        total = [sum_ + part for sum_, part in zip(total, found, strict=True)]
    return total


def baseline_scores(setup: TrainingSetup, recording: Recording, targets: Sequence[Target]) -> dict[str, np.ndarray]:
    """Scores of every baseline, (targets, training examples) each."""
    trace, batch = recording.trace, setup.config.train.batch_size
    scores: dict[str, np.ndarray] = {}
    total = np.zeros((len(targets), setup.data.num_train))
    last = total
    for checkpoint in tracin_checkpoints(recording):
        state = recording.state(checkpoint).to(setup.device)
        last = -gradient_products(setup, state, targets) * trace.learning_rates[checkpoint.step, 0] / batch
        total = total + last
    scores["tracin"] = total
    final = recording.state(recording.final).to(setup.device)
    scores["last_gradient"] = -gradient_products(setup, final, targets) / batch
    generator = np.random.default_rng(derive_component_seed(setup.config.seed, "baseline", "random"))
    scores["random"] = generator.standard_normal(total.shape)
    return scores
