"""Retrainings: the recorded run where no weight differs, and torch's own SGD on the weighted loss where some do."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny import recorded, tiny_setup

from tracked_replay.errors import ReplayError
from tracked_replay.lds import RetrainingJob, draw_subsets, final_state, predict, require_recorded_states, retrain
from tracked_replay.recording import Recording, state_digest
from tracked_replay.replay import Replay, ScoreSum, StepAdjoint, Target
from tracked_replay.training import evaluate


def digests(recording: Recording) -> list[str]:
    return [*recording.trace.state_digests, recording.final.digest]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_all_weights_1_it_is_the_recorded_run_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    changes = {"train__dtype": dtype, "train__nesterov": True}
    recording = recorded(tiny_setup(**changes), tmp_path)
    setup = tiny_setup(**changes)
    require_recorded_states(setup, digests(recording), recording.trace.losses)
    everything = np.arange(48)
    for job in (
        RetrainingJob(0, np.zeros(0, np.int64), np.zeros(0)),
        RetrainingJob(1, everything, np.ones(48)),
    ):
        result = retrain(setup, job)
        assert result.final_digest == recording.final.digest
        expected = evaluate(setup, recording.state(recording.final)).measurements
        np.testing.assert_array_equal(result.measurements.view(np.int64), expected.view(np.int64))


@pytest.mark.parametrize("step", [0, 1, 5, 9])
def test_the_first_state_that_differs_is_named(step: int, tmp_path: Path) -> None:
    setup = tiny_setup()
    recording = recorded(setup, tmp_path)
    wrong = digests(recording)
    assert setup.plan.steps == 9
    for place in range(step, 10):
        wrong[place] = "0" * len(wrong[place])
    with pytest.raises(ReplayError, match=rf"^step {step}: a retraining with all weights 1 .* recorded was 0000"):
        require_recorded_states(setup, wrong, recording.trace.losses)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "variant", [{"train__momentum": 0.0}, {"train__nesterov": True, "train__schedule": "one_cycle"}]
)
def test_with_weights_it_is_a_plain_loop_with_torch_optim_sgd_bit_for_bit(variant: dict, dtype: str) -> None:
    setup = tiny_setup(train__dtype=dtype, **variant)
    kind = getattr(torch, dtype)
    changed, values = np.array([3, 8, 30, 41]), np.array([0.0, 0.0, 0.5, 2.0])
    weights = torch.ones(48, dtype=kind)
    weights[changed] = torch.tensor(values, dtype=kind)
    model = copy.deepcopy(setup.step.model)
    model.load_state_dict(setup.initial.model_tensors)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in group.parameters], **group.sgd_arguments} for group in setup.step.groups
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    inputs, labels = setup.data.train.inputs.to(kind), setup.data.train.labels
    model.train()
    for indices, rates in zip(setup.plan.indices, setup.plan.learning_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs[indices]), labels[indices], reduction="none")
        ((losses * weights[indices]).sum() / len(indices)).backward()
        optimizer.step()
    result = retrain(setup, RetrainingJob(0, changed, values, keep_state=True))
    assert result.state is not None
    state = safetensors.torch.load(result.state)
    for name, tensor in model.state_dict().items():
        kept = "parameters" if name in named else "buffers"
        np.testing.assert_array_equal(bits(state[f"{kept}/{name}"]), bits(tensor), err_msg=name)
    model.eval()
    with torch.no_grad():
        outputs = model(setup.data.evaluation.inputs.to(kind))
    expected = F.cross_entropy(outputs, setup.data.evaluation.labels, reduction="none").double().numpy()
    np.testing.assert_allclose(result.measurements, expected, rtol=1e-12 if dtype == "float64" else 1e-5)
    assert result.accuracy == (outputs.argmax(1) == setup.data.evaluation.labels).double().mean().item()


def test_a_state_comes_back_only_where_it_was_asked_for() -> None:
    setup = tiny_setup(train__epochs=1)
    job = RetrainingJob(4, np.array([1]), np.array([0.0]))
    result = retrain(setup, job)
    assert (result.id, result.state) == (4, None)
    assert result.final_digest == state_digest(
        final_state(setup, torch.ones(48).double().index_fill(0, torch.tensor([1]), 0))
    )


def test_scores_predict_what_removals_of_a_few_examples_do(tmp_path: Path) -> None:
    setup = tiny_setup(train__lr=0.01)
    recording = recorded(setup, tmp_path)
    targets = tuple(Target.single(index) for index in range(10))
    total = ScoreSum(targets, 48, setup.plan.steps)
    for step in Replay(setup, recording, targets, StepAdjoint(setup.step), "memory"):
        total.add(step)
    base = evaluate(setup, recording.state(recording.final)).measurements
    random = np.random.default_rng(0).standard_normal(total.scores.shape)
    random *= np.linalg.norm(total.scores) / np.linalg.norm(random)
    actual, exact, chance = [], [], []
    for subset in draw_subsets(0, 48, [0.04], 6):
        zeros = np.zeros(len(subset.removed))
        actual.append(retrain(setup, RetrainingJob(subset.id, subset.removed, zeros)).measurements - base)
        exact.append(predict(base, total.scores, subset.removed, zeros) - base)
        chance.append(predict(base, random, subset.removed, zeros) - base)
    error = np.linalg.norm(np.array(exact) - actual)
    assert error < 0.15 * np.linalg.norm(actual)
    assert error < 0.1 * np.linalg.norm(np.array(chance) - actual)
