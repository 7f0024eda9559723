"""Fixtures that several test folders share: a tiny task, and a tracking store of its own for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from tracked_replay.config import Config
from tracked_replay.tasks import Examples, Task, TaskData
from tracked_replay.training import TrainingSetup, set_up


class TinyTask(Task):
    """48 examples of 1×4×4 noise with three labels, and a network of one convolution, BatchNorm and a linear head."""

    label_names = ("a", "b", "c")

    def train_examples(self) -> Examples:
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(3, (48,), generator=generator)
        inputs = torch.randn(48, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
        return Examples(inputs, labels)

    def evaluation_examples(self) -> Examples:
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(3, (10,), generator=generator)
        return Examples(torch.randn(10, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1), labels)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=True),
            nn.BatchNorm2d(3, momentum=0.3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        )


TINY = {
    "data.task": f"{__name__}:TinyTask",
    "train.dtype": "float64",
    "train.epochs": 3,
    "train.batch_size": 16,
    "train.lr": 0.05,
    "train.momentum": 0.8,
    "train.weight_decay": 0.01,
    "train.threads": 1,
}


def tiny_config(**changes: object) -> Config:
    """The config of the tiny task; ``train__lr=0.1`` changes ``train.lr``."""
    return Config().override(TINY | {name.replace("__", "."): value for name, value in changes.items()})


def tiny_setup(**changes: object) -> TrainingSetup:
    config = tiny_config(**changes)
    task = TinyTask(config)
    return set_up(config, task, TaskData(task, config))


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Give back the process-wide torch settings that a stage pins."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty SQLite tracking store in a folder of its own, which is the working directory too."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY":
            monkeypatch.delenv(name)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment("tests")
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)
