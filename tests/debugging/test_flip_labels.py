"""Labels made wrong on purpose: how many, which, to what, and that every user of the data sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TinyTask, tiny_config

from tracked_replay.config import Config
from tracked_replay.debugging import flip_labels
from tracked_replay.errors import ConfigError
from tracked_replay.tasks import TaskData

LABELS = torch.randint(4, (1000,), generator=torch.Generator().manual_seed(0))


def data_of(**changes: object) -> TaskData:
    config = tiny_config(**changes)
    return TaskData(TinyTask(config), config)


@pytest.mark.parametrize("share", [0.001, 0.0128, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_exactly_the_share_becomes_wrong_and_nothing_else_changes(share: float, seed: int) -> None:
    before = LABELS.clone()
    wrong, flipped = flip_labels(LABELS, 4, share, seed)
    assert torch.equal(LABELS, before)
    assert wrong.dtype == torch.int64
    assert (wrong != LABELS).nonzero().flatten().tolist() == flipped.tolist()
    assert len(flipped) == round(share * 1000)
    assert 0 <= int(wrong.min()) <= int(wrong.max()) <= 3
    assert flipped.dtype == np.int64


def test_two_classes_are_swapped() -> None:
    labels = torch.tensor([0, 1] * 10)
    wrong, flipped = flip_labels(labels, 2, 0.5, 3)
    assert torch.equal(wrong[flipped], 1 - labels[flipped])


def test_every_wrong_class_is_reached_about_equally_often() -> None:
    labels = torch.full((30_000,), 2)
    wrong, _ = flip_labels(labels, 4, 0.9999, 5)
    counts = torch.bincount(wrong, minlength=4)
    assert counts[2] == 3
    assert all(abs(int(counts[label]) - 9999) < 500 for label in (0, 1, 3))


def test_the_seed_decides_which() -> None:
    one, again, other = (flip_labels(LABELS, 4, 0.1, seed) for seed in (7, 7, 8))
    assert torch.equal(one[0], again[0])
    assert one[1].tolist() == again[1].tolist()
    assert one[1].tolist() != other[1].tolist()


def test_no_share_changes_nothing() -> None:
    wrong, flipped = flip_labels(LABELS, 1, 0.0, 0)
    assert wrong is LABELS
    assert flipped.tolist() == []


@pytest.mark.parametrize(
    ("share", "classes", "message"),
    [
        (1.0, 4, "data.flip_labels: found 1.0; allowed: finite number >= 0 and < 1"),
        (-0.1, 4, "data.flip_labels: found -0.1; allowed: finite number >= 0 and < 1"),
        (float("nan"), 4, "data.flip_labels: found nan; allowed: finite number >= 0 and < 1"),
        (float("inf"), 4, "data.flip_labels: found inf; allowed: finite number >= 0 and < 1"),
        (0.1, 1, "data.flip_labels: found 0.1, but there is 1 class and no wrong one; allowed: 0"),
        (0.0004, 4, "data.flip_labels: found 0.0004, which flips none of 1000 labels; allowed: 0, or more than 0.0005"),
    ],
)
def test_what_cannot_be_flipped_is_refused(share: float, classes: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flip_labels(LABELS.clamp(max=classes - 1), classes, share, 0)
    assert str(caught.value) == message


@pytest.mark.parametrize("found", ["1", "-0.05", "nan", "inf", "some", "true"])
def test_the_config_refuses_what_is_no_share(found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.resolve(overrides={"data.flip_labels": found})
    assert f"data.flip_labels: found '{found}'; allowed: finite number >= 0 and < 1" in str(caught.value)


def test_the_data_hold_the_wrong_labels_and_know_the_true_ones() -> None:
    plain, wrong = data_of(), data_of(data__flip_labels=0.25)
    indices, true_labels = wrong.flipped
    assert len(indices) == 12
    assert plain.train.labels[indices].tolist() == true_labels.tolist()
    differing = (plain.train.labels != wrong.train.labels).nonzero().flatten()
    assert differing.tolist() == indices.tolist()
    assert torch.equal(plain.train.inputs, wrong.train.inputs)
    assert torch.equal(plain.evaluation.labels, wrong.evaluation.labels)
    everything = torch.arange(48)
    assert torch.equal(wrong.batch(everything, 1).labels, wrong.train.labels)
    assert torch.equal(wrong.plain_batch(everything).labels, wrong.train.labels)
    assert plain.flipped.indices.tolist() == []


def test_the_fingerprint_of_the_data_goes_with_share_and_seed() -> None:
    variants = [{}, {"data__flip_labels": 0.25}, {"data__flip_labels": 0.5}, {"data__flip_labels": 0.25, "seed": 1}]
    prints = [data_of(**changes).fingerprint() for changes in variants]
    assert len(set(prints)) == 4
    assert data_of(data__flip_labels=0.25).fingerprint() == prints[1]
    assert data_of(seed=1).fingerprint() == prints[0]


def test_the_examples_of_the_task_stay_as_they_are() -> None:
    config = Config.resolve(overrides="data.flip_labels=0.05")
    from tracked_replay.tasks import load_task

    task = load_task(config)
    before = task.train_examples().fingerprint()
    TaskData(task, config)
    assert task.train_examples().fingerprint() == before


def test_a_plain_batch_is_not_augmented() -> None:
    config = Config.resolve(overrides="data.augmentation=crop,data.crop_padding=2")
    from tracked_replay.tasks import load_task

    data = TaskData(load_task(config), config)
    indices = torch.tensor([5, 0, 5])
    plain = data.plain_batch(indices)
    assert torch.equal(plain.inputs, data.train.inputs[indices] / 8 - 1)
    assert not torch.equal(plain.inputs, data.batch(indices, 0).inputs)
    with pytest.raises(IndexError):
        data.plain_batch(torch.tensor([-1]))
