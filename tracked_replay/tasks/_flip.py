"""Wrong labels put in on purpose, to see whether a search for mislabelled examples finds them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tracked_replay.errors import ConfigError

FIELD = "data.flip_labels"


def flip_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> tuple[Tensor, np.ndarray]:
    """Replace a share of the labels by others, each of the wrong classes with the same probability.

    Args:
        labels: (N,) int64, each from 0 to ``num_classes`` − 1; they are not changed.
        num_classes: classes that a label can have.
        share: share of the labels to replace, 0 to below 1; exactly ``round(share · N)`` become wrong.
        seed: of the draw; the same seed gives the same labels.

    Returns:
        The labels, (N,) int64, and the indices of the replaced ones, (flipped,) int64, rising.

    Raises:
        ConfigError: a share outside this range or so small that it flips no label, or fewer than two classes.
    """
    if not (math.isfinite(share) and 0 <= share < 1):
        raise ConfigError(f"{FIELD}: found {share}; allowed: finite number >= 0 and < 1")
    if not share:
        return labels, np.empty(0, dtype=np.int64)
    if num_classes < 2:
        raise ConfigError(f"{FIELD}: found {share:g}, but there is {num_classes} class and no wrong one; allowed: 0")
    count = round(share * len(labels))
    if not count:
        raise ConfigError(
            f"{FIELD}: found {share:g}, which flips none of {len(labels)} labels; allowed: 0, or more than "
            f"{0.5 / len(labels):g}"
        )
    generator = np.random.default_rng(seed)
    flipped = np.sort(generator.choice(len(labels), count, replace=False))
    places = torch.from_numpy(flipped).to(labels.device)
    # A step of 1 to classes − 1 around the circle of classes never comes back to the same label.
    steps = torch.from_numpy(generator.integers(1, num_classes, count)).to(labels.device)
    wrong = labels.clone()
    wrong[places] = (labels[places] + steps) % num_classes
    return wrong, flipped
