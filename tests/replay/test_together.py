"""Several targets in one call of each kernel: held against one at a time, and when that is what is done."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_setup
from torch import Tensor, nn

from tracked_replay.config import ReplayConfig
from tracked_replay.errors import ReplayError
from tracked_replay.replay import StepAdjoint, Target, adjoint, measurement_cotangent
from tracked_replay.replay.adjoint import TARGETS_AT_ONCE, Cotangent
from tracked_replay.replay.derivatives import batch_norm
from tracked_replay.replay.differentiable import DifferentiableModel
from tracked_replay.replay.kernels import pull
from tracked_replay.training import train
from tracked_replay.training.loop import TrainingSetup

COUNT = 3


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def second_derivatives(model: nn.Module, x: Tensor, read: bool) -> tuple[Callable[..., tuple], list[Tensor]]:
    """What pulls cotangents on a gradient (and on running statistics) back, and some of them, several of each."""
    copy = DifferentiableModel(model, gradient_is_read=read)
    x = x.clone().requires_grad_()
    parameters = dict(copy.module.named_parameters())
    outputs = copy.training_outputs({**parameters, **dict(copy.module.named_buffers())}, x, lambda: None)
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    loss = (weights * outputs.square().flatten(1).sum(1)).sum()
    gradients = torch.autograd.grad(loss, [*parameters.values(), x], create_graph=True)
    ends = [*gradients, *copy.updated_statistics().values()]
    tangents = [normal(COUNT, *end.shape, seed=place) for place, end in enumerate(ends)]

    def pull_back(given: list[Tensor]) -> tuple[Tensor, ...]:
        sources = [*parameters.values(), x, weights]
        return torch.autograd.grad(ends, sources, given, retain_graph=True, allow_unused=True, materialize_grads=True)

    return pull_back, tangents


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (4, 2, 5, 6)),
    "strided": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (4, 2, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 4, 5, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 5)),
    "batch norm without factors": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 5)),
    "batch norm of features": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "average pool": (lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 3, 6, 5)),
    "gelu": (nn.GELU, (4, 3)),
    "several layers": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU("tanh"),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 3, 2, bias=False),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(12, 2),
        ),
        (5, 1, 6, 7),
    ),
}


def test_a_first_layer_whose_inputs_are_given() -> None:
    weight, bias = normal(3, seed=0).requires_grad_(), normal(3, seed=1).requires_grad_()
    x = normal(4, 3, 2, seed=2)
    outputs, mean, _ = batch_norm(x, weight, bias, 1e-5)
    gradients = torch.autograd.grad(outputs.square().sum() + mean.sum(), [weight, bias], create_graph=True)
    for ends in ([0], [1], [0, 1]):
        tangents = [normal(COUNT, 3, seed=3 + end) for end in ends]

        def pull_back(given: list[Tensor], ends: list[int] = ends) -> tuple[Tensor, ...]:
            chosen = [gradients[end] for end in ends]
            return torch.autograd.grad(chosen, [weight, bias], given, retain_graph=True, materialize_grads=True)

        found = torch.vmap(pull_back)(tangents)
        for place in range(COUNT):
            expected = pull_back([tangent[place] for tangent in tangents])
            torch.testing.assert_close([part[place] for part in found], list(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [True, False], ids=["all gradients", "no gradient of a weight"])
@pytest.mark.parametrize("layer", LAYERS)
def test_several_at_once_are_one_after_another(layer: str, read: bool) -> None:
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = make().double()
    pull_back, tangents = second_derivatives(model, normal(*shape, seed=100), read)
    found = torch.vmap(pull_back)(tangents)
    for place in range(COUNT):
        for together, alone in zip(found, pull_back([tangent[place] for tangent in tangents]), strict=True):
            torch.testing.assert_close(together[place], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("several", [(0,), (1,), (0, 1)])
def test_a_cotangent_that_the_targets_share_counts_for_all(several: tuple[int, ...]) -> None:
    seen: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, None]:
        seen.append(tuple(a.shape))
        return a * b, None

    given = [normal(COUNT, 2, seed=place) if place in several else normal(2, seed=place) for place in (0, 1)]
    dims = tuple(0 if place in several else None for place in (0, 1))
    found = torch.vmap(lambda a, b: pull(product, (a, b))[0], in_dims=dims)(*given)
    torch.testing.assert_close(found, given[0] * given[1], rtol=0, atol=0)
    assert seen == [(COUNT, 2)]  # one call


def cotangents(setup: TrainingSetup, count: int) -> tuple[Callable[..., tuple[list[Cotangent], Tensor]], StepAdjoint]:
    *_, record = train(setup, stop=3)
    found = StepAdjoint(setup.step)
    given = [
        measurement_cotangent(found, setup.task, setup.data, record.after, Target.single(index))
        for index in range(count)
    ]
    batch = setup.batch(record.before.step)

    def pull_back(with_adjoint: StepAdjoint) -> tuple[list[Cotangent], Tensor]:
        rates = record.learning_rates.tolist()
        return with_adjoint.pull_back(
            record.before, record.after, batch.inputs, batch.labels, rates, given, record.loss
        )

    return pull_back, found


def test_small_activations_go_together_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = tiny_setup()
    pull_back, found = cotangents(setup, 2)
    pull_back(found)
    assert found.together == TARGETS_AT_ONCE
    largest = found.model.largest_activation
    assert largest == 16 * 1 * 4 * 4 * 8  # the inputs: batch, channels, height, width, bytes
    monkeypatch.setattr(adjoint, "SMALL_ACTIVATION", largest - 1)
    alone = StepAdjoint(setup.step)
    pull_back(alone)
    assert alone.together == 1
    asked = StepAdjoint(setup.step, ReplayConfig(targets_at_once=4))
    pull_back(asked)
    assert asked.together == 4


def test_the_largest_activation_is_that_of_the_first_training_pass() -> None:
    model = DifferentiableModel(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 25, 2)).double()
    )
    tensors = dict(model.module.named_parameters())
    for batch in (4, 9):
        model.training_outputs(tensors, normal(batch, 1, 5, 5, seed=0), lambda: None)
        assert model.largest_activation == 4 * 8 * 5 * 5 * 8


class Odd(torch.autograd.Function):
    """x², of which vmap knows nothing; it can be differentiated twice."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Twice.apply(g, x)


