"""Rankings against plain loops over examples, and what they find against counting by hand."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TinyTask, recorded, tiny_config, tiny_setup
from torch import nn

from tracked_replay.debugging import (
    QUESTIONS,
    Ranking,
    choose_checkpoints,
    detection,
    margins,
    outputs_of,
    rank_examples,
    self_influence,
)
from tracked_replay.errors import NumericalError
from tracked_replay.lds import baseline_scores
from tracked_replay.recording import Recording
from tracked_replay.replay import Target
from tracked_replay.tasks import TaskData
from tracked_replay.training import State, TrainingSetup, set_up

ALL = Target.mean(range(10), "mean:all")


def loaded(setup: TrainingSetup, state: State) -> nn.Module:
    """The model itself, with the state in it, in eval mode."""
    model = copy.deepcopy(setup.step.model)
    model.load_state_dict(state.model_tensors)
    return model.eval().requires_grad_()


def one_by_one(setup: TrainingSetup, state: State) -> dict[str, list[float]]:
    """Loss, margin, prediction, probability of each training example, shown alone, by the definitions."""
    model = loaded(setup, state)
    found: dict[str, list[float]] = {"losses": [], "margins": [], "predictions": [], "probabilities": []}
    for pixels, label in zip(setup.data.train.inputs.double(), setup.data.train.labels.tolist(), strict=True):
        logits = model(pixels[None])[0].tolist()
        weights = [np.exp(logit) for logit in logits]
        found["losses"].append(-np.log(weights[label] / sum(weights)))
        found["margins"].append(logits[label] - max(logits[:label] + logits[label + 1 :]))
        found["predictions"].append(int(np.argmax(logits)))
        found["probabilities"].append(max(weights) / sum(weights))
    return found


def squared_gradients(setup: TrainingSetup, state: State, rates: list[float]) -> np.ndarray:
    """Σ rate · ‖∇ℓᵢ‖² with one backward pass an example; rates of weights and of biases."""
    model = loaded(setup, state)
    values = []
    for pixels, label in zip(setup.data.train.inputs.double(), setup.data.train.labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(pixels[None]), label[None]).backward()
        values.append(sum(rates[p.ndim <= 1] * float(p.grad.square().sum()) for p in model.parameters()))
    return np.array(values)


@pytest.mark.parametrize("batch", [500, 7])
def test_outputs_are_those_of_the_examples_shown_alone(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracked_replay.debugging.outputs.BATCH", batch)
    setup = tiny_setup(data__flip_labels=0.25)
    recording = recorded(setup, tmp_path)
    for checkpoint in (recording.checkpoints[3], recording.final):
        state = recording.state(checkpoint)
        found, expected = outputs_of(setup, state), one_by_one(setup, state)
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-10, atol=1e-12, err_msg=name)
        assert found.predictions.dtype == np.int64


def test_margins_by_hand() -> None:
    outputs = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, -5.0]])
    assert margins(outputs, torch.tensor([1, 2, 0])).tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize("size", [2**28, 1])
def test_self_influence_is_that_of_plain_gradients(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracked_replay.debugging.gradients.GRADIENT_BYTES", size)
    setup = tiny_setup(model__bias_scale=3.0)
    recording = recorded(setup, tmp_path)
    state = recording.state(recording.checkpoints[4])
    rates = [0.7, 0.2]
    assert [group.name for group in setup.step.groups] == ["weights", "biases"]
    found = self_influence(setup, state, rates)
    np.testing.assert_allclose(found, squared_gradients(setup, state, rates), rtol=1e-10)


class Branching(nn.Module):
    """A linear layer behind a question that vmap cannot answer for many examples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))  # without a dimension

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        return self.scale * self.linear(flat if float(flat.sum()) > 0 else 2 * flat)


class BranchingTask(TinyTask):
    def model(self) -> nn.Module:
        return Branching()


def test_a_model_that_vmap_cannot_take_is_asked_example_by_example() -> None:
    config = tiny_config()
    task = BranchingTask(config)
    setup = set_up(config, task, TaskData(task, config))
    found = self_influence(setup, setup.initial, [1.0, 1.0])
    np.testing.assert_allclose(found, squared_gradients(setup, setup.initial, [1.0, 1.0]), rtol=1e-10)


