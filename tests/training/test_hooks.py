"""Hooks and reparametrised weights against a plain loop with torch.optim: trained the same, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyTask, tiny_config
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tracked_replay.determinism import create_deterministic_model
from tracked_replay.errors import TaskError
from tracked_replay.training import TrainingSetup, require_functional, set_up, train
from tracked_replay.training.schedule import SHARED_INSTANCE

Change = Callable[[nn.Module], Any]  # of the model in place


def made_with(change: Change) -> TrainingSetup:
    class Changed(TinyTask):
        def model(self) -> nn.Module:
            model = super().model()
            change(model)
            return model

    config = tiny_config()
    return set_up(config, Changed(config))


def trained(setup: TrainingSetup) -> dict[str, Tensor]:
    state = setup.initial
    for record in train(setup):
        state = record.after
    return state.model_tensors


def by_a_plain_loop(setup: TrainingSetup) -> dict[str, Tensor]:
    """The same training of a model of its own, whose parameters it changes, as torch's users write it."""
    made = create_deterministic_model(setup.config.seed, setup.task.model, SHARED_INSTANCE)
    assert isinstance(made, nn.Module)
    model = made.double().train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()  # as a state's are, so that they are when it is read again
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in group.parameters], **group.sgd_arguments} for group in setup.step.groups
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for indices, rates in zip(setup.plan.indices, setup.plan.learning_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(setup.data.train.inputs[indices].double()), setup.data.train.labels[indices]).backward()
        optimizer.step()
    return model.state_dict()


def is_the_same(setup: TrainingSetup) -> bool:
    plain, found = by_a_plain_loop(setup), trained(setup)
    return all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def head(replace: Callable[[nn.Module], nn.Module]) -> Change:
    return lambda model: model.__setitem__(4, replace(model[4]))


def look_at(seen: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, *gradients: tuple[Tensor, ...]) -> None:
        seen.append(gradients[-1][0].clone())

    return hook


WORKING: dict[str, Change] = {
    "forward": lambda m: m[0].register_forward_hook(lambda module, _, outputs: outputs * 0.5 + module.weight.sum()),
    "forward pre": lambda m: m[4].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "full backward": lambda m: m[4].register_full_backward_hook(look_at([])),
    "full backward pre": lambda m: m[0].register_full_backward_pre_hook(look_at([])),
    "weight norm": head(parametrizations.weight_norm),
    "spectral norm": head(parametrizations.spectral_norm),
    "orthogonal": head(parametrizations.orthogonal),
    "pruned": head(lambda module: prune.l1_unstructured(module, "weight", amount=0.3)),
    "removed": lambda m: m[4].weight.register_hook(lambda gradient: gradient * 0.5).remove(),
}


@pytest.mark.parametrize("change", WORKING.values(), ids=WORKING)
@pytest.mark.filterwarnings("ignore:.*lazy:UserWarning")
def test_what_is_allowed_trains_as_a_plain_loop_does(change: Change) -> None:
    setup = made_with(change)
    require_functional(setup)
    assert is_the_same(setup)


def frozen_with_a_hook(model: nn.Module) -> None:
    model[4].weight.register_hook(lambda gradient: gradient * 0.5)
    model[4].weight.requires_grad_(False)


def test_a_hook_on_a_parameter_that_is_frozen_is_called_by_nobody() -> None:
    setup = made_with(frozen_with_a_hook)
    require_functional(setup)
    assert is_the_same(setup)


def halve_when_accumulated(model: nn.Module) -> None:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    model[4].weight.register_post_accumulate_grad_hook(hook)


def halve_what_a_norm_is_made_of(model: nn.Module) -> None:
    head(parametrizations.weight_norm)(model)
    model[4].parametrizations.weight.original1.register_hook(lambda gradient: gradient * 0.5)


IGNORED: dict[str, tuple[Change, str]] = {
    "gradient": (
        lambda m: m[4].weight.register_hook(lambda gradient: gradient * 0.5),
        r"\(register_hook\) at the parameter '4\.weight'",
    ),
    "accumulated": (halve_when_accumulated, r"\(register_post_accumulate_grad_hook\) at the parameter '4\.weight'"),
    "part of a norm": (
        halve_what_a_norm_is_made_of,
        r"\(register_hook\) at the parameter '4\.parametrizations\.weight\.original1'",
    ),
}


@pytest.mark.parametrize(("change", "place"), IGNORED.values(), ids=IGNORED)
def test_a_hook_on_a_parameter_which_a_step_would_ignore_is_refused(change: Change, place: str) -> None:
    setup = made_with(change)
    assert not is_the_same(setup)
    sentence = rf"^the model of the task Changed: found a hook {place}, [^\n]*; allowed: hooks of modules, [^\n]*$"
    with pytest.raises(TaskError, match=sentence):
        require_functional(setup)


CHANGING: dict[str, Change] = {
    "full backward": lambda m: m[4].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,)),
    "full backward pre": lambda m: m[4].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 0.5,)),
}


@pytest.mark.parametrize("change", CHANGING.values(), ids=CHANGING)
def test_a_module_that_changes_gradients_is_refused_and_keeps_its_hooks(change: Change) -> None:
    setup = made_with(change)
    for _ in range(2):
        with pytest.raises(TaskError, match=r"found a backward hook of a module that changes a gradient, [^\n]*$"):
            require_functional(setup)


def test_a_module_that_looks_at_gradients_sees_them_in_every_step() -> None:
    seen: list[Tensor] = []
    setup = made_with(lambda model: model[4].register_full_backward_hook(look_at(seen)))
    require_functional(setup)
    seen.clear()
    trained(setup)
    found = list(seen)
    seen.clear()
    by_a_plain_loop(setup)
    assert len(found) == len(seen) == setup.plan.steps
    assert all(torch.equal(one, expected) for one, expected in zip(found, seen, strict=True))


class Changing(nn.Module):
    """Around a head; ``change`` is called with it in every forward pass."""

    def __init__(self, body: nn.Module, change: Change) -> None:
        super().__init__()
        self.body, self.change, self.calls = body, change, 0
        self.register_buffer("missing", torch.full((2,), torch.nan))

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.change(self)
        return self.body(inputs) * (1.0 if found is None else found)


@torch.no_grad()
def clamp(module: nn.Module) -> None:
    module.body.weight.clamp_(-0.01, 0.01)


def count(module: nn.Module) -> float:
    module.calls += 1
    return 1 + 0.1 * module.calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (clamp, r"changes its tensor '4\.body\.weight' in place in a step"),
        (count, r"keeps something between two steps that is not in its state .* gives two results"),
    ],
)
def test_a_step_that_is_no_function_of_the_state_is_refused(change: Change, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        require_functional(made_with(head(lambda module: Changing(module, change))))


def test_a_constant_that_is_nan_is_no_change() -> None:
    setup = made_with(head(lambda module: Changing(module, lambda _: None)))
    require_functional(setup)
