"""Several retrainings in one batched step: those done alone, to rounding, or a refusal in one sentence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import TinyTask, tiny_config, tiny_setup
from torch import Tensor, nn

from tracked_replay.errors import ConfigError, NumericalError, TrackedReplayError
from tracked_replay.lds import RetrainingJob, difference_over_spread, require_batchable, retrain, retrain_together
from tracked_replay.tasks import TaskData
from tracked_replay.training import BatchedStep, TrainingSetup, set_up

JOBS = [
    RetrainingJob(0, np.array([3, 8, 30]), np.zeros(3), keep_state=True),
    RetrainingJob(1, np.zeros(0, np.int64), np.zeros(0), keep_state=True),
    RetrainingJob(2, np.arange(0, 48, 5), np.zeros(10), keep_state=True),
    RetrainingJob(3, np.array([0, 47]), np.array([0.5, 2.0]), keep_state=True),
    RetrainingJob(4, np.array([8]), np.zeros(1), keep_state=True),
]


def setup_with(*layers: nn.Module, **changes: object) -> TrainingSetup:
    """The tiny setup with other layers between its convolution and its head."""

    class Other(TinyTask):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Conv2d(1, 3, 3), *layers, nn.Flatten(), nn.Linear(12, 3))

    config = tiny_config(**changes)
    return set_up(config, Other(config), TaskData(Other(config), config))


def assert_those_done_alone(setup: TrainingSetup, models: int, rtol: float = 1e-10) -> None:
    found = []
    for first in range(0, len(JOBS), models):
        found += retrain_together(setup, JOBS[first : first + models], models=models)
    assert [result.id for result in found] == [0, 1, 2, 3, 4]
    for job, together in zip(JOBS, found, strict=True):
        alone = retrain(setup, job)
        np.testing.assert_allclose(together.measurements, alone.measurements, rtol=rtol)
        assert (together.accuracy, together.models_at_once, alone.models_at_once) == (alone.accuracy, models, 1)
        assert together.state is not None
        assert alone.state is not None
        one, other = safetensors.torch.load(together.state), safetensors.torch.load(alone.state)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol, msg=name)
    assert len({result.final_digest for result in found}) == 5


@pytest.mark.parametrize("models", [2, 3, 5, 8])
def test_they_are_those_done_alone(models: int) -> None:
    assert_those_done_alone(tiny_setup(), models)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__momentum": 0.0},
        {"train__nesterov": True, "train__schedule": "one_cycle", "model__bias_scale": 3.0},
        {"data__augmentation": "flip+crop", "data__crop_padding": 1},
        {"train__dampening": 0.5, "data__flip_labels": 0.2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_they_are_those_done_alone_with_other_configs(changes: dict) -> None:
    assert_those_done_alone(tiny_setup(**changes), 3)


def test_in_float32_they_are_so_to_its_rounding() -> None:
    assert_those_done_alone(tiny_setup(train__dtype="float32"), 3, rtol=2e-4)


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.Dropout2d(0.4), nn.AlphaDropout(0.2)])
def test_random_numbers_are_those_of_a_step_alone(layer: nn.Module) -> None:
    setup = setup_with(nn.BatchNorm2d(3), layer)
    require_batchable(setup, 3)
    assert_those_done_alone(setup, 3)


@pytest.mark.parametrize("layer", [nn.Identity(), nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False)])
def test_models_without_buffers(layer: nn.Module) -> None:
    setup = setup_with(layer)
    require_batchable(setup, 3)
    assert_those_done_alone(setup, 3)


def test_a_frozen_parameter_stays() -> None:
    layer = nn.BatchNorm2d(3)
    layer.weight.requires_grad_(False)
    assert_those_done_alone(setup_with(layer), 3)


class Branch(nn.Module):
    """Does something else for some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class CountsCalls(nn.Module):
    """Gives something else at every call, which no step alone or together repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (
            Branch(),
            r"torch\.vmap cannot take the model or the loss of the task Other \(RuntimeError: .* control flow\)",
        ),
        (nn.RReLU(), r"torch\.vmap cannot take .* \(RuntimeError: vmap: we do not yet support aten::rrelu\)"),
        (
            nn.BatchNorm2d(3, momentum=None),
            r"torch\.vmap cannot take .* \(RuntimeError: .*calling \.item\(\) on a Tensor\)",
        ),
        (
            CountsCalls(),
            r"in its first step the model of the task Other changes otherwise than alone, by .* \(limit 0\.01\)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_cannot_be_batched_is_refused_in_one_sentence(layer: nn.Module, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lds\.models_at_once: found 4, but {why}.*; allowed: 1 for this task$"):
        require_batchable(setup_with(layer), 4)


def test_models_that_get_the_weights_of_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BatchedStep.__call__
    monkeypatch.setattr(BatchedStep, "__call__", lambda self, *rest: real(self, *rest[:-1], rest[-1].roll(1, 0)))
    with pytest.raises(ConfigError, match="changes otherwise than alone"):
        require_batchable(tiny_setup(), 4)


def test_too_many_models_for_the_memory_are_refused_with_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: BatchedStep, *rest: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand much more")

    monkeypatch.setattr(BatchedStep, "__call__", step)
    with pytest.raises(ConfigError, match=r"^lds.models_at_once: found 6, but .* memory of cpu; .* for example 3$"):
        require_batchable(tiny_setup(), 6)


def test_what_is_wrong_with_the_step_alone_is_said_as_ever() -> None:
    setup = setup_with(nn.BatchNorm2d(3))
    with pytest.raises(NumericalError, match="step 0: the loss is nan"):
        require_batchable(dataclasses.replace(setup, initial=poisoned(setup)), 3)
    unused = setup_with(nn.BatchNorm2d(3))
    unused.step.model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    unused.initial.parameters["unused"] = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(TrackedReplayError, match="does not depend on the parameter 'unused'"):
        require_batchable(unused, 3)


def poisoned(setup: TrainingSetup) -> object:
    first = setup.initial
    return dataclasses.replace(first, parameters={name: t * np.nan for name, t in first.parameters.items()})


def test_one_that_diverges_is_named_by_its_loss() -> None:
    bad = RetrainingJob(7, np.array([int(tiny_setup().plan.indices[2, 5])]), np.array([np.inf]))
    with pytest.raises(NumericalError, match="step 2: the loss is inf"):
        retrain_together(tiny_setup(), [JOBS[0], bad], models=2)


def test_the_difference_is_measured_by_the_smallest_spread() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=20), generator.normal(size=20)
    wide, narrow = 10 * generator.normal(size=(6, 20)), generator.normal(size=(4, 20))
    variances = [sum((row - narrow.mean(0)) ** 2 for row in narrow)[place] / 3 for place in range(20)]
    expected = np.linalg.norm(one - other) / np.sqrt(20) / np.sqrt(sum(variances) / 20)
    assert difference_over_spread(one, other, [list(wide), list(narrow)]) == pytest.approx(expected)
    assert difference_over_spread(one, one, [[one, one]]) == 0
    assert difference_over_spread(one, other, [[one, one]]) == np.inf