class OneOutputTask(TinyTask):
    """A regression: one output an example, and no classes."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))

    def per_example_loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (outputs.squeeze(1) - labels).square()


def test_without_classes_there_are_losses_only(tmp_path: Path) -> None:
    config = tiny_config()
    task = OneOutputTask(config)
    setup = set_up(config, task, TaskData(task, config))
    recording = recorded(setup, tmp_path)
    found = rank_examples(setup, recording, recording.checkpoints[:1], ALL, np.zeros(48))
    assert (found.final.margins, found.final.predictions, found.final.probabilities) == (None, None, None)
    assert found.final.losses.shape == (48,)
    names = [ranking.name for ranking in found.rankings]
    assert names == [name for name in QUESTIONS if not name.startswith("margin")]


def last_of_epochs(setup: TrainingSetup, recording: Recording) -> list[int]:
    """The last state of each epoch that a checkpoint holds, the final one left out."""
    by_epoch = {setup.plan.epochs[row.step]: row.step for row in recording.checkpoints if row.step < setup.plan.steps}
    return sorted(by_epoch.values())


@pytest.mark.parametrize("every", [1, 4])
def test_rankings_are_their_formulas(every: int, tmp_path: Path) -> None:
    setup = tiny_setup(record__every=every, train__schedule="one_cycle", model__bias_scale=3.0, data__flip_labels=0.1)
    recording = recorded(setup, tmp_path)
    harm = np.arange(48.0)
    chosen = choose_checkpoints(recording, 10)
    assert [checkpoint.step for checkpoint in chosen] == last_of_epochs(setup, recording)
    found = {ranking.name: ranking for ranking in rank_examples(setup, recording, chosen, ALL, harm).rankings}
    assert list(found) == list(QUESTIONS)
    states = [recording.state(checkpoint) for checkpoint in (*chosen, recording.final)]
    along = [one_by_one(setup, state) for state in states]
    expected = {
        "margin": -np.array(along[-1]["margins"]),
        "margin_area": -np.mean([one["margins"] for one in along], axis=0),
        "training_loss": np.array(along[-1]["losses"]),
        "training_loss_area": np.mean([one["losses"] for one in along], axis=0),
        "harm": harm,
        "tracin_harm": baseline_scores(setup, recording, [ALL])["tracin"][0],
        "self_influence": sum(
            squared_gradients(setup, state, setup.plan.learning_rates[state.step].tolist()) for state in states[:-1]
        ),
    }
    for name, ranking in found.items():
        assert ranking.values.dtype == np.float64
        np.testing.assert_allclose(ranking.values, expected[name], rtol=1e-9, atol=1e-11, err_msg=name)
        assert ranking.question == QUESTIONS[name]


def test_checkpoints_are_spread_evenly_and_hold_the_last(tmp_path: Path) -> None:
    setup = tiny_setup(train__epochs=7)
    recording = recorded(setup, tmp_path)
    steps = [[checkpoint.step for checkpoint in choose_checkpoints(recording, count)] for count in (1, 2, 3, 4, 7, 99)]
    ends = [2, 5, 8, 11, 14, 17, 20]
    assert steps == [[20], [2, 20], [2, 11, 20], [2, 8, 14, 20], ends, ends]


def test_the_order_starts_with_the_highest_value_and_ties_with_the_lower_index() -> None:
    assert Ranking("margin", np.array([1.0, 3.0, -2.0, 3.0])).order.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_ranking_without_an_order_is_refused(bad: float) -> None:
    with pytest.raises(NumericalError, match=r"^ranking harm: the value of training example 2 is (nan|inf)$"):
        Ranking("harm", np.array([1.0, 2.0, bad]))


def test_detection_is_what_counting_pairs_gives() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 8, 40).astype(float)  # with ties
    mislabelled = generator.choice(40, 6, replace=False)
    clean = np.setdiff1d(np.arange(40), mislabelled)
    pairs = [(values[bad] > values[good]) + 0.5 * (values[bad] == values[good])
             for bad, good in itertools.product(mislabelled, clean)]  # fmt: skip
    order = sorted(range(40), key=lambda index: (-values[index], index))
    hits = len(set(order[:10]) & set(mislabelled.tolist()))
    found = detection(Ranking("margin", values), mislabelled, 10)
    assert found.auc == pytest.approx(np.mean(pairs), rel=1e-12)
    assert (found.precision, found.recall) == (hits / 10, hits / 6)


def test_a_perfect_ranking_and_its_reverse() -> None:
    values = np.array([5.0, 1.0, 4.0, 0.0])
    assert detection(Ranking("margin", values), [0, 2], 2) == (1.0, 1.0, 1.0)
    assert detection(Ranking("margin", -values), [0, 2], 1) == (0.0, 0.0, 0.0)
