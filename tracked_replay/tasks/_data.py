"""A task's examples, held once, and the batches made of them."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracked_replay.config import Config
from tracked_replay.determinism import derive_component_seed
from tracked_replay.errors import DataError
from tracked_replay.tasks._examples import Examples
from tracked_replay.tasks._flip import flip_labels
from tracked_replay.tasks._task import Task


class Batch(NamedTuple):
    """B examples as a model sees them.

    Attributes:
        indices: (B,) int64, on the CPU: positions among the training (or evaluation) examples.
        inputs: (B, ...) of ``train.dtype``, where the data are stored.
        labels: (B,) int64, where the data are stored.
    """

    indices: Tensor
    inputs: Tensor
    labels: Tensor


class FlippedLabels(NamedTuple):
    """Training labels that ``data.flip_labels`` made wrong.

    Attributes:
        indices: (flipped,) int64, rising.
        true_labels: (flipped,) int64, what the task says.
    """

    indices: np.ndarray
    true_labels: np.ndarray


class TaskData:
    """The examples that a config selects from a task.

    Args:
        task: where the examples come from, and how they are augmented and prepared.
        config: ``seed``, ``data.train_examples``, ``data.evaluation_examples``, ``data.flip_labels`` and
            ``train.dtype`` are read.

    Attributes:
        train: training examples, wrong labels included.
        evaluation: evaluation examples; their labels are never flipped.
        flipped: which training labels are wrong.

    Raises:
        ConfigError: more examples are asked for than there are, or labels cannot be flipped as asked.
        DataError: the data are missing or damaged, or a label has no name.
    """

    def __init__(self, task: Task, config: Config) -> None:
        self.task = task
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        data = config.data
        self._check_label_names()
        train, evaluation = task.train_examples(), task.evaluation_examples()
        for method, found in (("train_examples", train), ("evaluation_examples", evaluation)):
            if not isinstance(found, Examples):
                raise DataError(f"{task.name}.{method}: found {type(found).__name__}; allowed: Examples")
        self.train = train.subset(data.train_examples, field="data.train_examples")
        self.evaluation = evaluation.subset(data.evaluation_examples, field="data.evaluation_examples")
        for kind, examples in (("training", self.train), ("evaluation", self.evaluation)):
            self._check_labels(kind, examples)
        self.flipped = self._flip_labels(config)

    @property
    def num_train(self) -> int:
        """Training examples, N."""
        return len(self.train)

    @property
    def num_evaluation(self) -> int:
        """Evaluation examples."""
        return len(self.evaluation)

    @property
    def device(self) -> torch.device:
        """Where the examples are stored and batches are made."""
        return self.train.inputs.device

    def to(self, device: torch.device | str) -> TaskData:
        """Move the storage to ``device``, in place, and return self; batches are made there from then on."""
        self.train = self.train.to(device)
        self.evaluation = self.evaluation.to(device)
        return self

    def batch(self, indices: Tensor, epoch: int) -> Batch:
        """Training examples as the model sees them in an epoch.

        Args:
            indices: (B,) int64, each from 0 to ``num_train`` − 1; repeats are allowed.
            epoch: epoch, from 0; it decides the augmented views.

        Raises:
            IndexError: an index outside the training set (negative ones included).
        """
        indices, inputs, labels = _select(self.train, indices, "training")
        view = self.task.augment(inputs, indices, epoch=epoch, num_examples=self.num_train)
        return Batch(indices, self._prepared(view), labels)

    def evaluation_batch(self, indices: Tensor) -> Batch:
        """Evaluation examples without augmentation; (B,) int64 indices from 0 to ``num_evaluation`` − 1.

        Raises:
            IndexError: an index outside the evaluation set (negative ones included).
        """
        indices, inputs, labels = _select(self.evaluation, indices, "evaluation")
        return Batch(indices, self._prepared(inputs), labels)

    def plain_batch(self, indices: Tensor) -> Batch:
        """Training examples without augmentation; (B,) int64 indices from 0 to ``num_train`` − 1.

        Raises:
            IndexError: an index outside the training set (negative ones included).
        """
        indices, inputs, labels = _select(self.train, indices, "training")
        return Batch(indices, self._prepared(inputs), labels)

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the selected training and evaluation examples and the label names."""
        parts = [self.train.fingerprint(), self.evaluation.fingerprint(), *map(repr, self.task.label_names)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _prepared(self, raw: Tensor) -> Tensor:
        prepared = self.task.prepare(raw, self.dtype)
        if prepared.dtype != self.dtype or len(prepared) != len(raw):
            raise DataError(
                f"{self.task.name}.prepare: found {len(prepared)} inputs of type {prepared.dtype}; "
                f"allowed: {len(raw)}, one an example, of type {self.dtype}"
            )
        return prepared

    def _flip_labels(self, config: Config) -> FlippedLabels:
        before, seed = self.train, derive_component_seed(config.seed, "label_flips")
        labels, indices = flip_labels(before.labels, len(self.task.label_names), config.data.flip_labels, seed)
        if len(indices):
            self.train = Examples(before.inputs, labels)
        return FlippedLabels(indices, before.labels.cpu().numpy()[indices])

    def _check_label_names(self) -> None:
        names = self.task.label_names
        if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self.task.name}.label_names: found {names!r}; allowed: a tuple of at least one text")

    def _check_labels(self, kind: str, examples: Examples) -> None:
        names = self.task.label_names
        low, high = int(examples.labels.min()), int(examples.labels.max())
        if low < 0 or high >= len(names):
            raise DataError(
                f"{self.task.name}: found {kind} labels from {low} to {high}; "
                f"allowed: 0 to {len(names) - 1}, one for each of the {len(names)} label_names"
            )


def _select(examples: Examples, indices: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"indices: found shape {tuple(indices.shape)} and type {indices.dtype}; allowed: (B,) and torch.int64"
        )
    indices = indices.cpu()
    # Negative indices would silently count from the end, and a score would go to the wrong example.
    outside = (indices < 0) | (indices >= len(examples))
    if bool(outside.any()):
        raise IndexError(
            f"indices: found {int(indices[outside][0])}; allowed: 0 to {len(examples) - 1}, the {kind} examples"
        )
    there = indices.to(examples.labels.device)
    return indices, examples.inputs[there], examples.labels[there]
