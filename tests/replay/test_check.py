"""Whether the replay's derivatives are those of the training, which finite differences say before every replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import TinyTask, tiny_config
from torch import Tensor, nn

from tracked_replay.config import Config
from tracked_replay.errors import ReplayError
from tracked_replay.replay import DerivativeCheck, Target, check, check_derivatives, differentiable
from tracked_replay.tasks import TaskData, load_task
from tracked_replay.training import State, TrainingSetup, set_up, train

MANY = [Target.mean(range(10), "mean:all")]


def checked(task: type[TinyTask], targets: list[Target] = MANY, **changes: object) -> DerivativeCheck:
    config = tiny_config(**changes)
    made = task(config)
    setup = set_up(config, made, TaskData(made, config))
    before, final = states(setup, 4)
    return check_derivatives(setup, before, final, targets)


def states(setup: TrainingSetup, step: int) -> tuple[State, State]:
    records = list(train(setup))
    return records[step].before, records[-1].after


class Net(nn.Module):
    """Of the tiny task, with something between its head and the rest."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 3)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.between(self.body(inputs)))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return -gradient


def without_gradient(inputs: Tensor) -> Tensor:
    with torch.no_grad():
        size = inputs.square().mean()
    return inputs / (1 + size)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x * x.detach().sigmoid(),
    "no_grad": without_gradient,
    "gradient reversal": Reversal.apply,
    "straight-through rounding": lambda x: x + (x.round() - x).detach(),
    "a little": lambda x: x + 0.05 * x.detach().tanh(),
}


class Drawn(nn.Module):
    """Of the tiny task, drawn towards its running statistics, whose derivative it keeps to itself or not."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3))
        self.hidden = hidden

    def forward(self, inputs: Tensor) -> Tensor:
        mean = self.body[1].running_mean
        before = (mean.detach() if self.hidden else mean).clone()
        return self.body(inputs) * before.sigmoid()


def test_a_derivative_by_the_running_statistics_counts() -> None:
    def task(hidden: bool) -> type[TinyTask]:
        return type("Drawn", (TinyTask,), {"model": lambda self: Drawn(hidden)})

    checked(task(hidden=False))
    with pytest.raises(ReplayError, match=r"^step 4: its derivative and a finite difference .* apart, so scores would"):
        checked(task(hidden=True))


def between(function: Callable[[Tensor], Tensor]) -> type[TinyTask]:
    return type("Between", (TinyTask,), {"model": lambda self: Net(function)})


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_no_derivative_is_refused(name: str, dtype: str) -> None:
    with pytest.raises(ReplayError, match=r"^step 4: its derivative and a finite difference .* apart, so scores would"):
        checked(between(WRONG[name]), train__dtype=dtype)


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "kinks": torch.relu,
    "softmax": lambda x: x.softmax(1),
    "sorted": lambda x: x.sort(1).values,
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*[x[:, None, :, None]] * 3)[:, 0, :, 0],
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("changes", [{}, {"train__momentum": 0.0}, {"train__nesterov": True}], ids=str)
def test_what_is_one_is_found_to_be(name: str, dtype: str, changes: dict[str, object]) -> None:
    found = checked(between(RIGHT[name]), train__dtype=dtype, **changes)
    assert found.deviation is not None, found.why
    assert found.deviation < 1e-4


def test_a_large_network_with_kinks_is_passed() -> None:
    config = Config.resolve("digits").override({"train.epochs": 1, "train.threads": 2})
    setup = set_up(config, load_task(config))
    relu = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip
    task = type("Kinks", (type(setup.task),), {"model": lambda self: relu})(config)
    setup = set_up(config, task, TaskData(task, config))
    found = check_derivatives(setup, *states(setup, 2), [Target.single(0)])
    assert found.deviation is not None, found.why


def test_a_measurement_that_is_none_of_what_it_computes_is_refused() -> None:
    class Weighted(TinyTask):
        def measurement(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return outputs.logsumexp(1) * outputs.detach().square().sum(1)

    with pytest.raises(ReplayError, match=r"^measurement of target mean:all: its derivative"):
        checked(Weighted)


def test_statistics_that_take_no_part_in_the_gradient_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update = differentiable.DifferentiableBatchNorm._update
    monkeypatch.setattr(
        differentiable.DifferentiableBatchNorm, "_update", lambda self, mean, variance: update(self, mean, mean**2)
    )
    with pytest.raises(ReplayError, match=r"^running statistics after step 4: its derivative"):
        checked(TinyTask)


def test_weight_normalisation_as_torch_differentiates_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normalised(TinyTask):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))

    assert checked(Normalised).deviation is not None
    monkeypatch.setattr(differentiable, "OTHER_FORWARD", {})
    with pytest.raises(ReplayError, match="step 4"):
        checked(Normalised)


def test_a_model_that_does_not_run_in_float64_is_not_checked() -> None:
    found = checked(between(lambda x: x @ torch.eye(6)), train__dtype="float32")
    assert found.deviation is None
    assert "does not run in float64" in found.why


def test_a_model_that_computes_in_float32_whatever_it_is_given_is_not_refused() -> None:
    found = checked(between(lambda x: x.float().tanh().to(x.dtype)), train__dtype="float32")
    assert found.deviation is None
    assert found.why == "two differences of one derivative differ"


def test_differences_that_never_agree_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "STEADY", 0.0)
    assert checked(TinyTask).deviation is None
