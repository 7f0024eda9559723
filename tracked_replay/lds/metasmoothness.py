"""Metasmoothness: whether the final parameters move in a straight line with the weights.

Source: Engstrom et al., "Optimizing ML Training with Metagradient Descent" (2025), section 3.1: for a direction v in
the weights and a step h, three trainings give two consecutive differences of the final parameters,
Δ₁ = θ(z + h v) − θ(z) and Δ₂ = θ(z + 2h v) − θ(z + h v); the metasmoothness is the average agreement of their signs,
weighted by |Δ₁|: 1 when every coordinate goes on in the same direction, about 0 when they have nothing in common.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tracked_replay.lds.retraining import final_state, weight_tensor
from tracked_replay.training import State, TrainingSetup

EXPECTED_LINEAR = 0.8


def metasmoothness(setup: TrainingSetup, removed: np.ndarray) -> float:
    """Agreement of consecutive differences along the removal of some examples: weights 1, ½, 0.

    Args:
        setup: of the recorded run.
        removed: training examples that define the direction.

    Returns:
        A number in [−1, 1]; NaN where the removal changes nothing.
    """
    flat = [
        _flat(final_state(setup, weight_tensor(setup, removed, np.full(len(removed), weight))))
        for weight in (1.0, 0.5, 0.0)
    ]
    first, second = flat[1] - flat[0], flat[2] - flat[1]
    weight = first.abs()
    if not float(weight.sum()):
        return float("nan")
    return float((weight * first.sign() * second.sign()).sum() / weight.sum())


def _flat(state: State) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.parameters.values()])


def sentence(value: float) -> str:
    """What the number says about the linear prediction."""
    if math.isnan(value):
        return "Metasmoothness undefined: this removal changes nothing."
    if value < EXPECTED_LINEAR:
        return (
            f"Metasmoothness {value:.2f}: the training bends sharply along this removal, so linear predictions may "
            f"miss even though the scores are exact."
        )
    return (
        f"Metasmoothness {value:.2f}: the training is smooth along this removal; linear predictions can be expected to "
        f"hold."
    )
