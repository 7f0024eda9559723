"""scikit-learn's handwritten digits: 1797 grey images of 8 × 8 pixels that come with the library."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracked_replay.tasks._draw import stretch
from tracked_replay.tasks._examples import Examples
from tracked_replay.tasks._task import Task
from tracked_replay.tasks.resnet9 import ResNet9

_BRIGHTEST = 16
# Not the master seed: examples must keep their index in every run, or scores of two seeds could not be compared.
_SPLIT_SEED = 0


class Digits(Task):
    """1437 training and 360 evaluation digits, uint8 (N, 1, 8, 8) with values 0 … 16, for a ResNet-9."""

    name = "digits"
    label_names = tuple("0123456789")

    def train_examples(self) -> Examples:
        """1437 examples; every digit has its share of them."""
        return _split()[0]

    def evaluation_examples(self) -> Examples:
        """360 examples; every digit has its share of them."""
        return _split()[1]

    def model(self) -> nn.Module:
        """A ResNet-9 as the ``model`` section of the config describes it."""
        model = self.config.model
        return ResNet9(1, 10, model.width, model.pooling, model.pooling_epsilon, model.final_scale)

    def prepare(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (B, 1, 8, 8), 0 … 16 → ``dtype``, −1 … 1."""
        return inputs.to(dtype) / (_BRIGHTEST / 2) - 1

    def draw(self, example_input: Tensor) -> NDArray[np.uint8]:
        """(1, 8, 8) → (8, 8), dark ink on white."""
        return 255 - stretch(example_input[0].cpu(), 0, _BRIGHTEST).numpy()


@cache
def _split() -> tuple[Examples, Examples]:
    # Imported here: scikit-learn takes a second to load, and other tasks do not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    parts = train_test_split(
        images, digits.target, test_size=0.2, random_state=_SPLIT_SEED, shuffle=True, stratify=digits.target
    )
    train_images, evaluation_images, train_labels, evaluation_labels = map(np.ascontiguousarray, parts)
    return (
        Examples(torch.from_numpy(train_images), torch.from_numpy(train_labels.astype(np.int64))),
        Examples(torch.from_numpy(evaluation_images), torch.from_numpy(evaluation_labels.astype(np.int64))),
    )
