"""Metasmoothness where its value is known: a training that is linear in the weights, and one worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_setup
from torch import Tensor, nn

from tracked_replay.lds import metasmoothness
from tracked_replay.lds.metasmoothness import sentence
from tracked_replay.tasks import Examples, Task, TaskData
from tracked_replay.training import TrainingSetup, set_up

QUADRATIC = {"train__momentum": 0.0, "train__weight_decay": 0.0}


class Regression(Task):
    """½ (θ·x − 1)² on 20 random inputs of three numbers."""

    label_names = ("only",)

    def train_examples(self) -> Examples:
        generator = torch.Generator().manual_seed(3)
        return Examples(torch.randn(20, 3, generator=generator), torch.zeros(20, dtype=torch.int64))

    def evaluation_examples(self) -> Examples:
        return Examples(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))

    def model(self) -> nn.Module:
        return nn.Linear(3, 1, bias=False)

    def per_example_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (outputs[:, 0] - 1).square()


class Diagonal(nn.Module):
    """Two parameters that start at 0, each scaled by an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.theta * inputs


class TwoCurvatures(Regression):
    """One example with the loss ½ Σⱼ (cⱼ θⱼ − cⱼ)², so that a step multiplies 1 − θⱼ by 1 − lr·w·cⱼ²."""

    def train_examples(self) -> Examples:
        return Examples(torch.tensor([[1.5, 0.5]]).sqrt(), torch.zeros(1, dtype=torch.int64))

    def evaluation_examples(self) -> Examples:
        return self.train_examples()

    def model(self) -> nn.Module:
        return Diagonal()

    def per_example_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (outputs - self.train_examples().inputs.double()).square().sum(dim=1)


def setup_of(kind: type[Task], **changes: object) -> TrainingSetup:
    config = tiny_config(**QUADRATIC, **changes)
    task = kind(config)
    return set_up(config, task, TaskData(task, config))


def test_it_is_1_where_the_training_is_linear_in_the_weights() -> None:
    setup = setup_of(Regression, train__epochs=1, train__batch_size=20, train__lr=0.3)
    for removed in ([0], [3, 8, 11]):
        assert metasmoothness(setup, np.array(removed)) == 1


def test_a_case_by_hand() -> None:
    # Two steps with lr 1: 1 − θⱼ is (1 − w cⱼ²)². For c² = 1.5 and w = 1, ½, 0 it is 0.25, 0.0625, 1: it turns round,
    # with |Δ₁| = 0.1875. For c² = 0.5 it is 0.25, 0.5625, 1: it goes on, with |Δ₁| = 0.3125.
    setup = setup_of(TwoCurvatures, train__epochs=2, train__batch_size=1, train__lr=1.0)
    expected = (0.3125 - 0.1875) / (0.3125 + 0.1875)
    assert metasmoothness(setup, np.array([0])) == pytest.approx(expected, abs=1e-6)


def test_it_lies_between_its_bounds_for_a_network() -> None:
    smooth = metasmoothness(tiny_setup(train__lr=0.01), np.array([0, 5, 9]))
    assert 0.8 < smooth <= 1
    rough = metasmoothness(tiny_setup(train__lr=2.0, train__epochs=6), np.array([0, 5, 9]))
    assert -1 <= rough < smooth


def test_it_is_undefined_where_the_removal_changes_nothing() -> None:
    setup = tiny_setup(train__batch_size=20, train__epochs=1)  # 8 of 48 examples are in no batch
    unseen = np.setdiff1d(np.arange(48), setup.plan.indices)
    assert math.isnan(metasmoothness(setup, unseen[:1]))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.95, "can be expected to hold"), (0.3, "may miss"), (math.nan, "undefined: this removal changes nothing")],
)
def test_the_sentence_says_what_to_expect(value: float, said: str) -> None:
    assert said in sentence(value)
