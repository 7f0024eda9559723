"""The ladder of exactness: scores against finite differences and against autograd through the unrolled training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TinyTask, recorded, slope, tiny_config, tiny_setup
from torch import Tensor, nn

from tracked_replay.config import ReplayConfig
from tracked_replay.errors import ReplayError
from tracked_replay.recording import Recording
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target
from tracked_replay.replay.adjoint import measurement_cotangent
from tracked_replay.training import TrainingSetup, evaluate, set_up, train

VARIANTS = {
    "plain": {"train__momentum": 0.0, "train__weight_decay": 0.0},
    "momentum": {"train__schedule": "one_cycle"},
    "dampening": {"train__dampening": 0.4, "train__schedule": "step", "train__lr_step_epochs": 1},
    "nesterov": {"train__nesterov": True, "train__schedule": "cosine", "train__warmup_epochs": 1},
    "groups": {"model__bias_scale": 3.0, "train__decay_biases": False, "train__nesterov": True},
}
TARGETS = (Target.single(4), Target.single(7), Target.mean(range(10), "mean:all"))


def replayed(
    setup: TrainingSetup, recording: Recording, targets=TARGETS, mode: str = "memory", at_once: int = 0
) -> np.ndarray:
    total = ScoreSum(targets, setup.data.num_train, setup.plan.steps)
    adjoint = StepAdjoint(setup.step, ReplayConfig(targets_at_once=at_once))
    for step in Replay(setup, recording, targets, adjoint, mode):
        total.add(step)
    return total.scores


def measured(setup: TrainingSetup, weights: Tensor, targets=TARGETS) -> np.ndarray:
    """Measurements after a real training with other weights."""
    state = setup.initial
    for record in train(setup, weights=weights):
        state = record.after
    values = evaluate(setup, state).measurements
    return np.array([values[list(target.indices)] @ np.array(target.coefficients) for target in targets])


def unrolled(setup: TrainingSetup, targets=TARGETS) -> np.ndarray:
    """∂φ/∂w by autograd through the whole training, written out here without the package's step or adjoint."""
    config = setup.config.train
    weights = torch.ones(setup.data.num_train, dtype=torch.float64, requires_grad=True)
    p = {name: tensor.clone().requires_grad_() for name, tensor in setup.initial.parameters.items()}
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    velocity: dict[str, Tensor] = {}

    def network(p, x, mean, var):
        x = F.conv2d(x, p["0.weight"], p["0.bias"])
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = F.gelu(x * p["1.weight"][:, None, None] + p["1.bias"][:, None, None])
        return x.flatten(1) @ p["4.weight"].T + p["4.bias"]

    for t, (indices, rates) in enumerate(zip(setup.plan.indices, setup.plan.learning_rates, strict=True)):
        x = setup.data.train.inputs[indices].double()
        y = setup.data.train.labels[indices]
        features = F.conv2d(x, p["0.weight"], p["0.bias"])
        batch_mean, batch_var = features.mean((0, 2, 3)), features.var((0, 2, 3), unbiased=False)
        mean = 0.7 * mean + 0.3 * batch_mean
        var = 0.7 * var + 0.3 * features.var((0, 2, 3), unbiased=True)
        losses = F.cross_entropy(network(p, x, batch_mean, batch_var), y, reduction="none")
        loss = (losses * weights[indices]).sum() / len(indices)
        gradients = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        updated = {}
        for (name, value), g in zip(p.items(), gradients, strict=True):
            bias = value.ndim <= 1
            if config.weight_decay and (config.decay_biases or not bias):
                g = g + config.weight_decay * value
            step = g
            if config.momentum:
                velocity[name] = g if t == 0 else config.momentum * velocity[name] + (1 - config.dampening) * g
                step = g + config.momentum * velocity[name] if config.nesterov else velocity[name]
            rate = rates[-1] if bias else rates[0]
            updated[name] = value - rate * step
        p = updated
    losses = F.cross_entropy(
        network(p, setup.data.evaluation.inputs.double(), mean, var), setup.data.evaluation.labels, reduction="none"
    )
    return np.stack(
        [
            torch.autograd.grad(
                losses[list(target.indices)] @ torch.tensor(target.coefficients, dtype=torch.float64),
                weights,
                retain_graph=True,
            )[0].numpy()
            for target in targets
        ]
    )


class Sometimes(nn.Module):
    """A layer that stands still, in eval mode or left out, in the steps of a training that ``still`` names."""

    def __init__(self, kind: str, still: tuple[int, ...]) -> None:
        super().__init__()
        self.kind, self.still = kind, still
        self.norm = nn.BatchNorm2d(3, momentum=0.3, affine=False)
        self.count = nn.BatchNorm2d(1, affine=False)  # counts the steps, in the state

    def forward(self, inputs: Tensor) -> Tensor:
        step = int(self.count.num_batches_tracked)
        counted = self.count(inputs[:, :1])
        stands = self.training and step in self.still
        if stands and self.kind == "left out":
            return inputs + 0 * counted
        self.norm.train(self.training and not stands)
        return self.norm(inputs) + 0 * counted


@pytest.mark.parametrize("still", [(8,), (1, 2, 5), (0, 4, 7)])
@pytest.mark.parametrize("kind", ["in eval mode", "left out"])
def test_statistics_that_stand_still_in_a_step_pass_their_cotangent_on(
    kind: str, still: tuple[int, ...], tmp_path: Path
) -> None:
    class Task(TinyTask):
        def model(self) -> nn.Module:
            layers = list(super().model())
            return nn.Sequential(layers[0], Sometimes(kind, still), *layers[2:])

    config = tiny_config()
    setup = set_up(config, Task(config))
    scores = replayed(setup, recorded(setup, tmp_path))
    for example in (0, 5, 17):
        found = scores[0, example]
        assert found == pytest.approx(slope(setup, example, TARGETS[0].indices[0]), rel=1e-6)


