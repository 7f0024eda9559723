"""Learning rates against torch's schedulers stepped in a training loop, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_setup
from torch.optim import lr_scheduler

from tracked_replay.training import learning_rates, parameter_groups

STEPS_PER_EPOCH = 5


def rates(**changes: object) -> np.ndarray:
    config = tiny_config(train__epochs=6, train__lr=0.2, model__bias_scale=3.0, **changes)
    groups = parameter_groups(config, tiny_setup().initial)
    return learning_rates(config, groups, STEPS_PER_EPOCH)


def loop(make_scheduler) -> np.ndarray:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 0.2}, {"params": [parameters[1]], "lr": 0.2 * 3.0}], lr=0.2, momentum=0.8
    )
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(30):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if len(found) < 30:
            scheduler.step()
    return np.array(found)


def test_constant() -> None:
    np.testing.assert_array_equal(rates(), np.tile([0.2, 0.2 * 3.0], (30, 1)))


def test_step() -> None:
    expected = loop(lambda optimizer: lr_scheduler.StepLR(optimizer, 10, 0.5))
    np.testing.assert_array_equal(rates(train__schedule="step", train__lr_step_epochs=2, train__lr_gamma=0.5), expected)
    np.testing.assert_allclose(expected[[0, 9, 10, 29], 0], [0.2, 0.2, 0.1, 0.05])


def test_cosine() -> None:
    expected = loop(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0.2 * 0.1))
    np.testing.assert_array_equal(rates(train__schedule="cosine", train__lr_end=0.1), expected)
    np.testing.assert_allclose(expected[15, 0], 0.02 + 0.18 * (1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_one_cycle(end: float) -> None:
    found = rates(train__schedule="one_cycle", train__lr_start=0.1, train__lr_end=end, train__lr_peak=0.5)
    expected = loop(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer,
            [0.2, 0.2 * 3.0],
            total_steps=30,
            pct_start=0.5,
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=0.1 / end if end else math.inf,
        )
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found[[0, 14, 29], 0], [0.02, 0.2, 0.2 * end], atol=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "one_cycle"])
def test_warm_up_rises_in_a_line_to_where_the_schedule_starts(schedule: str) -> None:
    plain = {"train__schedule": schedule, "train__lr_start": 0.25}
    found = rates(train__warmup_epochs=2, **plain)
    config = tiny_config(train__epochs=4, train__lr=0.2, model__bias_scale=3.0)
    groups = parameter_groups(config, tiny_setup().initial)
    after = learning_rates(
        config.override({name.replace("__", "."): value for name, value in plain.items()}), groups, 5
    )
    assert found.shape == (30, 2)
    np.testing.assert_array_equal(found[10:], after)
    line = after[0] * np.linspace(0.25, 1.0, 11)[:10, None]
    np.testing.assert_allclose(found[:10], line, rtol=1e-12)
