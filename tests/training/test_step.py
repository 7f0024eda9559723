"""The step function against torch.optim.SGD, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TinyTask, tiny_config, tiny_setup
from torch import nn

from tracked_replay.errors import NumericalError, TrackedReplayError
from tracked_replay.training import TrainingSetup, evaluate, set_up, train

SGD_VARIANTS = [
    {"train__momentum": 0.0, "train__weight_decay": 0.0},
    {"train__momentum": 0.0},
    {"train__momentum": 0.9},
    {"train__dampening": 0.5},
    {"train__nesterov": True},
    {"train__nesterov": True, "model__bias_scale": 2.5, "train__decay_biases": False, "train__schedule": "one_cycle"},
]


def final_state(setup: TrainingSetup, **arguments: object):
    state = setup.initial
    for record in train(setup, **arguments):
        state = record.after
    return state


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", SGD_VARIANTS)
def test_training_is_bitwise_a_plain_loop_with_torch_optim_sgd(variant: dict, dtype: str) -> None:
    setup = tiny_setup(train__dtype=dtype, **variant)
    model = copy.deepcopy(setup.step.model)
    model.load_state_dict(setup.initial.model_tensors)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in group.parameters], **group.sgd_arguments} for group in setup.step.groups
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    inputs, labels = setup.data.train.inputs.to(getattr(torch, dtype)), setup.data.train.labels
    model.train()
    for indices, rates in zip(setup.plan.indices, setup.plan.learning_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[indices]), labels[indices]).backward()
        optimizer.step()
    found = final_state(setup)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(bits(found.model_tensors[name]), bits(tensor), err_msg=name)
    for name, parameter in named.items():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            np.testing.assert_array_equal(bits(found.momentum[name]), bits(buffer), err_msg=name)


def test_weight_zero_is_the_gradient_without_the_example_and_the_same_denominator() -> None:
    setup = tiny_setup(train__epochs=1, train__batch_size=48, train__momentum=0.0, train__weight_decay=0.0)
    weights = torch.ones(48, dtype=torch.float64)
    weights[3] = 0
    after = final_state(setup, weights=weights)
    order = setup.plan.indices[0]
    model = copy.deepcopy(setup.step.model).train()
    model.load_state_dict(setup.initial.model_tensors)
    losses = F.cross_entropy(
        model(setup.data.train.inputs[order].double()), setup.data.train.labels[order], reduction="none"
    )
    (losses[torch.from_numpy(order != 3)].sum() / 48).backward()
    for name, parameter in model.named_parameters():
        expected = parameter - setup.config.train.lr * parameter.grad
        torch.testing.assert_close(after.parameters[name], expected.detach(), rtol=1e-12, atol=1e-14)


def test_states_are_values_that_later_steps_do_not_change() -> None:
    setup = tiny_setup()
    records = list(train(setup))
    again = list(train(setup))
    for first, second in zip(records, again, strict=True):
        for name, tensor in first.before.flat().items():
            np.testing.assert_array_equal(bits(tensor), bits(second.before.flat()[name]))
    assert [record.before.step for record in records] == list(range(setup.plan.steps))


def test_training_goes_on_from_any_state_with_the_same_bits() -> None:
    setup = tiny_setup(train__nesterov=True)
    records = list(train(setup))
    whole, resumed = records[-1].after, final_state(tiny_setup(train__nesterov=True), start=records[4].before)
    for name, tensor in whole.flat().items():
        np.testing.assert_array_equal(bits(tensor), bits(resumed.flat()[name]))


class DropoutTask(TinyTask):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_dropout_draws_the_same_mask_whenever_a_step_is_taken() -> None:
    config = tiny_config()
    setup = set_up(config, DropoutTask(config))
    records = list(train(setup))
    torch.manual_seed(123)
    (again, loss), _ = setup.take(records[5].before)
    assert loss.item() == records[5].loss
    assert records[5].loss != records[4].loss
    for name, tensor in records[5].after.flat().items():
        np.testing.assert_array_equal(bits(tensor), bits(again.flat()[name]))


class OverflowingTask(TinyTask):
    def prepare(self, inputs, dtype):
        marked = self.train_examples().inputs[7]
        return inputs.to(dtype).masked_fill((inputs == marked).flatten(1).all(1).view(-1, 1, 1, 1), float("inf"))


def test_an_overflow_stops_at_the_step_that_sees_it() -> None:
    config = tiny_config()
    setup = set_up(config, OverflowingTask(config))
    step = int(np.argwhere(setup.plan.indices == 7)[0, 0])
    with pytest.raises(NumericalError, match=f"step {step}: the loss is (nan|inf)"):
        list(train(setup))


class SquareRootTask(TinyTask):
    """Zero loss value but an infinite gradient: √|x| at 0."""

    def per_example_loss(self, outputs, labels):
        return (outputs * 0).abs().sqrt().sum(1)


def test_an_infinite_gradient_is_named() -> None:
    config = tiny_config()
    setup = set_up(config, SquareRootTask(config))
    with pytest.raises(NumericalError, match=r"step 0: the gradient '0.weight' holds NaN or Inf"):
        list(train(setup))


def test_an_overflowing_parameter_is_named() -> None:
    setup = tiny_setup(train__dtype="float32", train__lr=1e38, train__momentum=0.0, train__weight_decay=0.9)
    with pytest.raises(NumericalError, match=r"step \d+: the (parameter|gradient|loss)"):
        list(train(setup))


class UnusedTask(TinyTask):
    def model(self) -> nn.Module:
        model = super().model()
        model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
        return model


def test_a_parameter_outside_the_loss_is_named() -> None:
    config = tiny_config()
    setup = set_up(config, UnusedTask(config))
    with pytest.raises(TrackedReplayError, match="'spare'"):
        list(train(setup))


class FrozenTask(TinyTask):
    def model(self) -> nn.Module:
        model = super().model()
        model[0].weight.requires_grad_(False)
        return model


def test_frozen_parameters_stay_as_they_are() -> None:
    config = tiny_config()
    setup = set_up(config, FrozenTask(config))
    found = final_state(setup)
    assert "0.weight" not in found.parameters
    np.testing.assert_array_equal(bits(found.buffers["0.weight"]), bits(setup.initial.buffers["0.weight"]))
    assert not torch.equal(found.parameters["0.bias"], setup.initial.parameters["0.bias"])


def test_evaluation_reads_running_statistics() -> None:
    setup = tiny_setup()
    state = final_state(setup)
    model = copy.deepcopy(setup.step.model).eval()
    model.load_state_dict(state.model_tensors)
    with torch.no_grad():
        outputs = model(setup.data.evaluation.inputs.double())
    expected = F.cross_entropy(outputs, setup.data.evaluation.labels, reduction="none").numpy()
    found = evaluate(setup, state)
    np.testing.assert_allclose(found.measurements, expected, rtol=1e-12)
    assert (
        found.accuracy(setup.data.evaluation.labels)
        == (outputs.argmax(1) == setup.data.evaluation.labels).double().mean()
    )