def test_statistics_that_only_the_training_changed_are_refused() -> None:
    class Task(TinyTask):
        def model(self) -> nn.Module:
            layers = list(super().model())
            return nn.Sequential(layers[0], Sometimes("in eval mode", (8,)), *layers[2:])

    config = tiny_config()
    setup = set_up(config, Task(config))
    *_, last = train(setup)
    adjoint = StepAdjoint(setup.step)
    final = measurement_cotangent(adjoint, setup.task, setup.data, last.after, TARGETS[0])
    given = (last.inputs, torch.from_numpy(last.labels), last.learning_rates.tolist(), [final])
    adjoint.pull_back(last.before, last.after, *given)
    name = "1.norm.running_mean"
    buffers = last.after.buffers | {name: last.after.buffers[name] + 1}
    with pytest.raises(ReplayError, match=rf"^step 8: the training changed the running statistics '{name}', and"):
        adjoint.pull_back(last.before, replace(last.after, buffers=buffers), *given)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_equal_autograd_through_the_unrolled_training(variant: str, tmp_path: Path) -> None:
    setup = tiny_setup(**VARIANTS[variant])
    scores = replayed(setup, recorded(setup, tmp_path))
    expected = unrolled(setup)
    for found, wanted in zip(scores, expected, strict=True):
        assert relative(found, wanted) <= 1e-9


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_equal_finite_differences_of_real_trainings(variant: str, tmp_path: Path) -> None:
    setup = tiny_setup(**VARIANTS[variant])
    scores = replayed(setup, recorded(setup, tmp_path))
    examples = [0, 5, 17, 30, 47]
    assert setup.plan.epochs[-1] == 2  # each example is seen in several epochs
    estimates = np.empty((len(TARGETS), len(examples)))
    for column, example in enumerate(examples):
        # Central differences at two step sizes, extrapolated: the error is of fourth order.
        slopes = []
        for eps in (2e-3, 1e-3):
            up, down = (torch.ones(48, dtype=torch.float64) for _ in range(2))
            up[example] += eps
            down[example] -= eps
            slopes.append((measured(setup, up) - measured(setup, down)) / (2 * eps))
        estimates[:, column] = (4 * slopes[1] - slopes[0]) / 3
    for found, wanted in zip(scores[:, examples], estimates, strict=True):
        assert relative(found, wanted) <= 1e-6


@pytest.mark.parametrize("every", [1, 2, 4, 9, 100])
def test_memory_and_stream_mode_give_the_same_bits_for_any_checkpoint_distance(every: int, tmp_path: Path) -> None:
    setup = tiny_setup(record__every=every, train__nesterov=True)
    recording = recorded(setup, tmp_path / "a")
    reference = replayed(setup, recorded(tiny_setup(train__nesterov=True), tmp_path / "b"))
    for mode in ("memory", "stream"):
        np.testing.assert_array_equal(replayed(setup, recording, mode=mode).view(np.int64), reference.view(np.int64))


def test_another_target_beside_it_does_not_change_a_targets_scores(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    together = replayed(setup, recording, at_once=1)
    for row, target in enumerate(TARGETS):
        alone = replayed(setup, recording, (target,))
        np.testing.assert_array_equal(alone[0].view(np.int64), together[row].view(np.int64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_targets_replayed_at_once_have_the_scores_of_one_at_a_time(dtype: str, tmp_path: Path) -> None:
    setup = tiny_setup(train__dtype=dtype, train__nesterov=True)
    recording = recorded(setup, tmp_path)
    targets = (*TARGETS, Target.single(0), Target.mean(range(3), "mean:0-2"))
    alone = replayed(setup, recording, targets, at_once=1)
    bound = (
        50 * np.finfo(dtype).eps * np.abs(alone).max(axis=1, keepdims=True)
    )  # the digits that docs/how-it-works.md names
    assert bound.max() < (1e-5 if dtype == "float32" else 1e-13)
    for at_once in (2, 3, 5, 8, 0):
        found = replayed(setup, recording, targets, at_once=at_once)
        assert (np.abs(found - alone) <= bound).all()
        assert at_once == 2 or not np.array_equal(found, alone)  # they did go together


def test_in_full_groups_the_others_do_not_change_a_targets_scores(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    first = (Target.single(1), Target.single(2), *(Target.single(index) for index in range(3, 9)))
    found = replayed(setup, recording, first)
    others = replayed(setup, recording, (*first, Target.single(0)))
    np.testing.assert_array_equal(others[:8].view(np.int64), found.view(np.int64))
    changed = replayed(setup, recording, (*first[:4], *TARGETS[::-1], Target.single(0)))
    np.testing.assert_array_equal(changed[:4].view(np.int64), found[:4].view(np.int64))


def test_a_combination_is_the_combination_of_its_parts(tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    parts = replayed(setup, recording, tuple(Target.single(index) for index in range(10)))
    mean = replayed(setup, recording, (Target.mean(range(10), "mean:all"),))
    assert relative(mean[0], parts.mean(axis=0)) <= 1e-12


def test_an_example_that_no_batch_holds_has_score_zero(tmp_path: Path) -> None:
    setup = tiny_setup(train__batch_size=20)  # two batches of 20 out of 48: eight examples are left out each epoch
    scores = replayed(setup, recorded(setup, tmp_path))
    never = np.setdiff1d(np.arange(48), setup.plan.indices)
    seen = np.unique(setup.plan.indices)
    if len(never):
        assert not scores[:, never].any()
    assert (scores[:, seen] != 0).all()
