"""What a user writes to train and replay a model of their own."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tracked_replay.config import Config
from tracked_replay.tasks._augment import augment_images
from tracked_replay.tasks._draw import draw_input
from tracked_replay.tasks._examples import Examples


class Task(ABC):
    """Data, model, loss and measurement of one learning problem.

    A task has to give ``label_names``, :meth:`train_examples`, :meth:`evaluation_examples` and :meth:`model`; the
    other methods have defaults for classification. Everything that a task returns must be the same whenever it is
    asked: data may not depend on the master seed or on the time, and ``model`` draws its initial parameters from
    torch's global generator, which the caller has seeded.

    Attributes:
        name: shown in reports and tags; the class name where it is not given.
        label_names: one name for each label value 0 … classes − 1.
        config: the whole resolved config.
    """

    name: ClassVar[str] = ""
    label_names: tuple[str, ...] = ()

    def __init__(self, config: Config) -> None:
        self.config = config

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def train_examples(self) -> Examples:
        """All training examples, in a fixed order. Raises DataError where they are missing or damaged."""

    @abstractmethod
    def evaluation_examples(self) -> Examples:
        """All examples that measurements are taken on, in a fixed order. Raises DataError."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A freshly initialised model: prepared inputs (B, ...) → outputs (B, ...)."""

    def prepare(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Raw batch (B, ...) → model input (B, ...) of type ``dtype``, each example by itself."""
        return inputs.to(dtype)

    def augment(self, inputs: Tensor, indices: Tensor, *, epoch: int, num_examples: int) -> Tensor:
        """The view of a raw training batch in an epoch, as ``data.augmentation`` asks for.

        Args:
            inputs: (B, ...) raw inputs.
            indices: (B,) int64 indices among the training examples.
            epoch: epoch, from 0.
            num_examples: size of the training set.

        Returns:
            (B, ...) raw inputs. A replacement must make each view a pure function of seed, epoch and index, because
            the replay asks for the same views in another order.
        """
        return augment_images(
            inputs,
            indices,
            epoch=epoch,
            seed=self.config.seed,
            num_examples=num_examples,
            kind=self.config.data.augmentation,
            padding=self.config.data.crop_padding,
        )

    def per_example_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Training loss of each example: outputs (B, classes), labels (B,) → (B,). Must be twice differentiable."""
        # The same bits as F.cross_entropy(reduction="none"), value and gradient, but it can be differentiated in
        # forward mode by every torch that is supported; F.cross_entropy writes in place there in some of them.
        return -F.log_softmax(outputs, dim=1).gather(1, labels[:, None]).squeeze(1)

    def measurement(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What influence is asked about, for each evaluation example: outputs (B, classes), labels (B,) → (B,)."""
        return self.per_example_loss(outputs, labels)

    def draw(self, example_input: Tensor) -> NDArray[np.uint8]:
        """A picture of one raw input (without batch dimension) for figures.

        Returns:
            uint8 (H, W), grey, or (H, W, 3), RGB: the image itself for (1 or 3, H, W) inputs, bars for anything else.
        """
        return draw_input(example_input)

    def source_files(self) -> tuple[Path, ...]:
        """The files that define this task, for the digest of the code behind a run.

        Found through the class and its bases; a task that imports helpers of its own adds their paths here.
        """
        bases = [cls for cls in type(self).__mro__ if issubclass(cls, Task) and cls is not Task]
        files = [getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in bases]
        return tuple(dict.fromkeys(Path(file).resolve() for file in files if file))
