"""The cheap scores against explicit per-example gradients and the formulas they stand for."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_retraining import recorded
from tiny import tiny_setup
from torch.func import functional_call

from tracked_replay.lds import BASELINES, baseline_scores, baselines
from tracked_replay.recording import Recording
from tracked_replay.replay import Target
from tracked_replay.training import State, TrainingSetup

TARGETS = (Target.single(4), Target(-1, "two", (1, 7), (0.25, -2.0)), Target.mean(range(10), "mean:all", -2))


def flat(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def explicit_products(setup: TrainingSetup, state: State, rates: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """⟨∇ℓᵢ, lr · ∇φ⟩ with torch's own BatchNorm, one gradient an example; rates of weights and of biases."""
    model = copy.deepcopy(setup.step.model).eval()
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in state.parameters.items()}

    def losses(examples) -> torch.Tensor:
        outputs = functional_call(model, {**state.buffers, **parameters}, (examples.inputs.double(),))
        return F.cross_entropy(outputs, examples.labels, reduction="none")

    def gradients(values: torch.Tensor) -> torch.Tensor:
        found = [torch.autograd.grad(value, list(parameters.values()), retain_graph=True) for value in values]
        return torch.stack([flat(one) for one in found])

    measurements = gradients(losses(setup.data.evaluation))
    scale = flat(tuple(torch.full_like(p, rates[p.ndim <= 1]) for p in parameters.values()))
    mixed = [
        scale * (torch.tensor(t.coefficients, dtype=torch.float64) @ measurements[list(t.indices)]) for t in TARGETS
    ]
    return (torch.stack(mixed) @ gradients(losses(setup.data.train)).T).numpy()


def last_states(setup: TrainingSetup, recording: Recording) -> list[State]:
    """The last state with a checkpoint in each epoch, found anew."""
    by_epoch = {setup.plan.epochs[row.step]: row for row in recording.checkpoints if row.step < setup.plan.steps}
    return [recording.state(by_epoch[epoch]) for epoch in sorted(by_epoch)]


@pytest.mark.parametrize("batch", [500, 7])
def test_products_are_those_of_explicit_gradients(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "BATCH", batch)
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    for checkpoint in (recording.checkpoints[0], recording.final):
        state = recording.state(checkpoint)
        found, expected = baselines.gradient_products(setup, state, TARGETS), explicit_products(setup, state)
        assert found.shape == (3, 48)
        assert np.abs(found - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("every", [1, 4])
def test_scores_are_the_published_formulas(every: int, tmp_path: Path) -> None:
    setup = tiny_setup(record__every=every, train__schedule="one_cycle", model__bias_scale=3.0)
    recording = recorded(setup, tmp_path)
    found = baseline_scores(setup, recording, TARGETS)
    assert tuple(found) == BASELINES
    states = last_states(setup, recording)
    assert len(states) == 3
    rates = [tuple(setup.plan.learning_rates[state.step]) for state in states]
    tracin = sum(-explicit_products(setup, state, pair) / 16 for pair, state in zip(rates, states, strict=True))
    np.testing.assert_allclose(found["tracin"], tracin, rtol=0, atol=1e-10 * np.abs(tracin).max())
    last = -explicit_products(setup, recording.state(recording.final)) / 16
    np.testing.assert_allclose(found["last_gradient"], last, rtol=0, atol=1e-10 * np.abs(last).max())


def test_random_scores_are_reproducible_and_leave_torchs_generator_alone(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    before = torch.get_rng_state()
    first, second = (baseline_scores(setup, recording, TARGETS) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for method in BASELINES:
        assert first[method].shape == (3, 48)
        np.testing.assert_array_equal(first[method], second[method])
    assert abs(np.corrcoef(first["random"].ravel(), first["tracin"].ravel())[0, 1]) < 0.5


def test_the_models_mode_and_tensors_are_left_alone(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    setup.step.model.train()
    before = {name: tensor.clone() for name, tensor in setup.step.model.state_dict().items()}
    baseline_scores(setup, recording, TARGETS)
    assert all(module.training for module in setup.step.model.modules())
    for name, tensor in setup.step.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