class Twice(torch.autograd.Function):
    """2 g x."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return 2 * g * x

    @staticmethod
    def backward(ctx, a: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return 2 * a * x, 2 * a * g


class Strict(Odd):
    """Takes plain tensors only, and says so in an error of its own."""

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(g):
            raise ValueError("plain tensors only")
        return Odd.backward(ctx, g)


class StrictLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Strict.apply(x)


class OddLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Odd.apply(x)


def odd_setup(layer: nn.Module) -> TrainingSetup:
    setup = tiny_setup()
    setup.step.model[2] = layer
    return setup


# vmap refuses the first; it would take the second apart, and warn; the third refuses it.
WITHOUT_A_RULE = [OddLayer(), nn.Mish(), StrictLayer()]


@pytest.mark.parametrize("layer", WITHOUT_A_RULE, ids=["no rule", "a slow one", "its own error"])
def test_a_layer_without_a_rule_is_done_one_target_at_a_time(
    layer: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    setup = odd_setup(layer)
    pull_back, found = cotangents(setup, 3)
    with caplog.at_level(logging.INFO):
        results, scores = pull_back(found)
    assert found.together == 1
    assert "one target at a time: a layer cannot be differentiated for several at once" in caplog.text
    alone = StepAdjoint(setup.step, ReplayConfig(targets_at_once=1))
    expected, expected_scores = pull_back(alone)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=0)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.parameters, other.parameters, rtol=0, atol=0)


@pytest.mark.parametrize("layer", WITHOUT_A_RULE, ids=["no rule", "a slow one", "its own error"])
def test_a_layer_without_a_rule_is_refused_where_several_are_asked_for(layer: nn.Module) -> None:
    setup = odd_setup(layer)
    pull_back, _ = cotangents(setup, 3)
    sentence = r"^replay.targets_at_once: found 2, but a layer .*; allowed: 1, or 0 to leave the choice open$"
    with pytest.raises(ReplayError, match=sentence):
        pull_back(StepAdjoint(setup.step, ReplayConfig(targets_at_once=2)))
