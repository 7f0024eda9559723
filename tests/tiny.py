"""What several test folders share: a tiny task, as a class and as a file of a user's own.

Not in conftest.py: two folders have one, and whichever pytest loaded last would answer to the name.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from torch import nn

from tracked_replay.config import Config
from tracked_replay.recording import Recorder, Recording, folder_source
from tracked_replay.tasks import Examples, Task, TaskData
from tracked_replay.training import TrainingSetup, evaluate, set_up, train


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
    "data.task": "tiny:TinyTask",
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


def recorded(setup: TrainingSetup, root: Path) -> Recording:
    """Train and record everything under a folder, without MLflow."""
    with Recorder(root, setup) as recorder:
        state = setup.initial
        for record in train(setup):
            recorder.add(record)
            state = record.after
        return Recording(folder_source(root), recorder.finish(state))


OWN_TASK = """
import torch
from torch import nn

from tracked_replay import Examples, Task


class Own(Task):
    label_names = ("a", "b", "c")

    def train_examples(self):
        return self.examples(32, 1)

    def evaluation_examples(self):
        return self.examples(6, 2)

    def examples(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (count,), generator=generator)
        return Examples(torch.randn(count, 5, generator=generator) + labels[:, None], labels)

    def model(self):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
"""


def write_task(folder: Path, *changes: tuple[str, str], more: str = "", name: str = "own.py") -> str:
    """Write a task of a user's own and return what ``data.task`` takes.

    Args:
        folder: where.
        changes: (old, new) pieces of its source; each ``old`` must be in it.
        more: methods added to the class.
        name: of the file.
    """
    source = OWN_TASK
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    path = folder / name
    path.write_text(source + textwrap.indent(textwrap.dedent(more), "    "), encoding="utf-8")
    return f"{path}:Own"


def own_config(task: str, **changes: object) -> Config:
    """A config of a few steps for :func:`write_task`'s task."""
    return tiny_config(data__task=task, **{"train__epochs": 2, **changes})


def retrained(setup: TrainingSetup, weights: torch.Tensor, index: int) -> float:
    """The measurement of an evaluation example after a real training with other example weights."""
    state = setup.initial
    for record in train(setup, weights=weights):
        state = record.after
    return float(evaluate(setup, state).measurements[index])


def slope(setup: TrainingSetup, example: int, index: int) -> float:
    """∂measurement/∂weight of a training example by central differences, extrapolated to fourth order (float64)."""
    slopes = []
    for eps in (2e-3, 1e-3):
        up, down = (torch.ones(setup.data.num_train, dtype=torch.float64) for _ in range(2))
        up[example] += eps
        down[example] -= eps
        slopes.append((retrained(setup, up, index) - retrained(setup, down, index)) / (2 * eps))
    return (4 * slopes[1] - slopes[0]) / 3
